"""SiD, SiDA and SiD-LSG against the authors' code."""

import torch
from dmd_rows import WHOLE, beside, finished, gradient, make_networks
from golden_rows import Golden, comparison, given_batch
from torch import Tensor

from fastgen.objectives import SiD
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import VPSchedule

ONE = RolloutPolicy(timesteps=(1.0,))
SUMS = "they sum over the d elements of a sample and over the batch: ours times d and the batch"


def generator(golden: Golden, objective: SiD) -> tuple[Tensor, Tensor]:
    """The loss of samples that the student makes in one step, and its gradient, times d and the batch."""
    given = {f"{name}_time": golden["t"] for name in ("renoise", "gan")}
    given |= {"renoise": golden["noise"], "gan_noise": golden["noise"], "initial": golden["initial"]}
    given["stop"] = torch.tensor(0)
    networks, batch = make_networks(ONE), given_batch(given, golden["cond"])
    loss = golden["initial"].numel() * objective.student_loss(networks, batch).total
    return loss, gradient(networks.student, loss)


@comparison("sid_generator", "sid", "loss of the student through both denoisers, and its gradient", SUMS)
def sid_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    return beside(*generator(golden, SiD(renoise_time=WHOLE)), golden)


@comparison("sid_generator_alpha", "sid", "the same with alpha 1.2", SUMS)
def sid_generator_alpha(golden: Golden) -> tuple[Tensor, Tensor]:
    return beside(*generator(golden, SiD(renoise_time=WHOLE, alpha=1.2)), golden)


@comparison(
    "sida_generator",
    "sid",
    "the same with the GAN's term, at the weights of the EDM runs",
    f"{SUMS}; half of each term there, and SiD's loss times 100; one sample at a time; one draw for both parts",
)
def sida_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    loss, grad = generator(golden, SiD(renoise_time=WHOLE, gan_time=WHOLE, gan_weight=1e-4))
    return beside(50 * loss, 50 * grad, golden)


@comparison(
    "sida_discriminator",
    "sid",
    "discriminator's loss, and its gradient in the fake score",
    "half of ours there, summed over the batch; without their weight by level; one sample at a time",
)
def sida_discriminator(golden: Golden) -> tuple[Tensor, Tensor]:
    given = {f"gan_{kind}_time": golden["t"] for kind in ("fake", "real")}
    given |= {f"gan_{kind}_noise": golden["noise"] for kind in ("fake", "real")}
    networks, batch = make_networks(ONE), given_batch(given, golden["cond"], latents=golden["real"])
    objective = SiD(gan_time=WHOLE, gan_weight=1.0)
    loss, _ = objective.discriminator_gan(networks, batch, finished(golden["x"]))
    loss = len(golden["x"]) / 2 * loss
    return beside(loss, gradient(networks.fake_score, loss), golden)


def step_level(step: Tensor) -> Tensor:
    """Discrete step i is the level (i + 1) / 1000."""
    return (step.double() + 1) / 1000


@comparison(
    "sid_lsg_generator",
    "sid",
    "loss of the student with kappa_2 = 3 and kappa_4 = 2, and its gradient in the samples",
    SUMS,
)
def sid_lsg_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    x = golden["x"].clone().requires_grad_()
    given = {"renoise_time": step_level(golden["step"]), "renoise": golden["noise"]}
    networks = make_networks(ONE, VPSchedule(golden["alphas_cumprod"]), "epsilon")
    batch = given_batch(given, golden["cond"], golden["uncond"])
    objective = SiD(guidance_scale=2.0, fake_guidance=3.0, prompt_dropout=0.1, renoise_time=WHOLE)
    loss = x.numel() * objective.matching_loss(networks, batch, finished(x)).total
    loss.backward()
    assert x.grad is not None
    return beside(loss, x.grad, golden)


@comparison("sid_lsg_fake", "sid", "loss of the fake score with kappa_1 = 2.5, and its gradient", SUMS)
def sid_lsg_fake(golden: Golden) -> tuple[Tensor, Tensor]:
    given = {"fake_time": step_level(golden["step"]), "fake_noise": golden["noise"]}
    networks = make_networks(ONE, VPSchedule(golden["alphas_cumprod"]), "epsilon")
    batch = given_batch(given, golden["cond"], golden["uncond"])
    objective = SiD(fake_guidance=2.5, fake_training_guidance=2.5, fake_time=WHOLE)
    loss = golden["x"].numel() * objective.fake_denoising(networks, batch, finished(golden["x"]))
    return beside(loss, gradient(networks.fake_score, loss), golden)
