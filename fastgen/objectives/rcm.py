"""rCM's distribution matching term (arXiv 2510.08431): DMD2 on rollouts of the consistency model at random levels.

    rCM's code                 here
    p_D                        simulation_time, renoise_time, fake_time
    max_simulation_steps_fake  simulation_steps
    dmd_fix_timesteps          simulation_time: null, the student's own levels
    student_update_freq 5      fake_updates 4: every fifth update is the student's

Everything else is `dmd2`. A consistency model is meant to be called at every level, so the levels of the backward
simulation are drawn for every sample: a running minimum of draws of p_D, from pure noise. The number of steps is drawn
for the update (the code counts through 1, ..., simulation_steps instead).

Departure: the fake score's loss has the weight 1 / t^2 of a flow-matching loss, and the code's is
(t^2 + (1 - t)^2) / t^2, that of TrigFlow. The optimum is the same at every level."""

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives.dmd2 import DMD2
from fastgen.registry import MOST_STEPS
from fastgen.rollout import Rollout, RolloutPolicy, Step, predict_x0
from fastgen.rollout.simulation import kept
from fastgen.schedule import TimeSampler

WAN = TimeSampler(low=0.0, high=1.0, shift=5.0)  # "UniformShift(shift=5.0)", rCM's code for Wan


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Matching(DMD2):
    """simulation_time: the law of the levels at which the student is called, after the first, pure noise; None: those
    of rollout.timesteps. simulation_steps: the most calls in a simulation. Row rcm_matching pins the simulation and
    its loss; the law's shift and the numbers of updates are the released code's, which nothing else pins."""

    fake_updates: int = Field(default=4, ge=1, le=MOST_STEPS)
    renoise_time: TimeSampler = WAN
    fake_time: TimeSampler = WAN
    normaliser_floor: float = Field(default=1e-5, gt=0)  # of a mean over elements, the code's
    simulation_time: TimeSampler | None = WAN
    simulation_steps: int = Field(default=4, ge=1, le=MOST_STEPS)  # the code's

    @model_validator(mode="after")
    def _shared(self) -> "Matching":
        levels = (self.condition_on_stop, self.stops, self.renoise_range, self.student_input)
        if self.simulation_time is not None and levels != (False, "shared", "all", "simulated"):
            raise ValueError(
                "stops, condition_on_stop, renoise_range and student_input speak of the student's own levels, and "
                "simulation_time draws others: leave them out, or set simulation_time: null"
            )
        return self

    def check(self, policy: RolloutPolicy) -> None:
        super().check(policy)
        if self.simulation_time is not None and policy.conditioning_time is not None:
            raise ValueError(
                "matching.simulation_time calls the student at random levels, which rollout.conditioning_time would "
                "hide from it: remove conditioning_time, or set simulation_time: null"
            )

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        if self.simulation_time is None:
            return super().rollout(networks, batch, grad)
        return kept(batch, grad, lambda: self.random_simulation(networks, batch, grad))

    def random_simulation(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        """The student's sampler with renoising at levels 1 > t_1 >= t_2 ..., t_i = min(draw, t_{i-1}) [B]. Only the
        last call has gradient, if `grad` is set."""
        assert self.simulation_time is not None
        student, policy = networks.student, networks.policy
        x = batch.normal("initial")
        t = x.new_ones(len(x))
        stop = batch.integer("stop", self.simulation_steps)
        for i in range(1, stop + 1):
            with torch.no_grad():
                x0 = predict_x0(student, x, t, batch.cond, policy)
            t = torch.minimum(self.simulation_time(batch.uniform(f"simulation_time{i}")), t)
            x = student.schedule.add_noise(x0, batch.normal(f"step{i}"), t).to(x.dtype)
        with torch.set_grad_enabled(grad):
            x0 = predict_x0(student, x, t, batch.cond, policy)
        stops = torch.full_like(batch.ids, stop)
        return Rollout(x0, torch.zeros_like(t), stops, (Step(x, t, x0, x0),))
