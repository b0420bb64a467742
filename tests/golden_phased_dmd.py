"""Phased DMD against the authors' code."""

import dataclasses

import torch
from dmd_rows import WHOLE, beside, finished, gradient, make_networks
from golden_rows import Golden, comparison, given_batch
from torch import Tensor

from fastgen.objectives import PhasedDMD
from fastgen.objectives.phased_dmd import Phase
from fastgen.rollout import RolloutPolicy

PHASES = (Phase(first=0, last=2, updates=1), Phase(first=2, last=4, updates=1))
PHASED_STEPS = RolloutPolicy(timesteps=(1.0, 0.8, 0.5, 0.25), transition="ode")


def in_phase(t: Tensor, s: float = 0.5) -> Tensor:
    """The uniform draw whose level, between s and 1, is t."""
    return (t - s) / (1 - s)


@comparison("phased_dmd_generator", "phased_dmd", "rollout of a phase, gradient: normalised, loss of the student")
def phased_dmd_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    given = {"initial": golden["initial"], "stop": golden["stop"], "renoise": golden["noise"]}
    given["renoise_time"] = in_phase(golden["t"])
    networks = make_networks(PHASED_STEPS)
    objective = PhasedDMD(phases=PHASES, experts=False, guidance_scale=4.0, renoise_time=WHOLE)
    loss = objective.student_loss(networks, given_batch(given, golden["cond"], golden["uncond"]), PHASES[0]).total
    return beside(loss, gradient(networks.student, loss), golden)


@comparison(
    "phased_dmd_fake_score",
    "phased_dmd",
    "loss of the fake score with the sub-interval target, and its gradient",
    "theirs has no clamp near s (fake_clamp)",
)
def phased_dmd_fake_score(golden: Golden) -> tuple[Tensor, Tensor]:
    given = {"fake_time": in_phase(golden["t"]), "fake_noise": golden["noise"]}
    rollout = finished(golden["x_s"])
    rollout = dataclasses.replace(rollout, s=torch.full_like(golden["t"], 0.5))
    batch = given_batch(given | {"stop": torch.tensor(0)}, golden["cond"], shared={"rollout": rollout})
    networks = make_networks(PHASED_STEPS)
    objective = PhasedDMD(phases=PHASES, experts=False, fake_time=WHOLE, fake_clamp=1e6)
    loss = objective.fake_loss(networks, batch, PHASES[0]).total
    return beside(loss, gradient(networks.fake_score, loss), golden)
