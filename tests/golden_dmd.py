"""DMD2, and its options of Decoupled DMD and SenseFlow, against the authors' code."""

import dataclasses

import torch
from dmd_rows import WHOLE, beside, finished, gradient, make_networks
from golden_rows import Golden, comparison, given_batch
from torch import Tensor

from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives import DMD2, Turn
from fastgen.objectives.fake_score import denoising_loss
from fastgen.rollout import Rollout, RolloutPolicy, Step
from fastgen.schedule import VPSchedule

DMD2_STEPS = RolloutPolicy(timesteps=(1.0, 0.75, 0.5, 0.25))


def dmd2_networks(golden: Golden) -> Networks:
    head = golden.tensors.get("head")
    return make_networks(DMD2_STEPS, VPSchedule(golden["alphas_cumprod"]), "epsilon", head)


def level(step: Tensor) -> Tensor:
    """Discrete step i is the level (i + 1) / 1000."""
    return (step.double() + 1) / 1000


@comparison("dmd2_distribution_matching", "dmd2", "gradient of the matching loss, of the samples")
def dmd2_distribution_matching(golden: Golden) -> tuple[Tensor, Tensor]:
    x = golden["x"].clone().requires_grad_()
    batch = given_batch(
        {"renoise_time": level(golden["step"]), "renoise": golden["noise"]}, golden["cond"], golden["uncond"]
    )
    objective = DMD2(guidance_scale=1.75, renoise_time=WHOLE)
    objective.matching_loss(dmd2_networks(golden), batch, finished(x)).total.backward()
    assert x.grad is not None
    return x.grad, golden["gradient"]


@comparison("dmd2_fake_score", "dmd2", "loss of the fake score and its gradient")
def dmd2_fake_score(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = dmd2_networks(golden)
    batch = given_batch({"fake_time": level(golden["step"]), "fake_noise": golden["noise"]}, golden["cond"])
    loss = denoising_loss(networks, batch, golden["x"], WHOLE)
    return beside(loss, gradient(networks.fake_score, loss), golden)


@comparison("dmd2_discriminator", "dmd2", "GAN loss of the discriminator, and its gradient in features and head")
def dmd2_discriminator(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = dmd2_networks(golden)
    given = {f"gan_{kind}_time": level(golden[f"{kind}_step"]) for kind in ("real", "fake")}
    given |= {f"gan_{kind}_noise": golden[f"{kind}_noise"] for kind in ("real", "fake")}
    given |= {"fake_time": level(golden["fake_step"]), "fake_noise": golden["fake_noise"]}  # of the other part
    batch = given_batch(given, golden["cond"], latents=golden["real"], shared={"rollout": finished(golden["x"])})
    batch = dataclasses.replace(batch, given=given | {"stop": torch.tensor(0)})
    objective = DMD2(gan_weight=5e-3, gan_time=WHOLE, fake_time=WHOLE, discriminator_weight=1.0)
    both = objective.fake_loss(networks, batch)
    denoising = denoising_loss(networks, batch, golden["x"], WHOLE)
    loss = both.total - denoising
    parts = [gradient(networks.fake_score, loss), networks["discriminator"].weight.grad]
    return beside(loss, torch.cat(parts), golden)  # type: ignore[arg-type]


def dmd2_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    """The backward simulation with its random stop, the matching loss and the generator's GAN loss."""
    names = ("initial", "step1", "step2", "step3")
    given = dict(zip(names, golden["rollout"], strict=False))
    given |= {"stop": golden["stop"], "renoise_time": level(golden["step"]), "renoise": golden["noise"]}
    given |= {"gan_time": level(golden["gan_step"]), "gan_noise": golden["gan_noise"]}
    networks = dmd2_networks(golden)
    batch = given_batch(given, golden["cond"])
    objective = DMD2(guidance_scale=1.75, renoise_time=WHOLE, gan_time=WHOLE, gan_weight=5e-3)
    loss = objective.student_loss(networks, batch).total
    return beside(loss, gradient(networks.student, loss), golden)


for stop in (0, 2):
    comparison(f"dmd2_generator_stop{stop}", "dmd2", "backward simulation, matching and GAN loss of the student")(
        dmd2_generator
    )


# --- the two terms of Decoupled DMD


class OneStep(DMD2):
    """One step of the student to its clean prediction, from a given x_t at level 0.75."""

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        x_t = batch.normal("x_t")
        t = torch.full((len(x_t),), 0.75, dtype=x_t.dtype)
        x0 = networks.student(x_t, t, batch.cond)
        return Rollout(x0, torch.zeros_like(t), torch.zeros_like(batch.ids), (Step(x_t, t, x0, x0),))


@comparison(
    "decoupled_dmd_generator",
    "dmd2",
    "ca_time: gradient of both terms, with their own levels and normalisers",
    "their losses have no half: their gradient is twice ours; their guidance is w - 1",
)
def decoupled_dmd_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    names = {"renoise_time": "dm_time", "renoise": "dm_noise", "ca_noise": "ca_noise", "x_t": "x_t"}
    given = {ours: golden[theirs] for ours, theirs in names.items()} | {"ca_time": golden["ca_time"] / 0.75}
    networks = make_networks(RolloutPolicy(timesteps=(0.75,)))
    objective = OneStep(guidance_scale=4.5, renoise_time=WHOLE, ca_time=WHOLE)
    loss = objective.student_loss(networks, given_batch(given, golden["cond"], golden["uncond"])).total
    return 2 * gradient(networks.student, loss), golden["gradient"]


# --- implicit distribution alignment


@comparison("senseflow_ida", "dmd2", "ida_decay: the fake score's weights after a student update")
def senseflow_ida(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = make_networks(DMD2_STEPS)
    DMD2(ida_decay=float(golden["decay"])).finish(Turn("student", ("student",)), networks, {})
    return torch.cat([p.detach().flatten() for p in networks.fake_score.parameters()]), golden["weights"]
