"""TDM: trajectory distribution matching (Luo et al., arXiv 2503.06674; its code, Luo-Yihong/TDM).

    paper          here                  what it is
    f_theta        networks.student      few-step generator with deterministic steps
    s_phi, s_psi   teacher, fake_score   the frozen denoiser, guided, and that of the student's trajectory
    segment i      (s, t_i]              the levels of step i, from t_i = timesteps[i] to s = timesteps[i + 1], or 0
    x_s            rollout.x             the student's trajectory at the end of a segment
    tau            t                     a level within the segment, to which x_s is renoised
    K              policy.num_steps      the number of steps (TDM-unify: drawn for each update, and told)

The trajectory of the student is matched to the teacher's law at all its points, and not only at its end:
    L = sum_i sum_{tau in segment i} KL(p_student(x_tau | segment i) || p_tau)
The algorithm, for every student update:
    fake_updates times:
        x_s = ode rollout to the end of a random segment, without gradient
        fake_score  <- denoising loss at x_s renoised to tau
    once:
        x_s = the same, with gradient through the clean prediction x0 of the last step
        student     <- mean distance(x0, sg(x0 - d)) / mean|x0 - mu_real^w|,   d = (mu_fake - mu_real^w)(x_tau)

The student is sampled as an ODE, because its steps are deterministic and each ends in the law of its level. With
`rollout.step_counts` one student learns several numbers of steps. With `rollout.embedded_steps` student and fake score
are told which.

The fake score has two losses. x_s is not clean, so that its renoised law is not that of x0 noised to tau.
    segment   the unbiased target of Phased DMD (`signals.renoised_target`). The fake score is then the denoiser of the
              law of x_tau, and the teacher's own ODE is a fixed point of the method. This is the default (derived).
    clean     the released code's: the target is x0, the weight min(SNR, 5). With `importance` each sample also has the
              factor of `importance_weight`. Then the fake score is no denoiser of the law of x_tau, and the teacher's
              ODE is no fixed point (derived).

Departures. Our l2 distance has a half, as DMD2's. Levels are continuous and the grid is rollout.timesteps; the code's
grid is uniform, from step 899 of 1000. Its option to end a step at a random level of the segment is left out.
`condition_on_stop` (ours) conditions the fake score on the segment. `renoise_range: above`, where the segments
overlap, needs it.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.expert_levels import draw_levels
from fastgen.networks import Networks
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.objectives.fake_score import stop_input
from fastgen.registry import MOST_STEPS
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation, draw_stops, network_inputs, next_levels
from fastgen.schedule import PredictionType, Schedule, TimeSampler

GAP = 0.001  # the least distance of tau from s, one step of 1000: at s itself, `renoised_target` has no value
SNR_CLAMP = 5.0  # of min(SNR, 5), the weight of the clean target; the released code (row tdm_fake_score)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TDM(Objective):
    trained_roles = ("student", "fake_score")
    takes_inputs = True
    takes_chunks = True
    takes_step_counts = True

    page = "docs/dmd2_family.md"

    name: Literal["tdm"] = "tdm"
    # w of uncond + w (cond - uncond): 4.5 PixArt (the released command; row tdm_generator); 1 is off
    guidance_scale: Guidance = 1.0
    fake_updates: int = Field(default=1, ge=1, le=MOST_STEPS)  # the released code; a count: no row
    # the fake updates of a student update share one rollout, where rollouts are what takes the time; ours
    share_rollout: bool = False
    stops: Literal["shared", "per_sample"] = "per_sample"  # the released code draws a segment per sample
    # laws of tau, restricted to the segment. The released code: uniform from step max(20, s) to ten steps below t
    renoise_time: TimeSampler = TimeSampler(low=0.02, high=0.98)
    fake_time: TimeSampler = TimeSampler(low=0.02, high=0.98)
    # segment: between s and t (use_separate of the released command); above: between s and 1
    renoise_range: Literal["segment", "above"] = "segment"
    fake_target: Literal["segment", "clean"] = "segment"  # see above
    importance: bool = False  # the released code's, with fake_target: clean
    fake_space: PredictionType | None = None  # of the segment target's loss; None: the fake score's own type
    # min(1 / sigma_ts^2, clamp) of |sigma_ts (v - v*)|^2, of the segment target, as in Phased DMD (rtdmd_stage_1_fake)
    fake_clamp: float = Field(default=10.0, gt=0)
    # huber: sqrt(d^2 + c^2) - c of every element, the released command (use_huber); l2: its other loss
    distance: Literal["huber", "l2"] = "huber"
    huber_c: float = Field(default=1e-3, gt=0)  # in latents; the released code. The paper: 0.00054 sqrt(elements)
    normaliser_floor: float = Field(default=1e-6, gt=0)  # of mean|x0 - real|; ours
    condition_on_stop: bool = False  # ours, see above

    @model_validator(mode="after")
    def _losses(self) -> "TDM":
        if self.fake_target == "segment" and self.importance:
            raise ValueError(
                "importance reweighs the clean target, and the segment target needs no weights: set fake_target: "
                "clean, or leave importance out"
            )
        if self.fake_target == "clean" and (self.fake_space is not None or self.fake_clamp != 10):
            raise ValueError(
                "fake_space and fake_clamp are of the segment target; the clean one has the released code's loss of "
                "x0: leave them out"
            )
        if self.renoise_range == "above" and not self.condition_on_stop:
            raise ValueError(
                "with renoise_range: above the segments overlap, and one fake score would know only the mixture of "
                "their laws: set condition_on_stop: true"
            )
        return self

    def check(self, policy: RolloutPolicy) -> None:
        if policy.transition != "ode":
            raise ValueError(
                f"tdm matches a deterministic trajectory: set rollout.transition: ode, got {policy.transition}"
            )
        if self.condition_on_stop and policy.step_counts:
            raise ValueError(
                "condition_on_stop numbers the segments of one list of timesteps, and rollout.step_counts has "
                "several: leave out one of the two"
            )
        for steps in policies(policy):
            for t, s in zip(steps.timesteps, (*steps.timesteps[1:], 0.0), strict=True):
                for name, time in (("renoise_time", self.renoise_time), ("fake_time", self.fake_time)):
                    if s + GAP >= time.high or self.top(t) <= max(time.low, s + GAP):
                        raise ValueError(
                            f"{name}, from {time.low:g} to {time.high:g}, has no level in the segment from {s:g} to "
                            f"{t:g} of the {steps.num_steps} steps; widen {name}, or change rollout.timesteps"
                        )

    def top(self, t: float) -> float:
        """The highest level of tau for a step from t."""
        return t if self.renoise_range == "segment" else 1.0

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        fake_score = backbone.load("fake_score")
        counts = {"stop": policy.num_steps} if self.condition_on_stop else {}
        levels = ("num_steps",) if policy.embedded_steps else ()
        if counts or levels:
            fake_score.add_inputs(counts, backbone.time_dim, levels)
        return {"fake_score": fake_score}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        fake_turn = Turn("fake_score", ("fake_score",), self.fake_updates, one_rollout=self.share_rollout)
        return (fake_turn, Turn("student", ("student",)))

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        policy = drawn_policy(batch, networks.policy)
        return (self.student_loss if turn.name == "student" else self.fake_loss)(networks, batch, policy)

    def rollout(self, networks: Networks, batch: Batch, policy: RolloutPolicy, grad: bool) -> Rollout:
        """x_s at the end of a random segment, by deterministic steps."""
        stop = draw_stops(batch, policy.num_steps, shared=self.stops == "shared")
        end = next_levels(policy, stop, torch.empty(0, dtype=batch.dtype, device=stop.device))
        return backward_simulation(networks.student, policy, batch, stop, grad, to=end)

    def student_loss(self, networks: Networks, batch: Batch, policy: RolloutPolicy) -> Loss:
        """The surrogate of the score difference, of the executed step's clean prediction."""
        rollout = self.rollout(networks, batch, policy, grad=True)
        grad, terms = self.score_gradient(networks, batch, policy, rollout)
        total = signals.surrogate(rollout.steps[-1].x0, grad)
        return Loss(total, terms | {"loss": total.detach(), "dm_grad": grad.abs().mean()})

    @torch.no_grad()
    def score_gradient(
        self, networks: Networks, batch: Batch, policy: RolloutPolicy, rollout: Rollout
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The distance's gradient with respect to x0 [B, ...], and the terms of the fake score's lag."""
        teacher, x0 = networks.teacher, rollout.steps[-1].x0
        t = self.draw_tau(batch, "renoise_time", self.renoise_time, policy, rollout, teacher)
        noise = batch.normal("renoise")
        x_t = teacher.schedule.renoise(rollout.x, noise, rollout.s, t)
        fake = networks.fake_score(x_t, t, batch.cond, self.fake_inputs(policy, rollout))
        scale = teacher.per_expert(self.guidance_scale, t)
        real = signals.guided(teacher, x_t, t, batch.cond, batch.uncond, scale)
        grad = signals.score_difference(x0, fake, real, self.normaliser_floor)
        if self.distance == "huber":
            grad = grad / ((fake - real).square() + self.huber_c**2).sqrt()
        target = signals.renoised_target(teacher.schedule, rollout.x, noise, rollout.s, t)
        return grad, signals.lag_terms(target, fake, real)

    def fake_loss(self, networks: Networks, batch: Batch, policy: RolloutPolicy) -> Loss:
        """The denoising loss at the student's x_s, renoised, with either target."""
        schedule, fake_score = networks.teacher.schedule, networks.fake_score
        rollout = self.rollout(networks, batch, policy, grad=False)
        x, s, noise = rollout.x, rollout.s, batch.normal("fake_noise")
        t = self.draw_tau(batch, "fake_time", self.fake_time, policy, rollout, fake_score)
        x_t = schedule.renoise(x, noise, s, t)
        prediction = fake_score(x_t, t, batch.cond, self.fake_inputs(policy, rollout))
        if self.fake_target == "segment":
            target = signals.renoised_target(schedule, x, noise, s, t)
            weight = torch.where(s > 0, signals.renoised_weight(schedule, s, t, self.fake_clamp), 1.0)
            space = self.fake_space or fake_score.prediction_type
        else:
            target, space = rollout.steps[-1].x0, "sample"
            weight = (schedule.alpha(t) / schedule.sigma(t)).square().clamp_max(SNR_CLAMP)
            if self.importance:
                weight = weight * importance_weight(schedule, target, x_t, noise, t)
        loss = signals.denoising_loss(prediction, target, x_t, t, schedule, space, weight)
        return Loss(loss, {"loss": loss.detach()})

    def draw_tau(
        self, batch: Batch, name: str, time: TimeSampler, policy: RolloutPolicy, rollout: Rollout, network: Denoiser
    ) -> Tensor:
        """tau [B]: this law, given that it lies above the end of the sample's step and, with renoise_range: segment,
        below its beginning."""
        begin = rollout.s.new_tensor(policy.timesteps)[rollout.stop]
        top = begin if self.renoise_range == "segment" else torch.ones_like(begin)
        return draw_levels(batch, name, partial(time, within=(rollout.s + GAP, top)), network)

    def fake_inputs(self, policy: RolloutPolicy, rollout: Rollout) -> Inputs:
        """What the fake score is told of the student's trajectory: the segment, the number of steps, or neither."""
        told = stop_input(rollout.stop, self.condition_on_stop)
        return replace(told, num_steps=network_inputs(policy, rollout.s).num_steps)


def policies(policy: RolloutPolicy) -> list[RolloutPolicy]:
    """The samplers that are trained: one for each of the policy's step_counts, or the policy itself."""
    return [policy.with_steps(count) for count in policy.step_counts] or [policy]


def drawn_policy(batch: Batch, policy: RolloutPolicy) -> RolloutPolicy:
    """The sampler of this update, or with `batch.shared` that of the first call, whose rollout is kept."""
    choices = policies(policy)
    index = batch.integer("num_steps", len(choices))
    if batch.shared is not None:
        kept = batch.shared.setdefault("num_steps", index)
        assert isinstance(kept, int)
        index = kept
    return choices[index]


def importance_weight(schedule: Schedule, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """[B]: exp(-mean eta^2 / 2) / exp(-mean noise^2 / 2), with eta the noise that x_t holds around x0,

        eta = (x_t - alpha_t x0) / sigma_t = (alpha_ts sigma_s noise_hat + sigma_ts noise) / sigma_t,

    where x_t was renoised from x_s = alpha_s x0 + sigma_s noise_hat with `noise` (TDM's code). Its means, over a
    sample's elements, stand where the ratio of the two densities would have sums. With sums, the weighted fake score
    would be the denoiser of x0 noised to t directly (derived). x0, x_t, noise: [B, ...]; t: [B]."""
    eta = schedule.from_sample(x0, x_t, t, "epsilon")
    return (0.5 * signals.per_sample_mean(noise.square() - eta.square())).exp()
