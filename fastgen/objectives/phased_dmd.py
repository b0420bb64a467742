"""Phased DMD: distribution matching phase by phase, on sub-intervals of the noise levels (arXiv 2510.27684).

    paper            here                     what it is
    phase, expert    Phase, networks.student  steps [first, last) of the sampler, with one expert network per phase
                                              (`modules.experts.Experts`)
    s                rollout.s                the level a phase ends at: timesteps[last], or 0
    x_s              rollout.x                the student's sample at level s, not a clean one
    v_r, v_f         teacher, fake_score      velocities of the frozen teacher, guided, and of the fake score
    alpha_ts         renoise_coefficients     the kernel from level s to t: x_t = alpha_ts x_s + sigma_ts noise

The algorithm. Phases are trained one after the other, from high noise to low, each for its number of updates. When a
phase begins, the fake score is reset to the teacher, and the experts of earlier phases stay as they are. Every update:
    fake_updates times:
        x_s = rollout through the earlier phases and this one, without gradient
        fake_score  <- denoising loss at t in (s, 1), with the sub-interval target: x_s is not clean, and the naive
                       target noise - x_s / alpha_s would teach the fake score a law that is not that of x_t
    once:
        x_s = rollout, with gradient through a random step of this phase, which goes straight to s (SGTS)
        student     <- surrogate of w (v_r - v_f) at x_s renoised to t in (s, 1)          ("reverse nested" intervals)

In the last phase s = 0, the target is x0, and the method is DMD2. The earlier phases only have to match noised laws,
which are simpler.

Departures. The default, `gradient: normalised`, is LightX2V's: DMD2's normalised difference of clean predictions,
applied to the clean prediction of the executed step. (Applied to x_s, it would weigh a deterministic step from t to s
by (t - s) / t.) `gradient: paper` is w (v_r - v_f), the gradient of the KL divergence at level t with respect to x_s.
`condition_on_stop` (ours) conditions the fake score on the step that made its input, as in DMD2. Learning rates warm
up and decay again in every phase (ours). The boundary between two experts lies halfway between the last level at which
one is called and the first level at which the next is called (ours). Rounding in a stored step list cannot move a
level across that boundary, as it could if the boundary were s or the level of a call.
"""

import itertools
from dataclasses import dataclass as plain_dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import Denoiser
from fastgen.modules.expert_levels import draw_levels
from fastgen.modules.experts import Experts
from fastgen.networks import Networks
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn, extended
from fastgen.objectives.fake_score import make_fake_score, stop_input
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS, MOST_UPDATES
from fastgen.rollout import Rollout, RolloutPolicy, Step, backward_simulation, draw_stops, predict_x0, step_to
from fastgen.schedule import PredictionType, Schedule, TimeSampler


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Phase:
    """The steps first <= i < last of rollout.timesteps, trained for `updates` student updates."""

    first: int = Field(ge=0, le=MOST_STEPS)
    last: int = Field(ge=1, le=MOST_STEPS)
    updates: int = Field(ge=1, le=MOST_UPDATES)


@plain_dataclass(frozen=True)
class PhaseTurn(Turn):
    """A turn of phase number `phase`."""

    phase: int = 0


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class PhasedDMD(Objective):
    examples = (
        {"phases": [{"first": 0, "last": 2, "updates": 1}, {"first": 2, "last": 4, "updates": 1}]},
        {"phases": [{"first": 0, "last": 1, "updates": 1}]},
    )
    name: Literal["phased_dmd"] = "phased_dmd"
    phases: tuple[Phase, ...] = Field(min_length=1)  # the paper: 4 steps in 2 phases
    experts: bool = True  # one network per phase; False: one network for all, which later phases keep changing (ours)
    # w of uncond + w (cond - uncond): 4 LightX2V's Wan 2.2 (row phased_dmd_generator); 1 is off. Several: one per
    # expert of the teacher, from high noise to low
    guidance_scale: Guidance = 1.0
    random_exit: bool = True  # SGTS; False: gradient through all steps of the phase
    stops: Literal["shared", "per_sample"] = "shared"  # shared: one exit step per update
    fake_updates: int = Field(default=5, ge=1, le=MOST_STEPS)  # the paper; a count: no row
    # the fake updates of a student update share one rollout, where rollouts are what takes the time; ours
    share_rollout: bool = False
    # law of (t - s) / (1 - s), ours. LightX2V draws t from s + 0.02 to 0.98, before its shift; nothing pins this one
    renoise_time: TimeSampler = TimeSampler(low=0.02, high=0.98)
    fake_time: TimeSampler = TimeSampler(low=0.001, high=0.999)  # law of (t - s) / (1 - s); ours, the interval of DMD2
    fake_space: PredictionType | None = None  # the space of the fake score's loss; None: its own prediction type
    # min(1 / sigma_ts^2, clamp) of |sigma_ts (v - v*)|^2, a mean without a half: RTDMD (row rtdmd_stage_1_fake).
    # LightX2V has no clamp (row phased_dmd_fake_score); none at s = 0 (ours)
    fake_clamp: float = Field(default=10.0, gt=0)
    condition_on_stop: bool = False  # ours, see above
    gradient: Literal["normalised", "paper"] = "normalised"  # see above
    normaliser_floor: float = Field(default=1e-4, gt=0)  # of mean|x0 - real|, LightX2V (row phased_dmd_generator)

    @field_validator("phases")
    @classmethod
    def _contiguous(cls, value: tuple[Phase, ...]) -> tuple[Phase, ...]:
        edges = [p.last for p in value]
        if [p.first for p in value] != [0, *edges[:-1]] or any(p.first >= p.last for p in value):
            given = ", ".join(f"[{p.first}, {p.last})" for p in value)
            raise ValueError(
                "phases are ranges of steps [first, last); the first must begin at 0 and each other one where the one "
                f"before it ends; got {given}"
            )
        return value

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "fake_score")

    @property
    def takes_chunks(self) -> bool:  # type: ignore[override]
        return self.random_exit

    @property
    def needs_whole_videos(self) -> str:  # type: ignore[override]
        return "without random_exit, gradient flows through several steps of a whole video; set random_exit: true"

    @model_validator(mode="after")
    def _one_rollout(self) -> "PhasedDMD":
        if self.share_rollout and not self.random_exit:
            raise ValueError(
                "share_rollout keeps the rollout of a random exit, and without random_exit the later steps of a phase "
                "would be made anew: leave share_rollout out, or set random_exit: true"
            )
        return self

    @property
    def num_updates(self) -> int:
        """The student updates of all phases together."""
        return sum(phase.updates for phase in self.phases)

    def boundaries(self, policy: RolloutPolicy) -> tuple[float, ...]:
        """For each two consecutive phases, the level below which the later expert is called."""
        t = policy.timesteps
        return tuple((t[phase.last - 1] + t[phase.last]) / 2 for phase in self.phases[:-1])

    def check(self, policy: RolloutPolicy) -> None:
        if self.phases[-1].last != policy.num_steps:
            raise ValueError(
                f"phases must cover all {policy.num_steps} rollout.timesteps, but the last one ends before step "
                f"{self.phases[-1].last}"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        if recipe.train.steps != self.num_updates:
            raise ValueError(
                f"the updates of phases add up to {self.num_updates}, but train.steps is "
                f"{recipe.train.steps}; make them equal"
            )
        pipeline_boundaries = recipe.backbone.own_boundaries()
        if not self.experts or len(self.phases) == 1 or pipeline_boundaries is None:
            return
        if pipeline_boundaries:
            self.check_pipeline_experts(pipeline_boundaries, recipe.rollout)
        elif "student" in recipe.lora:
            raise ValueError(
                "experts that are adapters need a pipeline that itself has experts; set experts: false, "
                "or remove lora.student"
            )
        else:
            recipe.backbone.check_experts(self.boundaries(recipe.rollout))

    def check_pipeline_experts(self, boundaries: tuple[float, ...], policy: RolloutPolicy) -> None:
        """Raises ValueError unless phase i calls expert i of the pipeline and no other, and every expert has a phase.

        boundaries: the levels between the pipeline's experts, decreasing."""
        # called[i] lists the index of the expert that is called at each step of phase i
        called = [[sum(t < b for b in boundaries) for t in policy.timesteps[p.first : p.last]] for p in self.phases]
        wanted = [[i] * (p.last - p.first) for i, p in enumerate(self.phases)]
        if called != wanted or len(called) != len(boundaries) + 1:
            raise ValueError(
                f"phases must match the pipeline's experts, whose boundaries are {list(boundaries)}; with these "
                f"timesteps the phases call the experts {called}, and phase i must call expert i alone"
            )

    def make_student(self, backbone: Backbone, policy: RolloutPolicy) -> Denoiser:
        """The pipeline's own experts, where it has some; otherwise one copy of its network per phase."""
        return extended(self.make_experts(backbone, policy), backbone, policy)

    def make_experts(self, backbone: Backbone, policy: RolloutPolicy) -> Denoiser:
        student = backbone.load("student")
        if not self.experts or len(self.phases) == 1:
            return student
        if student.boundaries:
            self.check_pipeline_experts(student.boundaries, policy)
            return student
        if student.is_adapter:
            raise ValueError("experts that are adapters need a pipeline that itself has experts")
        copies = [backbone.load("student") for _ in self.phases[1:]]
        return Experts([student, *copies], self.boundaries(policy))

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        return {"fake_score": make_fake_score(backbone, policy, self.condition_on_stop)}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        starts = [0, *itertools.accumulate(phase.updates for phase in self.phases[:-1])]  # first update of each phase
        k = sum(step >= start for start in starts) - 1
        progress = (step - starts[k], self.phases[k].updates)
        reset = ("fake_score",) if step == starts[k] else ()
        fake_turn = PhaseTurn(
            "fake_score", ("fake_score",), self.fake_updates, reset, progress, one_rollout=self.share_rollout, phase=k
        )
        student_turn = PhaseTurn("student", ("student",), progress=progress, phase=k)
        return (fake_turn, student_turn)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert isinstance(turn, PhaseTurn)
        phase = self.phases[turn.phase]
        if turn.name == "student":
            return self.student_loss(networks, batch, phase)
        return self.fake_loss(networks, batch, phase)

    def rollout(self, networks: Networks, batch: Batch, phase: Phase, grad: bool) -> Rollout:
        """x_s at the phase's end. With random_exit one random step of the phase goes straight there; otherwise the
        steps of the phase follow one after the other."""
        student = networks.student
        policy = networks.policy
        levels = (*policy.timesteps, 0.0)

        def level_of(step: int) -> Tensor | None:
            """The level at which this step starts, [B]; None after the last step, for a clean prediction."""
            return torch.full_like(batch.ids, levels[step], dtype=batch.dtype) if levels[step] else None

        if self.random_exit:
            stop = phase.first + draw_stops(batch, phase.last - phase.first, shared=self.stops == "shared")
            return backward_simulation(student, policy, batch, stop, grad, to=level_of(phase.last))
        stop = torch.full_like(batch.ids, phase.first)
        rollout = backward_simulation(student, policy, batch, stop, grad, to=level_of(phase.first + 1))
        with torch.set_grad_enabled(grad):
            for i in range(phase.first + 1, phase.last):
                x = rollout.x
                t = rollout.s
                x0 = predict_x0(student, x, t, batch.cond, policy).to(x.dtype)
                s = level_of(i + 1)
                if s is None:
                    x_next = x0
                    s = torch.zeros_like(t)
                else:
                    draw = partial(batch.normal, f"step{i + 1}")
                    x_next = step_to(student.schedule, policy, x0, x, t, s, draw)
                rollout = Rollout(x_next, s, stop + i - phase.first, (Step(x, t, x0, x_next),))
        return rollout

    def student_loss(self, networks: Networks, batch: Batch, phase: Phase) -> Loss:
        """The surrogate of the score difference, of the executed step's clean prediction or, for `paper`, of x_s."""
        rollout = self.rollout(networks, batch, phase, grad=True)
        grad, terms = self.score_gradient(networks, batch, rollout)
        total = signals.surrogate(rollout.x if self.gradient == "paper" else rollout.steps[-1].x0, grad)
        return Loss(total, terms | {"loss": total.detach(), "dm_grad": grad.abs().mean()})

    def fake_loss(self, networks: Networks, batch: Batch, phase: Phase) -> Loss:
        """The denoising loss on the student's x_s, with the sub-interval target."""
        schedule = networks.teacher.schedule
        fake_score = networks.fake_score
        rollout = self.rollout(networks, batch, phase, grad=False)
        x, s = rollout.x, rollout.s
        noise = batch.normal("fake_noise")
        t = draw_levels(batch, "fake_time", lambda u: s + (1 - s) * self.fake_time(u), fake_score)
        x_t = schedule.renoise(x, noise, s, t)
        target = signals.renoised_target(schedule, x, noise, s, t)
        prediction = fake_score(x_t, t, batch.cond, stop_input(rollout.stop, self.condition_on_stop))
        weight = torch.where(s > 0, signals.renoised_weight(schedule, s, t, self.fake_clamp), 1.0)
        space = self.fake_space or fake_score.prediction_type
        loss = signals.denoising_loss(prediction, target, x_t, t, schedule, space, weight)
        return Loss(loss, {"loss": loss.detach()})

    @torch.no_grad()
    def score_gradient(self, networks: Networks, batch: Batch, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient [B, ...] with respect to x_s (paper) or to the step's clean prediction (normalised), and the
        terms of the fake score's lag."""
        teacher = networks.teacher
        schedule = teacher.schedule
        s = rollout.s
        noise = batch.normal("renoise")
        t = draw_levels(batch, "renoise_time", lambda u: s + (1 - s) * self.renoise_time(u), networks.teacher)
        x_t = schedule.renoise(rollout.x, noise, s, t)
        fake = networks.fake_score(x_t, t, batch.cond, stop_input(rollout.stop, self.condition_on_stop))
        scale = teacher.per_expert(self.guidance_scale, t)
        real = signals.guided(teacher, x_t, t, batch.cond, batch.uncond, scale)
        terms = signals.lag_terms(signals.renoised_target(schedule, rollout.x, noise, s, t), fake, real)
        if self.gradient == "paper":
            return velocity_gradient(schedule, x_t, s, t, fake, real), terms
        return signals.score_difference(rollout.steps[-1].x0, fake, real, self.normaliser_floor), terms


def velocity_gradient(
    schedule: Schedule, x_t: Tensor, s: Tensor, t: Tensor, fake_x0: Tensor, real_x0: Tensor
) -> Tensor:
    """The gradient of KL(student || teacher) at level t with respect to x_s, from two clean predictions at x_t.

        w (v_r - v_f) = -alpha_ts (s_r - s_f),   w = alpha_t alpha_ts / (alpha_t sigma_t + sigma_t^2)

    with v = noise - x0 and scores s_r, s_f                                             (Phased DMD, arXiv 2510.27684)
    x_t, fake_x0, real_x0: [B, ...]; s < t: [B]. Returns [B, ...]."""
    alpha, sigma = schedule.coefficients(t, x_t)
    ratio, _ = schedule.renoise_coefficients(s, t, x_t)
    real = schedule.from_sample(real_x0, x_t, t, "flow_prediction")
    fake = schedule.from_sample(fake_x0, x_t, t, "flow_prediction")
    return alpha * ratio / (alpha * sigma + sigma**2) * (real - fake)
