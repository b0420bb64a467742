"""TDM against the authors' code."""

import torch
from dmd_rows import beside, gradient, make_networks
from golden_rows import Golden, comparison, given_batch
from torch import Tensor

from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives import TDM
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation
from fastgen.schedule import VPSchedule

STEPS = RolloutPolicy(timesteps=(0.9, 0.675, 0.45, 0.225), transition="ode")  # steps 899, 674, 449 and 224 of 1000
ENDS = "a segment ends one step of 1000 above the next one's begin, and the last at step 0, which the comparison sets"


class Theirs(TDM):
    """Segments that end where theirs do, and given levels tau."""

    def rollout(self, networks: Networks, batch: Batch, policy: RolloutPolicy, grad: bool) -> Rollout:
        stop = (batch.uniform("stop") * 4).long()
        end = torch.tensor([676, 451, 226, 1], dtype=torch.float64)[stop] / 1000
        return backward_simulation(networks.student, policy, batch, stop, grad, to=end)

    def draw_tau(self, batch: Batch, name: str, *_: object) -> Tensor:
        return batch.uniform("tau")


def setting(golden: Golden) -> tuple[Networks, Batch]:
    networks = make_networks(STEPS, VPSchedule(golden["alphas_cumprod"]), "epsilon")
    given = {"initial": golden["x"], "fake_noise": golden["noise"], "renoise": golden["noise"]}
    given |= {"stop": (4.5 - golden["segments"]) / 4, "tau": (golden["tau"].double() + 1) / 1000}
    return networks, given_batch(given, golden["cond"], golden["uncond"])


@comparison(
    "tdm_fake_score", "tdm", "fake_target: clean with importance: loss of the fake score and its gradient", ENDS
)
def tdm_fake_score(golden: Golden) -> tuple[Tensor, Tensor]:
    networks, batch = setting(golden)
    loss = Theirs(fake_target="clean", importance=True).fake_loss(networks, batch, STEPS).total
    return beside(loss, gradient(networks.fake_score, loss), golden)


@comparison(
    "tdm_generator", "tdm", "ode rollout, guided score difference and Huber distance: gradient of the student", ENDS
)
def tdm_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    networks, batch = setting(golden)
    loss = Theirs(guidance_scale=4.5).student_loss(networks, batch, STEPS).total
    return gradient(networks.student, loss), golden["gradient"]


@comparison(
    "tdm_generator_l2",
    "tdm",
    "the same with distance: l2",
    f"{ENDS}; their square has no half: their gradient is twice ours",
)
def tdm_generator_l2(golden: Golden) -> tuple[Tensor, Tensor]:
    networks, batch = setting(golden)
    loss = Theirs(guidance_scale=4.5, distance="l2").student_loss(networks, batch, STEPS).total
    return 2 * gradient(networks.student, loss), golden["gradient"]
