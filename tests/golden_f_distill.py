"""f-distill and the R1 penalty of FastGen against the authors' code."""

import torch
from dmd_rows import WHOLE, MeanHead, beside, finished, gradient, make_networks
from golden_rows import Golden, comparison, given_batch
from torch import Tensor

from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives import ADM, FDistill, Turn
from fastgen.objectives.base import State
from fastgen.rollout import Rollout, RolloutPolicy
from fastgen.schedule import TimeSampler

FASTGEN_STEPS = RolloutPolicy(timesteps=(1.0,))
UPDATE_MEANS = "theirs divides by means of the update itself; ours by those of earlier ones: the same update again"


class GivenLogits(FDistill):
    def discriminator_logits(self, networks: Networks, batch: Batch, x_t: Tensor, t: Tensor, stop: Tensor) -> Tensor:
        return batch.normal("logits")


def settled(objective: FDistill, networks: Networks, batch: Batch, rollout: Rollout) -> State:
    """The state in which the means of earlier updates are those of this one."""
    state = {name: value.double() for name, value in objective.init_state().items()}
    for _ in range(3):
        objective.ratio_weight(networks, batch, rollout, state)
        state["ratio"].copy_(state["seen"])
        state["seen"].zero_()
    return state


@comparison("f_distill_weights", "f_distill", "weights h(r) / mean h of six divergences", UPDATE_MEANS)
def f_distill_weights(golden: Golden) -> tuple[Tensor, Tensor]:
    x = torch.zeros(len(golden["t"]), 4, 2, 2, dtype=torch.float64)
    given = {"logits": golden["logits"], "renoise_time": golden["t"], "renoise": x}
    batch, networks, found = given_batch(given, golden["cond"]), make_networks(FASTGEN_STEPS), []
    for name in ("kl", "js", "sf", "neyman", "sh", "jf"):
        objective = GivenLogits(f_divergence=name, renoise_time=WHOLE, ratio_memory=0.0)
        state = settled(objective, networks, batch, finished(x))
        found.append(objective.ratio_weight(networks, batch, finished(x), state)[0])
    return torch.stack(found), golden["weights"]


@comparison(
    "f_distill_generator",
    "f_distill",
    "weighted matching loss and GAN loss of the student",
    f"{UPDATE_MEANS}; the discriminator reads the fake score; one draw for both parts",
)
def f_distill_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    given = {f"{name}_time": golden["t"] for name in ("renoise", "gan")}
    given |= {"renoise": golden["noise"], "gan_noise": golden["noise"], "initial": golden["initial"]}
    given["stop"] = torch.tensor(0)
    networks = make_networks(FASTGEN_STEPS, head=golden["head"])
    batch = given_batch(given, golden["cond"], golden["uncond"])
    objective = FDistill(guidance_scale=3.0, renoise_time=WHOLE, gan_time=WHOLE, ratio_memory=0.0)
    state = settled(objective, networks, batch, objective.rollout(networks, batch, grad=False))
    loss = objective.loss(Turn("student", ("student",)), networks, batch, state).total
    return beside(loss, gradient(networks.student, loss), golden)


class MeanHeadOfStop(MeanHead):
    def forward(self, features: list[Tensor], stop: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(features)


@comparison("fastgen_r1", "adm", "approximate R1 penalty of the discriminator, and its gradient in the head")
def fastgen_r1(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = make_networks(FASTGEN_STEPS)
    networks.modules["discriminator"] = MeanHeadOfStop(golden["head"])
    given = {"renoise_time": golden["t"], "renoise": golden["noise"], "r1": golden["r1"], "stop": torch.tensor(0)}
    batch = given_batch(given, golden["cond"], shared={"rollout": finished(golden["x"])})
    law = TimeSampler(low=0.02, high=1.0, ends="clamp")
    losses = [
        ADM(guidance_scale=1.0, renoise_time=law, r1_weight=weight).discriminator_loss(networks, batch).total
        for weight in (1.0, 0.0)
    ]
    penalty = losses[0] - losses[1]
    penalty.backward()
    return beside(penalty, networks["discriminator"].weight.grad, golden)  # type: ignore[arg-type]
