"""Phased DMD: distribution matching phase by phase, on sub-intervals of the noise levels (arXiv 2510.27684).

    paper            here                     what it is
    phase, expert    Phase, networks.student  steps [first, last) of the sampler; an expert each (`denoiser.Experts`)
    s                rollout.s                the level a phase ends at: timesteps[last], or 0
    x_s              rollout.x                student sample at level s, no cleaner
    v_r, v_f         teacher, fake_score      velocities of the frozen teacher, guided, and of the fake score
    alpha_ts         renoise_coefficients     the kernel from level s to t: x_t = alpha_ts x_s + sigma_ts noise

The algorithm. Phases are trained one after the other, from high noise to low, each for its number of updates; when a
phase begins, the fake score is the teacher again, and the experts of earlier phases stay as they are. Every update:
    fake_updates times:
        x_s = rollout through the earlier phases and this one, no gradient
        fake_score  <- denoising loss at t in (s, 1), with the sub-interval target: x_s is not clean, and the naive
                       target noise - x_s / alpha_s would teach the fake score a law that is not that of x_t
    once:
        x_s = rollout, gradient through a random step of this phase, which goes straight to s (SGTS)
        student     <- surrogate of w (v_r - v_f) at x_s renoised to t in (s, 1)          ("reverse nested" intervals)

At s = 0 the target is x0 and this is DMD2; the phases before it only have to reach the noised laws, which are simpler.

Departures. `gradient: normalised`, the default, is DMD2's normalised difference of clean predictions pulled through
x_s, as in LightX2V; `paper` is w (v_r - v_f), the gradient of the KL divergence at t itself. `condition_on_stop`
(ours) tells the fake score which step made its input, as in DMD2. Learning rates warm up and decay in every phase anew
(ours). The level between two experts lies halfway between the last call of one and the first of the next (ours):
rounding of a stored step list cannot reach it, as it could reach s or the level of a call.
"""

import itertools
from dataclasses import dataclass as plain_dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import Denoiser
from fastgen.modules.experts import Experts
from fastgen.networks import Networks
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.objectives.fake_score import make_fake_score, stop_input
from fastgen.recipe import Recipe
from fastgen.rollout import Rollout, RolloutPolicy, Step, backward_simulation, draw_stops, predict_x0, step_to
from fastgen.schedule import PredictionType, Schedule, TimeSampler


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Phase:
    """The steps first <= i < last of rollout.timesteps, trained for `updates` student updates."""

    first: int = Field(ge=0)
    last: int = Field(ge=1)
    updates: int = Field(ge=1)


@plain_dataclass(frozen=True)
class PhaseTurn(Turn):
    """A turn of phase number `phase`."""

    phase: int = 0


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class PhasedDMD(Objective):
    name: Literal["phased_dmd"] = "phased_dmd"
    phases: tuple[Phase, ...] = Field(min_length=1)  # the paper: 4 steps in 2 phases
    experts: bool = True  # a network a phase; False: one for all, which later phases go on changing (ours)
    # 4 LightX2V's Wan 2.2; 1 is off. Several: one an expert of the teacher, from high noise to low
    guidance_scale: Guidance = 1.0
    random_exit: bool = True  # SGTS; False: gradient through all steps of the phase
    stops: Literal["shared", "per_sample"] = "shared"  # shared: one exit an update
    fake_updates: int = Field(default=5, ge=1)  # the paper
    renoise_time: TimeSampler = TimeSampler(low=0.02, high=0.98)  # as the fraction (t - s) / (1 - s); 20..980 LightX2V
    fake_time: TimeSampler = TimeSampler(low=0.001, high=0.999)  # likewise; the interval ours, as DMD2's
    fake_space: PredictionType | None = None  # space of the fake score's loss; None: its own prediction type
    fake_clamp: float = Field(default=10.0, gt=0)  # min(1 / sigma_ts^2, clamp), RTDMD's code; none at s = 0 (ours)
    condition_on_stop: bool = False  # ours, see above
    gradient: Literal["normalised", "paper"] = "normalised"
    normaliser_floor: float = Field(default=1e-4, gt=0)  # LightX2V

    @field_validator("phases")
    @classmethod
    def _contiguous(cls, value: tuple[Phase, ...]) -> tuple[Phase, ...]:
        edges = [p.last for p in value]
        if [p.first for p in value] != [0, *edges[:-1]] or any(p.first >= p.last for p in value):
            given = ", ".join(f"[{p.first}, {p.last})" for p in value)
            raise ValueError(
                "phases are ranges of steps [first, last), each beginning where the one before ends, "
                f"from 0 on; got {given}"
            )
        return value

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "fake_score")

    @property
    def num_updates(self) -> int:
        return sum(phase.updates for phase in self.phases)

    def boundaries(self, policy: RolloutPolicy) -> tuple[float, ...]:
        """Between each two phases, the level below which the later expert is called."""
        t = policy.timesteps
        return tuple((t[phase.last - 1] + t[phase.last]) / 2 for phase in self.phases[:-1])

    def check(self, policy: RolloutPolicy) -> None:
        if self.phases[-1].last != policy.num_steps:
            raise ValueError(
                f"phases must cover all {policy.num_steps} rollout.timesteps; they end before step "
                f"{self.phases[-1].last}"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        if recipe.train.steps != self.num_updates:
            raise ValueError(
                f"the updates of phases add up to {self.num_updates} and train.steps is "
                f"{recipe.train.steps}; make them equal"
            )
        own = recipe.backbone.own_boundaries()
        if not self.experts or len(self.phases) == 1 or own is None:
            return
        if own:
            self.check_own(own, recipe.rollout)
        elif "student" in recipe.lora:
            raise ValueError(
                "experts that are adapters need a pipeline that has experts itself; set experts: false, "
                "or remove lora.student"
            )
        else:
            recipe.backbone.check_experts(self.boundaries(recipe.rollout))

    def check_own(self, own: tuple[float, ...], policy: RolloutPolicy) -> None:
        """Raises ValueError unless each of the pipeline's own experts is called in one phase, and in that alone."""
        called = [[sum(t < b for b in own) for t in policy.timesteps[p.first : p.last]] for p in self.phases]
        if called != [[i] * (p.last - p.first) for i, p in enumerate(self.phases)] or len(called) != len(own) + 1:
            raise ValueError(
                f"phases have to be the pipeline's experts, whose boundaries are {list(own)}: with these "
                f"timesteps its phases call the experts {called}"
            )

    def make_student(self, backbone: Backbone, policy: RolloutPolicy) -> Denoiser:
        """The pipeline's own experts, where it has some; else a copy of its network a phase."""
        student = backbone.load("student")
        if not self.experts or len(self.phases) == 1:
            return student
        if student.boundaries:
            self.check_own(student.boundaries, policy)
            return student
        if student.is_adapter:
            raise ValueError("experts that are adapters need a pipeline that has experts itself")
        copies = [backbone.load("student") for _ in self.phases[1:]]
        return Experts([student, *copies], self.boundaries(policy))

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        return {"fake_score": make_fake_score(backbone, policy, self.condition_on_stop)}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        starts = [0, *itertools.accumulate(phase.updates for phase in self.phases)][: len(self.phases)]
        k = sum(step >= start for start in starts) - 1
        progress = (step - starts[k], self.phases[k].updates)
        reset = ("fake_score",) if step == starts[k] else ()
        fake = PhaseTurn("fake_score", ("fake_score",), self.fake_updates, reset, progress, phase=k)
        return (fake, PhaseTurn("student", ("student",), progress=progress, phase=k))

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert isinstance(turn, PhaseTurn)
        phase = self.phases[turn.phase]
        return (self.student_loss if turn.name == "student" else self.fake_loss)(networks, batch, phase)

    def rollout(self, networks: Networks, batch: Batch, phase: Phase, grad: bool) -> Rollout:
        """x_s at the phase's end: its random step goes straight there, or its steps one after the other."""
        student, policy, levels = networks.student, networks.policy, (*networks.policy.timesteps, 0.0)

        def to(step: int) -> Tensor | None:
            return torch.full_like(batch.ids, levels[step], dtype=batch.dtype) if levels[step] else None

        if self.random_exit:
            stop = phase.first + draw_stops(batch, phase.last - phase.first, shared=self.stops == "shared")
            return backward_simulation(student, policy, batch, stop, grad, to=to(phase.last))
        stop = torch.full_like(batch.ids, phase.first)
        rollout = backward_simulation(student, policy, batch, stop, grad, to=to(phase.first + 1))
        with torch.set_grad_enabled(grad):
            for i in range(phase.first + 1, phase.last):
                x, t, t_next = rollout.x, rollout.s, to(i + 1)
                x0 = predict_x0(student, x, t, batch.cond, policy).to(x.dtype)
                draw = partial(batch.normal, f"step{i + 1}")
                x_next = x0 if t_next is None else step_to(student.schedule, policy, x0, x, t, t_next, draw)
                s = torch.zeros_like(t) if t_next is None else t_next
                rollout = Rollout(x_next, s, stop + i - phase.first, (Step(x, t, x0, x_next),))
        return rollout

    def student_loss(self, networks: Networks, batch: Batch, phase: Phase) -> Loss:
        rollout = self.rollout(networks, batch, phase, grad=True)
        grad, lag = self.score_gradient(networks, batch, rollout)
        total = signals.surrogate(rollout.x, grad)
        return Loss(total, {"loss": total.detach(), "dm_grad": grad.abs().mean(), "fake_lag": lag})

    def fake_loss(self, networks: Networks, batch: Batch, phase: Phase) -> Loss:
        schedule, fake_score = networks.teacher.schedule, networks.fake_score
        rollout = self.rollout(networks, batch, phase, grad=False)
        x, s, noise = rollout.x, rollout.s, batch.normal("fake_noise")
        t = s + (1 - s) * self.fake_time(batch.uniform("fake_time"))
        x_t, target = schedule.renoise(x, noise, s, t), signals.renoised_target(schedule, x, noise, s, t)
        prediction = fake_score(x_t, t, batch.cond, stop_input(rollout.stop, self.condition_on_stop))
        weight = torch.where(s > 0, signals.renoised_weight(schedule, s, t, self.fake_clamp), 1.0)
        space = self.fake_space or fake_score.prediction_type
        loss = signals.denoising_loss(prediction, target, x_t, t, schedule, space, weight)
        return Loss(loss, {"loss": loss.detach()})

    @torch.no_grad()
    def score_gradient(self, networks: Networks, batch: Batch, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The gradient at x_s [B, ...], and the fake score's lag."""
        teacher, schedule, s, noise = networks.teacher, networks.teacher.schedule, rollout.s, batch.normal("renoise")
        t = s + (1 - s) * self.renoise_time(batch.uniform("renoise_time"))
        x_t = schedule.renoise(rollout.x, noise, s, t)
        fake = networks.fake_score(x_t, t, batch.cond, stop_input(rollout.stop, self.condition_on_stop))
        scale = teacher.per_expert(self.guidance_scale, t)
        real = signals.guided(teacher, x_t, t, batch.cond, batch.uncond, scale)
        lag = signals.score_lag(signals.renoised_target(schedule, rollout.x, noise, s, t), fake, real)
        if self.gradient == "paper":
            return velocity_gradient(schedule, x_t, s, t, fake, real), lag
        return signals.score_difference(rollout.steps[-1].x0, fake, real, self.normaliser_floor), lag


def velocity_gradient(
    schedule: Schedule, x_t: Tensor, s: Tensor, t: Tensor, fake_x0: Tensor, real_x0: Tensor
) -> Tensor:
    """The gradient of KL(student || teacher) at level t with respect to x_s, by two clean predictions at x_t.

        w (v_r - v_f) = -alpha_ts (s_r - s_f),   w = alpha_t alpha_ts / (alpha_t sigma_t + sigma_t^2)

    with v = noise - x0 and scores s_r, s_f                                             (Phased DMD, arXiv 2510.27684)
    x_t, fake_x0, real_x0: [B, ...]; s < t: [B]. Returns [B, ...]."""
    alpha, sigma = schedule.coefficients(t, x_t)
    ratio, _ = schedule.renoise_coefficients(s, t, x_t)
    real, fake = (schedule.from_sample(x0, x_t, t, "flow_prediction") for x0 in (real_x0, fake_x0))
    return alpha * ratio / (alpha * sigma + sigma**2) * (real - fake)
