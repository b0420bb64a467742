"""Phased DMD and AC-DMD against the authors' code."""

import dataclasses

import torch
from dmd_rows import WHOLE, beside, finished, gradient, make_networks
from golden_rows import GivenBatch, Golden, comparison, given_batch
from torch import Tensor

from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives import PhasedDMD
from fastgen.objectives.ac_dmd import ACDMD
from fastgen.objectives.phased_dmd import Phase
from fastgen.rollout import Rollout, RolloutPolicy, Step, transition
from fastgen.schedule import TimeSampler

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


# --- AC-DMD


AC_STEPS = RolloutPolicy(timesteps=(1.0, 0.75, 0.5, 0.25), transition="cps", eta=0.9)


class GivenRollout(ACDMD):
    """Step 1 of the student, from 0.75 to 0.5, from a given x_t."""

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        x_t = batch.normal("x_t")
        t, s = (torch.full((len(x_t),), level, dtype=x_t.dtype) for level in AC_STEPS.timesteps[1:3])
        with torch.set_grad_enabled(grad):
            x0 = networks.student(x_t, t, batch.cond)
            x_s = transition(networks.student.schedule, x0, x_t, t, s, batch.normal("exit"), AC_STEPS.transition_eta)
        return Rollout(x_s, s, torch.ones_like(batch.ids), (Step(x_t, t, x0, x_s),))


def ac_dmd_batch(golden: Golden, **given: Tensor) -> GivenBatch:
    given |= {"x_t": golden["x_t"], "exit": golden["exit"]}
    return given_batch(given, golden["cond"], golden["uncond"])


@comparison("ac_dmd_generator", "rtdmd", "matching loss of the student at x_s and its gradient (AC-DMD)")
def ac_dmd_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = make_networks(AC_STEPS)
    batch = ac_dmd_batch(golden, renoise_time=golden["u"], renoise=golden["noise"], back=golden["back"])
    loss = GivenRollout(guidance_scale=7.0).student_loss(networks, batch).total
    return beside(loss, gradient(networks.student, loss), golden)


@comparison(
    "ac_dmd_fake_score", "rtdmd", "loss of the fake score with the martingale product, and its gradient (AC-DMD)"
)
def ac_dmd_fake_score(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = make_networks(AC_STEPS)
    law = TimeSampler(low=0.001, high=0.2)
    steps = (golden["steps"].double() / 1000 - law.low) / (law.high - law.low)
    draws = {name: golden[name] for name in ("consistency1", "consistency2")}
    batch = ac_dmd_batch(golden, fake_time=golden["u"], fake_noise=golden["noise"], consistency_step=steps, **draws)
    loss = GivenRollout().fake_loss(networks, batch).total
    return beside(loss, gradient(networks.fake_score, loss), golden)
