"""AC-DMD, the first stage of RTDMD: every step is matched at the level it goes to    (arXiv 2605.26108, and its code).

    paper              here                   what it is
    G_theta            networks.student       few-step generator; its steps are stochastic (rollout.transition: cps)
    v_T                networks.teacher       frozen denoiser, guided
    v_phi              networks.fake_score    denoiser of the student's x_s, trained online
    K'                 rollout.stop           index of the step that is executed
    s = t_{K'+1}       rollout.s              the level that this step goes to; 0 for the last step
    x_s                rollout.x              the state at that level, not the clean prediction
    a, sigma_{t|s}     renoise_coefficients   x_t = a x_s + sigma_{t|s} noise,  t ~ U(s + .01, 1)
    h                  prediction             the fake score's clean prediction, a martingale of the reverse process
    eta                policy.transition_eta  eta of all transitions, including the two kinds of step below

The algorithm, for every student update:
    fake_updates times:
        x_s = rollout of the student, without gradient
        fake_score <- min(1, 10 sigma_{t|s}^2) |v - v*|^2 at x_t renoised from x_s, with the unbiased target v*
                      + consistency_weight (h(x1, t') - h(x_t, t)) (h(x2, t') - h(x_t, t)),  x1, x2 two steps t -> t'
    once:
        x_s = rollout of the student, with gradient through the last executed step
        x_s^F, x_s^T = one step t -> s of the fake score and of the teacher from the same x_t, with the same noise
        student    <- surrogate of g = (x_s^F - x_s^T) / mean|x_s - x_s^T|

The shared noise cancels in the difference, which is the difference of the clean predictions times a factor (derived):
    x_s^F - x_s^T = (alpha_s - sigma_s cos(eta pi / 2) alpha_t / sigma_t) (mu_fake - mu_real)
The noise does not cancel in the normaliser. At s = 0 the method is DMD. With `condition_on_stop` (ours) the fake score
is conditioned on the stop index, and every step is matched by itself, as in dmd2.py.

Tilting the critic (`critic_weight: inverse_tilt`, derived, not from a paper). The fake score's regression is weighted
by exp(-r(x) / beta), so that it learns the score of p_theta exp(-r / beta). The score difference g then vanishes where
p_theta is p_teacher exp(r / beta), whether g is normalised or not, and no gradient of r is needed. Because a reward is
defined on clean samples, the clean prediction of every step is matched, at s = 0, instead of its x_s.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch, Conditioning
from fastgen.modules.expert_levels import draw_levels
from fastgen.networks import Networks
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.objectives.fake_score import make_fake_score, stop_input
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation, draw_stops, next_levels, transition
from fastgen.schedule import Schedule, TimeSampler

# t ~ U(1000 s + 10, 1000) of 1000, clamped to [20, 980]; the released code. Golden rows: rtdmd_stage_1_*
MARGIN, LOW, HIGH = 0.01, 0.02, 0.98
WEIGHT_RANGE = 4.0  # the largest |log w| of inverse_tilt; ours


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ACDMD(Objective):
    takes_chunks = True

    # 7 SD3, 4.5 SD3.5, 3.5 FLUX.1, 4 FLUX.2-klein, in diffusers' convention; golden row: rtdmd_stage_1_student.
    # Several: one per expert of the teacher, from high noise to low
    guidance_scale: Guidance = 7.0
    fake_updates: int = Field(default=10, ge=1, le=MOST_STEPS)  # the released code: 10 in stage 1, 1 in stage 2
    # the fake updates of a student update share one rollout, where rollouts are what takes the time; ours
    share_rollout: bool = False
    # shared: one stop index per update, the released code. last: only the last step is matched, RTDMD's stage 2
    stops: Literal["shared", "per_sample", "last"] = "shared"
    condition_on_stop: bool = False  # ours, see above
    normalise: bool = True  # false: g without its normaliser, whose fixed points are known (ours)
    # the released code's, against min(1, 10 sigma^2) |v - v*|^2, both means over elements without a half; golden row:
    # rtdmd_stage_1_fake
    consistency_weight: float = Field(default=0.01, ge=0)
    consistency_step: TimeSampler = TimeSampler(low=0.001, high=0.2)  # t - t' ~ U{1..200} of 1000
    critic_weight: Literal["none", "inverse_tilt"] = "none"  # ours, see above
    reward_temperature: float | None = Field(default=None, gt=0)  # beta of inverse_tilt

    @model_validator(mode="after")
    def _temperature(self) -> "ACDMD":
        if (self.reward_temperature is not None) != (self.critic_weight == "inverse_tilt"):
            raise ValueError("reward_temperature belongs to critic_weight: inverse_tilt; give both, or neither")
        return self

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "fake_score")

    @property
    def rewards_required(self) -> bool:  # type: ignore[override]
        return self.critic_weight == "inverse_tilt"

    @property
    def reward_use(self) -> Literal["none", "score", "gradient"]:  # type: ignore[override]
        return "score" if self.critic_weight == "inverse_tilt" else "none"

    def check(self, policy: RolloutPolicy) -> None:
        if not policy.transition_eta:
            raise ValueError(
                f"{self.name} needs a student with stochastic steps; set rollout.transition: cps and rollout.eta: 0.9"
            )
        if max(policy.timesteps[1:], default=0) + MARGIN >= HIGH:
            raise ValueError(
                f"{self.name} renoises from the level a step goes to, up to {HIGH:g}, so that level must be below "
                f"{HIGH - MARGIN:g}; lower rollout.timesteps after the first"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        if self.critic_weight == "inverse_tilt" and self.group_size == 1 and recipe.train.batch_size == 1:
            raise ValueError(
                "critic_weight: inverse_tilt compares the rewards of a micro-batch, and train.batch_size is 1, so "
                "that every weight would be 1: raise it, better to 32, or give group_size"
            )

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        return {"fake_score": make_fake_score(backbone, policy, self.condition_on_stop)}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        fake_turn = Turn("fake_score", ("fake_score",), self.fake_updates, one_rollout=self.share_rollout)
        return (fake_turn, Turn("student", ("student",)))

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss | Iterator[Loss]:
        return self.student_loss(networks, batch) if turn.name == "student" else self.fake_loss(networks, batch)

    def fake_loss(self, networks: Networks, batch: Batch) -> Loss:
        """The denoising loss on the student's x_s with the unbiased target, plus the martingale product."""
        schedule = networks.teacher.schedule
        rollout = self.rollout(networks, batch, grad=False)
        t = draw_levels(batch, "fake_time", lambda u: renoise_level(u, rollout.s), networks.fake_score)
        noise = batch.normal("fake_noise")
        x_t = schedule.renoise(rollout.x, noise, rollout.s, t)
        target = signals.renoised_target(schedule, rollout.x, noise, rollout.s, t)
        weight = signals.renoised_weight(schedule, rollout.s, t)
        terms: dict[str, Tensor] = {}
        if self.critic_weight == "inverse_tilt":
            tilt = self.tilt_weight(networks, batch, rollout.x)
            weight = weight * tilt
            terms["weight_sample_size"] = tilt.mean().square() / tilt.square().mean()
        prediction = networks.fake_score(x_t, t, batch.cond, stop_input(rollout.stop, self.condition_on_stop))
        total = signals.denoising_loss(prediction, target, x_t, t, schedule, "flow_prediction", weight)
        terms["loss"] = total.detach()
        if self.consistency_weight:
            consistency = self.consistency(networks, batch, rollout, prediction, x_t, t)
            total = total + self.consistency_weight * consistency
            terms["consistency"] = consistency.detach()
        return Loss(total, terms)

    def consistency(
        self, networks: Networks, batch: Batch, rollout: Rollout, h: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """The martingale product from t to t' = t - U(.001, .2). t' is at least s, where the process ends (ours)."""

        def predict(x: Tensor, level: Tensor) -> Tensor:
            cond = Conditioning.cat([batch.cond, batch.cond])
            return networks.fake_score(x, level, cond, stop_input(rollout.stop.repeat(2), self.condition_on_stop))

        t_next = torch.maximum(t - self.consistency_step(batch.uniform("consistency_step")), rollout.s.clamp_min(1e-3))
        draws = (batch.normal("consistency1"), batch.normal("consistency2"))
        schedule = networks.fake_score.schedule
        eta = networks.policy.transition_eta
        return martingale_product(predict, schedule, h, x_t, t, t_next, draws, eta)

    def student_loss(self, networks: Networks, batch: Batch) -> Loss:
        """The surrogate of g at the student's x_s."""
        rollout = self.rollout(networks, batch, grad=True)
        grad, terms = self.score_gradient(networks, batch, rollout)
        total = signals.surrogate(rollout.x, grad)
        return Loss(total, terms | {"loss": total.detach()})

    @torch.no_grad()
    def score_gradient(self, networks: Networks, batch: Batch, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """g [B, ...] at the student's x_s, and the terms to log: the mean |g| and those of the fake score's lag."""
        schedule = networks.teacher.schedule
        s = rollout.s
        t = draw_levels(batch, "renoise_time", lambda u: renoise_level(u, s), networks.teacher)
        noise = batch.normal("renoise")
        x_t = schedule.renoise(rollout.x, noise, s, t)
        fake = networks.fake_score(x_t, t, batch.cond, stop_input(rollout.stop, self.condition_on_stop))
        scale = networks.teacher.per_expert(self.guidance_scale, t)
        real = signals.guided(networks.teacher, x_t, t, batch.cond, batch.uncond, scale)
        fresh = batch.normal("back")
        eta = networks.policy.transition_eta
        fake_s = transition(schedule, fake, x_t, t, s, fresh, eta)
        real_s = transition(schedule, real, x_t, t, s, fresh, eta)
        grad = signals.score_difference(rollout.x, fake_s, real_s) if self.normalise else fake_s - real_s
        target = signals.renoised_target(schedule, rollout.x, noise, s, t)
        return grad, {"dm_grad": grad.abs().mean()} | signals.lag_terms(target, fake, real)

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        """The student's x_s; with inverse_tilt its clean prediction, at s = 0."""
        stop = self.draw_stop(networks.policy, batch)
        if self.critic_weight == "inverse_tilt":
            to = None
        else:
            to = next_levels(networks.policy, stop, batch.ids.to(batch.dtype))
        return backward_simulation(networks.student, networks.policy, batch, stop, grad, to)

    def draw_stop(self, policy: RolloutPolicy, batch: Batch) -> Tensor:
        """The index of the step that is matched, [B]."""
        if self.stops == "last":
            return torch.full_like(batch.ids, policy.num_steps - 1)
        return draw_stops(batch, policy.num_steps, shared=self.stops == "shared")

    def tilt_weight(self, networks: Networks, batch: Batch, x: Tensor) -> Tensor:
        """The weights [B] of `inverse_tilt` at clean samples x. They are normalised within prompt groups or, where
        group_size is 1, over the micro-batch. The mean of n weights, a sample's own among them, stands for that of the
        law, so that the tilt of a small group or micro-batch is too weak, by a share of about 1 / n (derived)."""
        assert self.reward_temperature is not None and batch.group is not None
        score = networks.rewards(x, batch)
        group = batch.group if self.group_size > 1 else torch.zeros_like(batch.group)
        return inverse_tilt(score.value, score.valid, group, self.reward_temperature)


def renoise_level(u: Tensor, s: Tensor) -> Tensor:
    """t ~ U(s + .01, 1), clamped to [.02, .98], from a uniform draw u and the level s: [B] each."""
    start = s + MARGIN
    return (start + (1 - start) * u).clamp(LOW, HIGH)


def martingale_product(
    predict: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    h: Tensor,
    x_t: Tensor,
    t: Tensor,
    t_next: Tensor,
    draws: tuple[Tensor, Tensor],
    eta: float,
) -> Tensor:
    """mean (h(x1, t') - h) (h(x2, t') - h),   h = h(x_t, t),  x1, x2 two independent steps t -> t' from (x_t, sg h).

    It is an unbiased estimate of mean |E[h(x', t') | x_t] - h|^2, so its value on one batch may be negative
    (RTDMD's code, arXiv 2605.26108). The square of a single draw would add the variance of h(x', t').
    For the exact clean prediction and the ancestral step, cos(eta pi / 2) = alpha_t sigma_t' / (alpha_t' sigma_t), it
    is 0. With a fixed eta a bias remains, which is why the weight of this loss is small (derived).

    predict(x [2 B, ...], level [2 B]): the clean prediction; the rows of x1 come first, then those of x2.
    h, x_t, draws: [B, ...]; t, t_next: [B]. Returns a scalar.
    Gradient flows through all three predictions, but not through x1 and x2."""
    with torch.no_grad():
        x1 = transition(schedule, h, x_t, t, t_next, draws[0], eta)
        x2 = transition(schedule, h, x_t, t, t_next, draws[1], eta)
    h1, h2 = predict(torch.cat([x1, x2]), t_next.repeat(2)).chunk(2)
    return ((h1 - h) * (h2 - h)).mean()


def inverse_tilt(reward: Tensor, valid: Tensor, group: Tensor, temperature: float) -> Tensor:
    """The weights exp(-r / temperature), scaled to a mean of 1 within each group: [B], without gradient.

    Invalid samples get the weight 0, so they do not count. Relative to the group's mean reward the weights are clamped
    to e^{+-WEIGHT_RANGE}; beyond that range the tilt is weaker than exp(r / temperature).
    reward: [B]; valid: [B] bool; group: [B]."""
    with torch.no_grad():
        log_weight = (signals.group_mean(reward, group, valid) - reward) / temperature
        weight = torch.where(valid, log_weight.clamp(-WEIGHT_RANGE, WEIGHT_RANGE).exp(), 0.0)
        return weight / signals.group_mean(weight, group).clamp_min(1e-12)
