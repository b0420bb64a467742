"""CDM: continuous-time distribution matching (arXiv 2605.06376; constants and details from its code, byliutao/cdm).

    paper, code      here                     what it is
    sigma schedule   drawn_policy             levels 1 > t_1 > ... > t_{N-1}, drawn for every update, as is N
    x_k, v_k         steps[-1].x_t, .x0       a random point of the student's ode trajectory, and its prediction there
    cfg              guidance_gradient        guidance on the trajectory: (w - 1) (mu_real - mu_uncond) at t' < t_k
    ddm              score_gradient           matching on the trajectory: mu_fake - mu_real, without guidance
    cdm              off_loss                 matching off the trajectory, see below
    x_off            -                        x_k + (t_o - t_k) sg(v_k): along the student's own velocity to level t_o

The student is trained for no fixed list of levels. The trajectory of every update has 1 to 28 steps at random levels,
so that its velocity field has to serve all of them. It is also matched at points that no trajectory visits: from a
point of the trajectory its own velocity leads to x_off at an independent level t_o, above or below, and the prediction
there is matched to the teacher like the other. For every student update:
    fake_updates times:
        x0          =  the student's prediction at a random point of a random trajectory, without gradient
        fake_score  <- denoising loss on x0;  fake_score <- 0.999 fake_score + 0.001 student
    once:
        student     <- surrogates of (mu_fake - mu_real) / n  and  -(w - 1) (mu_real - mu_uncond) / n  at x0
        student     <- off_weight times the surrogate of (mu_fake - mu_real) / n  at the prediction from x_off

On the trajectory this is `dmd2` with `ca_time` (Decoupled DMD) on other rollouts. n = mean|x0 - mu_real|, 0.1 or more.

Departures. The code's losses are squares without a half: its gradient is twice ours. There, the last fake update and
the student's share a trajectory; here every update has its own, or the fake updates share one (`share_rollout`). The
off-trajectory term can be warmed up, as in LightX2V's code.
"""

from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import signals
from fastgen.batch import Batch
from fastgen.modules.expert_levels import SHARES, draw_levels
from fastgen.modules.inputs import unextended
from fastgen.networks import Networks, blend
from fastgen.objectives.base import Guidance, Loss, State, Turn
from fastgen.objectives.dmd2 import DMD2
from fastgen.registry import MOST_STEPS, MOST_UPDATES
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation, draw_stops, predict_x0, transition
from fastgen.schedule import TimeSampler

UNIFORM = TimeSampler(low=0.02, high=0.98, ends="clamp")  # U(0, 1), clamped: every law of the released code


@plain_dataclass(frozen=True)
class CDMTurn(Turn):
    """A turn of student update number `update`."""

    update: int = 0


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class CDM(DMD2):
    takes_chunks = False
    needs_whole_videos = "its points off the trajectory are made without the frames that a chunk was given"
    takes_step_counts = True

    takes_inner = False  # its steps off the list call the student without the noise of an inner flow
    name: Literal["cdm"] = "cdm"  # type: ignore[assignment]
    # w: the code's SD3 and LongCat have 7 times (cond - uncond) beside cond (row cdm_student). 1 and ca_time null: off
    guidance_scale: Guidance = 8.0
    fake_updates: int = Field(default=2, ge=1, le=MOST_STEPS)  # update_ratio of both released configs; a count: no row
    stops: Literal["shared", "per_sample"] = "per_sample"
    renoise_time: TimeSampler = UNIFORM
    fake_time: TimeSampler = UNIFORM
    normaliser_floor: float = Field(default=0.1, gt=0)  # in latents; the released code
    ca_time: TimeSampler | None = UNIFORM  # U(0, t_k), clamped
    ida_decay: float | None = Field(default=0.999, ge=0, lt=1)  # after every fake update; the released code
    least_steps: int = Field(default=1, ge=1, le=MOST_STEPS)  # of a trajectory; 1 to 28 in the released code
    most_steps: int = Field(default=28, ge=1, le=MOST_STEPS)
    inner_time: TimeSampler = TimeSampler(low=0.25, high=0.95)  # of its levels after the first; the released code
    off_weight: float = Field(default=1.0, ge=0)  # of the term off the trajectory; the released code (row cdm_student)
    off_time: TimeSampler = UNIFORM  # of t_o
    off_warmup: int = Field(default=0, ge=0, le=MOST_UPDATES)  # student updates; 200 in LightX2V's code

    @model_validator(mode="after")
    def _decoupled(self) -> "CDM":
        scales = self.guidance_scale if isinstance(self.guidance_scale, tuple) else (self.guidance_scale,)
        if (self.ca_time is None) != all(scale == 1 for scale in scales):
            raise ValueError(
                "cdm guides by the term of ca_time alone: with guidance_scale 1 set ca_time: null, and with another "
                "scale give ca_time"
            )
        if self.guidance_interval != (0, 1) or self.guidance_rescale:
            raise ValueError(
                "the guidance term is no guided prediction: leave out guidance_interval and guidance_rescale"
            )
        if self.ca_time is None and self.dm_weight != 1:
            raise ValueError("dm_weight weights the score difference against the guidance term: give ca_time too")
        return self

    @model_validator(mode="after")
    def _random(self) -> "CDM":
        if self.least_steps > self.most_steps:
            raise ValueError(f"least_steps {self.least_steps} is above most_steps {self.most_steps}; exchange them")
        if self.condition_on_stop or self.student_input != "simulated" or self.renoise_range != "all":
            raise ValueError(
                "the steps of a random trajectory have no numbers and no list of levels: leave out condition_on_stop, "
                "student_input and renoise_range"
            )
        if self.off_warmup and not self.off_weight:
            raise ValueError("off_warmup raises off_weight from 0, which is 0: leave off_warmup out")
        return self

    def check(self, policy: RolloutPolicy) -> None:
        if policy.transition != "ode" or policy.timesteps[0] != 1 or policy.conditioning_time is not None:
            raise ValueError(
                "cdm trains deterministic steps at random levels from 1 down: set rollout.transition: ode, begin "
                "rollout.timesteps with 1.0, and leave out conditioning_time"
            )
        if policy.two_time or policy.embedded_steps:
            raise ValueError(
                "a student of cdm does not know how its trajectory goes on: leave out rollout.two_time and "
                "embedded_steps"
            )
        time, low = self.ca_time, self.inner_time.low if self.most_steps > 1 else 1.0
        if time is not None and time.ends == "stretch" and time.high * low <= time.low:
            raise ValueError(
                f"ca_time leaves no noise level below {low:g}, the lowest of inner_time: low = {time.low} must be "
                f"below high * {low:g} = {time.high * low:g}"
            )

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        fake_turn, _ = super().turns(step, state)
        return (fake_turn, CDMTurn("student", ("student",), update=step))

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        if not isinstance(turn, CDMTurn):
            return self.fake_loss(networks, batch)
        rollout = self.rollout(networks, batch, grad=True)
        matching = self.matching_loss(networks, batch, rollout)
        if not self.off_weight:
            return matching
        off = self.off_loss(networks, batch, rollout)
        warm = min(1.0, (turn.update + 1) / (self.off_warmup + 1))
        total = matching.total + self.off_weight * warm * off
        return Loss(total, matching.terms | {"off": off.detach(), "loss": total.detach()})

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        if turn.name == "fake_score" and self.ida_decay is not None:
            blend(unextended(networks.fake_score), unextended(networks.student), self.ida_decay)

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        policy = self.drawn_policy(batch, networks.policy)
        stop = draw_stops(batch, policy.num_steps, shared=self.stops == "shared")
        return backward_simulation(networks.student, policy, batch, stop, grad)

    def drawn_policy(self, batch: Batch, policy: RolloutPolicy) -> RolloutPolicy:
        """The sampler of this update: N in [least_steps, most_steps]; level 1, and N - 1 draws of inner_time, sorted.

        They are shared by all samples and processes. Draws that coincide, one pair in 2^24, are one step."""
        count = self.least_steps + batch.integer("num_steps", self.most_steps - self.least_steps + 1)
        u = torch.tensor([batch.integer(f"level{i}", SHARES) for i in range(1, count)], dtype=torch.float64)
        inner = self.inner_time((u + 0.5) / SHARES).tolist()
        return replace(policy, timesteps=(1.0, *sorted(set(inner) - {1.0}, reverse=True)), step_counts=())

    def off_loss(self, networks: Networks, batch: Batch, rollout: Rollout) -> Tensor:
        """The surrogate of the score difference at the student's prediction from x_off, at levels of its own.

        Gradient flows through this prediction alone, not through x_off."""
        student, teacher, step = networks.student, networks.teacher, rollout.steps[-1]
        t_off = draw_levels(batch, "off_time", self.off_time, student)
        x_off = transition(student.schedule, step.x0.detach(), step.x_t, step.t, t_off, None).to(step.x_t.dtype)
        x0 = predict_x0(student, x_off, t_off, batch.cond, networks.policy)
        with torch.no_grad():
            t = draw_levels(batch, "off_renoise_time", self.renoise_time, teacher)
            x_t = teacher.schedule.add_noise(x0, batch.normal("off_renoise"), t)
            fake = networks.fake_score(x_t, t, batch.cond)
            grad = signals.score_difference(x0, fake, teacher(x_t, t, batch.cond), self.normaliser_floor)
        return signals.surrogate(x0, grad)
