"""RTDMD against closed forms: the field and the fake score above level 0, the martingale product, the hybrid policy
gradient, and what both stages converge to on Gaussians.

For data N(m, S) let V_t = alpha_t^2 S + sigma_t^2, rho_t = sigma_t^2 / V_t. Students here are affine in one dimension,
so that their law at every level is known, and with it their converged fake score."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    MEAN,
    STD,
    AffineStudent,
    ExactFake,
    Recorder,
    gaussian,
    grouped_batch,
    guided_pair,
    posterior_mean,
    reached,
    tiny_networks,
    touched,
)
from torch import Tensor, nn

from fastgen import signals
from fastgen.batch import Batch, Conditioning
from fastgen.config import load_recipe
from fastgen.denoiser import Denoiser, Inputs
from fastgen.networks import Networks
from fastgen.objectives import RTDMD, Loss, Turn
from fastgen.objectives import rtdmd as rtdmd_module
from fastgen.objectives.ac_dmd import inverse_tilt, martingale_product, renoise_level
from fastgen.registry import RecipeError, validated
from fastgen.rewards import Composite, Reward, Scorer
from fastgen.rewards.function import FunctionReward
from fastgen.rewards.linear import Linear
from fastgen.rewards.quadratic import Quadratic
from fastgen.rollout import Rollout, RolloutPolicy, next_levels, trajectory, transition_law
from fastgen.schedule import FlowSchedule

FLOW, ETA, S_LEVEL = FlowSchedule(), 0.9, 0.5
TWO_STEP = RolloutPolicy((1.0, S_LEVEL), "cps", ETA)
FOUR_STEP = RolloutPolicy((1.0, 0.75, 0.5, 0.25), "cps", ETA)
ONE_STEP = RolloutPolicy((1.0,), "cps", ETA)
COS = math.cos(ETA * math.pi / 2)
STUDENT, FAKE = Turn("student", ("student",)), Turn("fake_score", ("fake_score",))


def matching_networks(
    student: Denoiser,
    fake: Denoiser,
    policy: RolloutPolicy,
    *rewards: Reward,
    teacher: Denoiser | None = None,
    **options: Any,
) -> Networks:
    scorer = Scorer(Composite(rewards, **options), lambda x, clamp=True: x) if rewards else None
    modules: dict[str, nn.Module] = {"student": student, "teacher": teacher or gaussian(), "fake_score": fake}
    return Networks(modules, policy, scorer)


def square(x: Tensor, _: Sequence[str]) -> Tensor:
    return x[:, 0].square()


def points_reward(function: Callable[[Tensor, Sequence[str]], Tensor], differentiable: bool = True) -> FunctionReward:
    return FunctionReward(function=function, input="points", differentiable=differentiable)


def total(losses: Loss | Iterator[Loss]) -> Tensor:
    """The sum of what the loop backpropagates."""
    return torch.stack([loss.total for loss in ([losses] if isinstance(losses, Loss) else losses)]).sum()


def terms(losses: Loss | Iterator[Loss]) -> dict[str, float]:
    found: dict[str, float] = {}
    for loss in [losses] if isinstance(losses, Loss) else losses:
        found |= {name: found.get(name, 0.0) + value.item() for name, value in loss.terms.items()}
    return found


# --- stage 1


def test_the_field_at_a_level_above_0_is_a_factor_times_that_of_the_clean_predictions() -> None:
    """x_s^F - x_s^T = (alpha_s - sigma_s cos(eta pi / 2) alpha_t / sigma_t) rho_t (m_f - m_r), for fake and teacher of
    the same S: the noise they share cancels. Divided by mean|x_s - x_s^T|, where it does not. Fails if the two steps
    draw noise of their own, or if the field is that of the clean predictions."""
    policy, batch = FOUR_STEP, grouped_batch(400)
    teacher = Recorder(gaussian())
    networks = matching_networks(gaussian(), gaussian(-0.4), policy, teacher=teacher)
    stop = batch.ids % 4
    s = next_levels(policy, stop, batch.normal("x"))
    rollout = Rollout(FLOW.add_noise(MEAN + STD * batch.normal("x"), batch.normal("n"), s), s, stop)
    plain, _ = RTDMD(guidance_scale=1.0, normalise=False).score_gradient(networks, batch, rollout)

    x_t, t = teacher.calls[-1][:2]
    rho = t**2 / ((1 - t) ** 2 * STD**2 + t**2)
    factor = (1 - s) - s * COS * (1 - t) / t
    error = (plain[:, 0] - factor * rho * (-0.4 - MEAN)).abs().max().item()
    mean, std = transition_law(FLOW, gaussian()(x_t, t, batch.cond), x_t, t, s, ETA)
    back = mean + std * batch.normal("back")
    normalised, terms = RTDMD(guidance_scale=1.0).score_gradient(networks, batch, rollout)
    assert torch.equal(terms["dm_grad"], normalised.abs().mean())
    error2 = (normalised * (rollout.x - back).abs() - plain).abs().max().item()
    print(f"field {error:.1e}, normaliser {error2:.1e}; t - s from {(t - s).min():.3f}")
    assert error < 1e-12 and error2 < 1e-12 and bool((factor > 0).all())
    clean = s == 0
    assert torch.allclose(factor[clean], torch.ones(()).double()) and (t - s).min() >= 0.01 and t.max() <= 0.98


def test_at_level_0_the_field_is_dmds() -> None:
    """One step: score_difference of the clean predictions at the same x_t."""
    teacher, batch = Recorder(gaussian()), grouped_batch(200)
    fake = gaussian(-0.4, 0.9)
    zero = torch.zeros(200, dtype=torch.float64)
    x = -0.4 + 0.9 * batch.normal("x")
    networks = matching_networks(gaussian(), fake, ONE_STEP, teacher=teacher)
    g, _ = RTDMD(guidance_scale=1.0).score_gradient(networks, batch, Rollout(x, zero, zero.long()))
    x_t, t = teacher.calls[-1][:2]
    real, fake_x0 = (f(x_t, t, batch.cond) for f in (teacher, fake))
    expected = signals.score_difference(x, fake_x0, real)
    assert torch.allclose(g, expected, rtol=1e-9)


def test_levels_lie_between_s_and_1() -> None:
    u = torch.tensor([1e-9, 0.5, 1 - 1e-9], dtype=torch.float64)
    for s, expected in ((0.0, (0.02, 0.505, 0.98)), (0.75, (0.76, 0.88, 0.98)), (0.9, (0.91, 0.955, 0.98))):
        assert torch.allclose(renoise_level(u, torch.full_like(u, s)), torch.tensor(expected).double(), atol=1e-6)


@pytest.mark.parametrize("stop", [0, 1])
def test_the_fake_loss_is_least_at_the_students_own_law(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At both levels, against fakes of another mean or spread on the same samples. With the sample itself as target
    (x_s / alpha_s) it is not, above level 0: this fails without the unbiased target."""
    student, batch = AffineStudent((-0.5, 0.2), (0.6, 0.8), TWO_STEP), grouped_batch(100_000)
    objective = RTDMD(condition_on_stop=True, consistency_weight=0.0)
    monkeypatch.setattr(RTDMD, "draw_stop", lambda self, policy, batch: torch.full_like(batch.ids, stop))

    def loss(shift: float, stretch: float) -> float:
        return objective.fake_loss(
            matching_networks(student, ExactFake(student, shift, stretch), TWO_STEP), batch
        ).total.item()

    around = ((0.05, 1.0), (-0.05, 1.0), (0.0, 1.15**0.5), (0.0, 0.87**0.5))
    exact, others = loss(0, 1), [loss(*wrong) for wrong in around]
    print(f"exact {exact:.5f}, others {[round(o - exact, 5) for o in others]}")
    assert exact < min(others)
    monkeypatch.setattr(signals, "renoised_target", lambda schedule, x_s, noise, s, t: x_s / (1 - s[:, None]))
    assert (loss(0, 1) < min(loss(*wrong) for wrong in around)) == (stop == 1)


def test_the_fake_loss_is_the_clamped_velocity_error() -> None:
    """min(1 / sigma_ts^2, 10) |sigma_ts (v - v*)|^2, v* = -x_s / (1 - s) + (t + (1 - t) s^2 / (1 - s)^2) / sigma_ts n.
    Fails without the clamp, or in another space."""
    student, batch = AffineStudent((-0.5, 0.2), (0.6, 0.8), TWO_STEP), grouped_batch(300)
    fake = Recorder(ExactFake(student, shift=0.4))
    objective = RTDMD(condition_on_stop=True, consistency_weight=0.0, stops="per_sample")
    networks = matching_networks(student, fake, TWO_STEP)
    loss = objective.fake_loss(networks, batch).total
    rollout, noise = objective.rollout(networks, batch, grad=False), batch.normal("fake_noise")
    x_t, level = fake.calls[-1][:2]
    t, s = level[:, None], rollout.s[:, None]
    sigma = (t**2 - ((1 - t) / (1 - s) * s) ** 2).sqrt()
    target = -rollout.x / (1 - s) + (t + (1 - t) * s**2 / (1 - s) ** 2) / sigma * noise
    velocity = (x_t - fake(x_t, level, batch.cond, Inputs(stop=rollout.stop))) / t
    expected = ((1 / sigma**2).clamp(max=10.0) * (sigma * (velocity - target)) ** 2).mean()
    print(f"{loss.item():.6f}, by hand {expected.item():.6f}; clamped {(sigma**2 < 0.1).double().mean():.2f} of it")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_teacher_is_guided() -> None:
    """Between N(m_c, S) and N(m_u, S) guidance w is the teacher N(m_c + (w - 1)(m_c - m_u), S): the same field."""
    pair, shifted = guided_pair(0.7, -0.1), gaussian(0.7 + 1.5 * 0.8)
    batch = grouped_batch(50)
    batch = dataclasses.replace(batch, uncond=Conditioning({"label": torch.full_like(batch.ids, 2)}))
    s = next_levels(TWO_STEP, batch.ids % 2, batch.normal("x"))
    rollout = Rollout(batch.normal("x"), s, batch.ids % 2)
    fields = []
    for w, teacher in ((2.5, pair), (1.0, shifted)):
        networks = matching_networks(pair, gaussian(0.0), TWO_STEP, teacher=teacher)
        fields.append(RTDMD(guidance_scale=w).score_gradient(networks, batch, rollout)[0])
    assert torch.allclose(*fields, rtol=1e-9)


def newton(players: Sequence[tuple[Turn, nn.Module]], objective: RTDMD, networks: Networks, batch: Batch) -> None:
    """Moves the parameters to where the gradient of every player's own loss vanishes: where training ends. All
    evaluations draw the same samples, so that the gradient is a smooth function; slopes by central differences."""
    parameters = [p for _, module in players for p in module.parameters()]

    def gradient() -> Tensor:
        found = [
            torch.autograd.grad(total(objective.loss(turn, networks, batch, {})), list(module.parameters()))
            for turn, module in players
        ]
        return torch.cat([g.flatten() for player in found for g in player])

    step, count = torch.ones(1), 0
    while step.abs().max() > 1e-4:
        columns, count = [], count + 1

        for p in parameters:
            for i in range(len(p)):
                values = []
                for h in (1e-3, -1e-3):
                    p.data[i] += h
                    values.append(gradient())
                    p.data[i] -= h
                columns.append((values[0] - values[1]) / 2e-3)
        step = torch.linalg.solve(torch.stack(columns, 1), gradient())
        assert count < 10
        for p, d in zip(parameters, step.split([len(p) for p in parameters]), strict=True):
            p.data -= d
    print(f"{count} steps of Newton's method, the last {step.abs().max().item():.1e}")


def test_stage_1_brings_every_level_to_the_teachers_law() -> None:
    """x_s ~ N(alpha_s m, alpha_s^2 S + sigma_s^2) and x_0 ~ N(m, S), from a student that is off at both."""
    student = AffineStudent((0.2, 0.2), (0.9, 1.0), TWO_STEP)
    objective = RTDMD(guidance_scale=1.0, condition_on_stop=True, stops="per_sample", normalise=False)
    networks = matching_networks(student, ExactFake(student), TWO_STEP)
    newton([(STUDENT, student)], objective, networks, grouped_batch(5000))
    mean, variance = student.laws()
    exact_mean = torch.tensor([0.5 * MEAN, MEAN]).double()
    exact_std = torch.tensor([(0.25 * STD**2 + 0.25) ** 0.5, STD]).double()
    errors = ((mean - exact_mean) / exact_std, variance.sqrt() / exact_std - 1)
    print("errors of mean and std, in std:", *errors)
    assert max(e.abs().max().item() for e in errors) < 1e-6


# --- the martingale product


def test_the_two_sample_product_is_unbiased_and_one_sample_is_not() -> None:
    """For h = c + k_t x, E[h(x', t') | x_t] - h is affine in x_t: its mean square is exact. One draw used twice adds
    k_t'^2 rho^2, the variance of h(x', t')."""
    count, t, t_next = 400_000, 0.8, 0.65
    full = torch.full((count,), t, dtype=torch.float64)

    def h(x: Tensor, level: Tensor) -> Tensor:
        return 0.3 + (0.2 + 0.9 * level[:, None]) * x

    x_t, one, two = (grouped_batch(count).normal(name) for name in "xyz")
    args = h, FLOW, h(x_t, full), x_t, full, torch.full_like(full, t_next)
    product, single = (martingale_product(*args, draws, ETA).item() for draws in ((one, two), (one, one)))
    mean, std = transition_law(FLOW, h(x_t, full), x_t, full, args[-1], ETA)
    exact = (h(mean, args[-1]) - h(x_t, full)).square().mean().item()
    variance = ((0.2 + 0.9 * t_next) * std[0].item()) ** 2
    print(f"exact {exact:.4f}, two draws {product:.4f}, one {single:.4f} = exact + {variance:.4f}")
    assert abs(product - exact) < 4e-3 and abs(single - exact - variance) < 4e-3 and variance > 0.1


@pytest.mark.parametrize(("eta", "vanishes"), [("ancestral", True), (0.9, False), (0.0, False)])
def test_the_ancestral_step_makes_the_exact_score_a_martingale(eta: float | str, vanishes: bool) -> None:
    """h of a Gaussian is affine in x', so that its mean is h at the mean step: without noise the product is the square
    of E[h(x', t') | x_t] - h, for t = .8, t' = .65; cos(eta pi / 2) = alpha_t sigma_t' / (alpha_t' sigma_t) = .464."""
    t, t_next = (torch.full((50,), v, dtype=torch.float64) for v in (0.8, 0.65))
    cosine = 0.2 * 0.65 / (0.35 * 0.8)
    eta = 2 / math.pi * math.acos(cosine) if isinstance(eta, str) else eta
    teacher, batch = gaussian(), grouped_batch(50)
    x_t = FLOW.add_noise(MEAN + STD * batch.normal("x"), batch.normal("n"), t)

    def predict(x: Tensor, level: Tensor) -> Tensor:
        return teacher(x, level, Conditioning({"label": torch.zeros(len(x), dtype=torch.int64)}))

    none = torch.zeros_like(x_t)
    product = martingale_product(predict, FLOW, predict(x_t, t), x_t, t, t_next, (none, none), eta).item()
    print(f"cosine {cosine:.3f}: eta = {eta:.3f}, product {product:.1e}")
    assert (product < 1e-28) == vanishes


def test_the_martingale_product_is_part_of_the_fake_loss() -> None:
    """Weight .01 of the paper, at levels t' not below s. Fails without the term."""
    student, batch = AffineStudent((-0.5, 0.2), (0.6, 0.8), TWO_STEP), grouped_batch(64)
    fake = Recorder(ExactFake(student, shift=0.3))
    networks = matching_networks(student, fake, TWO_STEP)
    make = RTDMD(condition_on_stop=True, stops="per_sample")
    with_it, without = (
        dataclasses.replace(make, consistency_weight=w).fake_loss(networks, batch) for w in (0.01, 0.0)
    )
    product = with_it.terms["consistency"]
    assert (with_it.total - without.total).item() == pytest.approx(0.01 * product.item()) and product != 0
    assert "consistency" not in without.terms
    make.fake_loss(networks, batch)
    s = make.rollout(networks, batch, grad=False).s.repeat(2)
    t = fake.calls[-1].t
    assert bool((t >= s.clamp_min(1e-3)).all()) and bool((t < 0.98).all())


# --- stage 2


def rewarded(**options: Any) -> RTDMD:
    """Stage 2 whose two reward terms are the gradient of reward_weight E r, without guidance."""
    exact = {"normalise": False, "normalise_advantages": False, "log_prob": "nats", "reward_hinge": None}
    return RTDMD(stage=2, guidance_scale=1.0, condition_on_stop=True, advantage_clip=1e3, **(exact | options))


def test_policy_gradient_and_backpropagation_add_to_the_gradient_of_the_reward() -> None:
    """x_1 = theta x_2 + rho eps, x_0 = theta x_1, r = x_0^2: d E r / d theta = 4 theta^3 + 2 theta rho^2. The chain is
    a two-step student with renoise transitions, one theta for both steps; the fake score is the teacher, so that the
    matching term is 0. Fails without either term, as each alone is far off."""
    theta, count, policy = 0.8, 200_000, RolloutPolicy((1.0, 0.5), "renoise")

    class Chain(AffineStudent):
        def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
            return self.b[0] * x_t * torch.where(t > 0.7, 2.0, 1.0)[:, None]  # at the first step alpha_s = 1/2

    student, reward = Chain((0.0,), (theta,), policy), points_reward(square)
    networks = matching_networks(student, gaussian(), policy, reward)
    exact = 4 * theta**3 + 2 * theta * 0.5**2
    found = {}
    for name, weights in {"both": (1.0, 1.0), "policy": (1.0, 0.0), "backprop": (0.0, 1.0)}.items():
        objective = dataclasses.replace(
            rewarded(),
            condition_on_stop=False,
            group_size=count,
            selected_steps=1,
            policy_weight=weights[0],
            reward_weight=weights[1],
        )
        loss = total(objective.loss(STUDENT, networks, grouped_batch(count, size=count), {}))
        found[name] = -torch.autograd.grad(loss, student.b)[0].item()
    print(f"exact {exact:.4f}, found {found}")
    assert abs(found["both"] - exact) < 0.05 and abs(found["policy"] + found["backprop"] - found["both"]) < 1e-6
    assert min(found["policy"], found["backprop"]) > 0.4


def uniform_levels(s: float, count: int = 20_000) -> Tensor:
    """Equally likely levels of the law U(s + .01, 1), clamped."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return renoise_level(u, torch.full_like(u, s))


def rho(t: Tensor) -> Tensor:
    return t**2 / ((1 - t) ** 2 * STD**2 + t**2)


@pytest.mark.slow
def test_a_one_step_student_ends_at_the_minimiser_of_its_own_objective() -> None:
    """Linear reward: mean m + a / (beta E[rho_t]), 1 / beta = reward_weight / dm_weight, spread unchanged; which is
    not p exp(r / beta) with its mean m + S a / beta. Fails without the reward's gradient."""
    student, slope, weight = AffineStudent((0.4,), (1.0,), ONE_STEP), 0.5, 0.6
    objective = dataclasses.replace(rewarded(), selected_steps=0, dm_weight=1.0, reward_weight=weight, group_size=1)
    networks = matching_networks(student, ExactFake(student), ONE_STEP, Linear((slope,)))
    newton([(STUDENT, student)], objective, networks, grouped_batch(50_000))
    shift = weight * slope / rho(uniform_levels(0.0)).mean().item()
    (mean,), (variance,) = student.laws()
    off, tilt = (mean - MEAN - shift).item() / STD, (shift - weight * slope * STD**2) / STD
    print(f"mean off by {off:+.4f} std, spread by {variance.sqrt() / STD - 1:+.4f}; the tilt is {-tilt:+.3f} std away")
    assert abs(off) < 0.01 and abs(variance.sqrt() / STD - 1) < 0.01 and abs(tilt) > 0.1


@pytest.mark.slow
def test_a_two_step_student_ends_at_the_minimiser_of_its_own_objective() -> None:
    """Both levels shift. x_0 by a / (beta E[rho_t]) with 1 / beta = 2 reward_weight / dm_weight, as each of two steps
    is matched half the time; x_s, which only the policy gradient pushes, by
        2 policy_weight alpha_s a b_2 / (dm_weight E[(alpha_s - sigma_s cos alpha_t / sigma_t) rho_t]),
    b_2 = std(x_0) / std(x_s) the last step's slope. Fails without the policy gradient, without the leave-one-out
    factor K / (K - 1) = 4 / 3, and in RTDMD's own unit of the log-probability."""
    student, slope, weight = AffineStudent((0.5, 0.2), (1.1, 1.3), TWO_STEP), 0.4, 0.2
    objective = dataclasses.replace(
        rewarded(),
        selected_steps=1,
        dm_weight=0.5,
        reward_weight=weight / 2,
        policy_weight=weight / 2,
        group_size=4,
        stops="per_sample",
    )
    networks = matching_networks(student, ExactFake(student), TWO_STEP, Linear((slope,)))
    newton([(STUDENT, student)], objective, networks, grouped_batch(20_000, size=4))
    mean, variance = student.laws()
    std_s = (0.25 * STD**2 + 0.25) ** 0.5
    t = uniform_levels(S_LEVEL)
    factor = 0.5 - 0.5 * COS * (1 - t) / t
    shift_s = 2 * weight * 0.5 * slope * (STD / std_s) / (factor * rho(t)).mean().item()
    shift_0 = 2 * weight * slope / rho(uniform_levels(0.0)).mean().item()
    off = [(mean[0].item() - 0.5 * MEAN - shift_s) / std_s, (mean[1].item() - MEAN - shift_0) / STD]
    spread = [variance[0].sqrt().item() / std_s - 1, variance[1].sqrt().item() / STD - 1]
    print(f"shifts {shift_s / std_s:.3f}, {shift_0 / STD:.3f} std; off by {off}, spread by {spread}")
    assert max(map(abs, off + spread)) < 0.05 and min(shift_s / std_s, shift_0 / STD) > 0.2


class LearnedFake(Denoiser):
    """The denoiser of N(mean, e^{2 log_std})."""

    def __init__(self, mean: float, std: float):
        super().__init__(nn.Identity(), FLOW, "sample")
        self.mean, self.log_std = (nn.Parameter(torch.tensor([v]).double()) for v in (mean, math.log(std)))

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        return posterior_mean(x_t, t, self.mean, (2 * self.log_std).exp())


@pytest.mark.parametrize("reward", ["linear", pytest.param("quadratic", marks=pytest.mark.slow)])
def test_inverse_tilt_lands_on_the_tilted_law_itself(reward: str) -> None:
    """m + S a / beta for r = a x, precision 1 / S + q / beta for r = -q x^2 / 2, from losses of both players; the fake
    score ends at the teacher's law. Fails without the weight, and with weights e^{+r / beta} (the anti-tilt)."""
    beta = 1.5
    student, fake = AffineStudent((MEAN,), (STD,), ONE_STEP), LearnedFake(MEAN, STD)
    part: Reward = Linear((0.6,)) if reward == "linear" else Quadratic((0.0,), (0.4,))
    networks = matching_networks(student, fake, ONE_STEP, part)
    objective = RTDMD(
        guidance_scale=1.0,
        normalise=False,
        consistency_weight=0.0,
        critic_weight="inverse_tilt",
        reward_temperature=beta,
    )
    newton([(STUDENT, student), (FAKE, fake)], objective, networks, grouped_batch(20_000))
    precision = 1 / STD**2 + (0.4 / beta if reward == "quadratic" else 0)
    target = (MEAN / STD**2 + (0.6 / beta if reward == "linear" else 0)) / precision
    (mean,), (variance,) = student.laws()
    off, spread = (mean.item() - target) * precision**0.5, variance.item() ** 0.5 * precision**0.5 - 1
    print(f"mean off by {off:+.3f} std (moved by {(target - MEAN) * precision**0.5:+.3f}), spread by {spread:+.3f}")
    assert abs(off) < 0.03 and abs(spread) < 0.03
    assert abs(fake.mean.item() - MEAN) < 0.03 and abs(fake.log_std.exp().item() / STD - 1) < 0.03


def test_inverse_tilt_weights_are_normalised_within_groups_and_skip_invalid_samples() -> None:
    reward, group = torch.tensor([0.0, 1.0, 5.0, 100.0, 2.0, 2.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    valid = torch.tensor([True, True, False, True, True, True])
    weight = inverse_tilt(reward, valid, group, 0.5)
    assert torch.allclose(weight[0] / weight[1], torch.tensor(2.0).exp()) and weight[2] == 0
    assert torch.allclose(signals.group_mean(weight, group), torch.ones(6))
    assert torch.allclose(weight[4] / weight[3], torch.tensor(8.0).exp())  # clamped to e^{+-4}
    assert torch.allclose(weight, inverse_tilt(reward + 7, valid, group, 0.5))


def test_with_inverse_tilt_every_step_is_matched_at_level_0() -> None:
    objective = RTDMD(critic_weight="inverse_tilt", reward_temperature=1.0, stops="per_sample")
    student, batch = AffineStudent((-0.5, 0.2), (0.6, 0.8), TWO_STEP), grouped_batch(32)
    rollout = objective.rollout(matching_networks(student, gaussian(), TWO_STEP), batch, grad=False)
    assert bool((rollout.s == 0).all()) and set(rollout.stop.tolist()) == {0, 1}


def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[int], Rollout]]:
    """The shared steps and the trajectory of every call from now on."""
    calls: list[tuple[set[int], Rollout]] = []

    def keep(student: Denoiser, policy: RolloutPolicy, batch: Batch, shared: set[int], log_prob: bool) -> Rollout:
        calls.append((shared, trajectory(student, policy, batch, shared, log_prob)))
        return calls[-1][1]

    monkeypatch.setattr(rtdmd_module, "trajectory", keep)
    return calls


FOUR_AFFINE = ((0.1, 0.2, 0.0, -0.1), (0.7, 0.9, 0.8, 1.1))


def test_groups_share_the_noise_of_steps_that_are_not_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three stochastic steps in every update, each as often; the deterministic step never. On the third the
    fresh noise of a group's samples is one. The micro-batches of an update select the same. Fails without the sharing.
    """
    student, calls = AffineStudent(*FOUR_AFFINE, FOUR_STEP), captured(monkeypatch)
    networks = matching_networks(student, gaussian(), FOUR_STEP, Linear((1.0,)))
    objective, counts = dataclasses.replace(rewarded(), group_size=4, condition_on_stop=False), [0, 0, 0]
    for key in range(60):
        for loss in objective.loss(STUDENT, networks, grouped_batch(12, key=key, size=4), {}):  # type: ignore[union-attr]
            assert loss.total.requires_grad
        selected = objective.select_steps(grouped_batch(12, key=key), FOUR_STEP)
        other = objective.select_steps(grouped_batch(4, key=key, first=99), FOUR_STEP)
        assert selected == other and len(set(selected)) == 2
        shared, rollout = calls[-1]
        assert shared == {0, 1, 2} - set(selected)
        for i in range(3):
            counts[i] += i in selected
            step, after = rollout.steps[i : i + 2]
            mean, std = transition_law(FLOW, step.x0, step.x_t, step.t, after.t, ETA)
            fresh = ((step.x_next - mean) / std).reshape(3, 4)
            assert (bool((fresh - fresh[:, :1]).abs().max() < 1e-9)) == (i in shared)
    print("selected", counts, "of 60")
    assert min(counts) > 25


def test_shared_noise_depends_on_group_step_and_update_alone() -> None:
    """Two processes with groups {0, 1} and {1, 2} draw the same noise for group 1; another step or update, another."""
    one, two = grouped_batch(8, key=5, size=4), grouped_batch(8, key=5, size=4, first=4)
    noise = one.normal("step2", by_group=True)
    assert torch.equal(noise[4:], two.normal("step2", by_group=True)[:4]) and torch.equal(noise[4], noise[7])
    for other in (one.normal("step1", by_group=True), grouped_batch(8, key=6, size=4).normal("step2", by_group=True)):
        assert bool((other != noise).all())


def test_a_group_that_shares_everything_has_no_advantage() -> None:
    """All steps shared and one initial latent a group: equal rewards, advantage 0, no loss and no gradient. With a
    step of its own each sample has some."""
    student = AffineStudent(*FOUR_AFFINE, FOUR_STEP)
    networks = matching_networks(student, gaussian(), FOUR_STEP, Linear((1.0,)))
    batch = dataclasses.replace(grouped_batch(12, size=4), ids=torch.arange(12) // 4)  # one draw a group
    objective = dataclasses.replace(rewarded(), condition_on_stop=False, group_size=4, normalise_advantages=True)
    found = []
    for shared in ({0, 1, 2}, {0, 2}):
        own = dataclasses.replace(batch, ids=torch.arange(12)) if shared != {0, 1, 2} else batch
        with torch.no_grad():
            rollout = trajectory(student, FOUR_STEP, own, shared)
        advantage, _ = objective.advantage(networks, batch, networks.rewards(rollout.x, batch))
        loss = objective.policy_step_loss(networks, own, rollout.steps[1], rollout.steps[2].t, advantage)
        gradient = torch.autograd.grad(loss.total, student.a)[0].abs().sum().item()
        found.append((advantage.abs().max().item(), loss.total.abs().item(), gradient))
    print(found)
    assert found[0] == (0, 0, 0) and found[1][0] > 0.5 and found[1][2] > 1e-3


def test_on_policy_the_ratio_is_1_and_the_gradient_reinforces(monkeypatch: pytest.MonkeyPatch) -> None:
    """-mean A grad(-|x_next - mean|^2) in RTDMD's unit, with the samples held fixed; the logged ratio is 1 exactly."""
    student, calls = AffineStudent(*FOUR_AFFINE, FOUR_STEP), captured(monkeypatch)
    networks = matching_networks(student, gaussian(), FOUR_STEP, Linear((1.0,)))
    objective = RTDMD(stage=2, group_size=4, selected_steps=3, guidance_scale=1.0)
    batch = grouped_batch(24, size=4)
    losses = list(objective.loss(STUDENT, networks, batch, {}))  # type: ignore[arg-type]
    assert [loss.terms.get("log_ratio") for loss in losses[:3]] == [0, 0, 0] and len(losses) == 4
    rollout = calls[0][1]
    assert batch.group is not None
    advantage = signals.gdpo_advantages({"r": rollout.x[:, 0]}, {"r": 1.0}, batch.group, batch.ids >= 0)
    for i, loss in enumerate(losses[:3]):
        step, t_next = rollout.steps[i], rollout.steps[i + 1].t
        mean, _ = transition_law(FLOW, student(step.x_t, step.t, batch.cond), step.x_t, step.t, t_next, ETA)
        expected = (advantage * (step.x_next - mean).square()[:, 0]).mean()
        a, b = (torch.autograd.grad(v, student.a)[0] for v in (loss.total, expected))
        assert torch.allclose(a, b, atol=1e-6) and a[i] != 0 and a.count_nonzero() == 1


def test_the_deterministic_step_has_no_density() -> None:
    student = AffineStudent(*FOUR_AFFINE, FOUR_STEP)
    networks, batch = matching_networks(student, gaussian(), FOUR_STEP), grouped_batch(8)
    last = trajectory(student, FOUR_STEP, batch).steps[3]
    with pytest.raises(ValueError, match="deterministic"):
        rewarded().log_density(networks, last, last.x0, torch.zeros_like(last.t))


def matched(objective: RTDMD, networks: Networks, batch: Batch) -> Loss:
    """The last loss of a student turn."""
    *_, last = objective.loss(STUDENT, networks, batch, {})  # type: ignore[misc]
    return last


def test_rewards_without_gradient_enter_the_policy_gradient_alone() -> None:
    """A part that is not differentiable, added to a linear one: the last step's loss stays, the policy's changes."""
    student, batch = AffineStudent(*FOUR_AFFINE, FOUR_STEP), grouped_batch(32, size=8)
    objective = RTDMD(stage=2, group_size=8, guidance_scale=1.0)
    steps = points_reward(lambda x, _: x[:, 0].round(), differentiable=False)
    gradients = []
    for parts in ((Linear((1.0,)),), (Linear((1.0,)), steps)):
        networks = matching_networks(student, gaussian(), FOUR_STEP, *parts)
        *policy, last = objective.loss(STUDENT, networks, batch, {})  # type: ignore[misc]
        gradients.append(
            [torch.autograd.grad(loss, student.a)[0] for loss in (last.total, sum(p.total for p in policy))]
        )
    assert torch.equal(gradients[0][0], gradients[1][0]) and not torch.allclose(gradients[0][1], gradients[1][1])


def test_the_hinge_stops_the_gradient_of_high_rewards() -> None:
    """ReLU(hinge - r): a sample above the hinge passes nothing on, one below 1 / count; null always does."""
    student, batch = AffineStudent((0.0,), (1.0,), ONE_STEP), grouped_batch(50)
    networks = matching_networks(student, gaussian(), ONE_STEP, Linear((1.0,)))
    objective = RTDMD(stage=2, guidance_scale=1.0, selected_steps=0, group_size=1, reward_weight=1.0)
    x = batch.normal("initial")[:, 0]

    def slope(hinge: float | None) -> float:
        pair = [
            torch.autograd.grad(
                matched(dataclasses.replace(objective, reward_hinge=hinge, reward_weight=w), networks, batch).total,
                student.a,
            )[0].item()
            for w in (1.0, 0.5)
        ]
        return 2 * (pair[0] - pair[1])  # without the matching term

    assert slope(None) == pytest.approx(-1.0) and slope(-100.0) == pytest.approx(0.0)
    assert slope(0.3) == pytest.approx(-(x < 0.3).double().mean().item())


def test_advantages_follow_the_composite() -> None:
    """A sum: every part standardised by itself, then weighted, so that scale does not matter. A minimum: one reward.
    Not normalised: the leave-one-out difference of the composite. Fails if weights or the aggregate are left out."""
    batch, student = grouped_batch(40, size=4), gaussian()
    x = batch.normal("x")
    wide = points_reward(lambda x, _: 1000 * x[:, 0].square())
    wide, line = dataclasses.replace(wide, weight=2.0), Linear((1.0,))
    objective = RTDMD(stage=2, group_size=4)
    raw = {"line": x[:, 0].float(), "wide": 1000 * x[:, 0].square().float()}
    valid, group = torch.ones(40, dtype=torch.bool), batch.group
    assert group is not None

    def advantage(objective: RTDMD, *parts: Reward, **options: Any) -> Tensor:
        networks = matching_networks(student, student, FOUR_STEP, *parts, **options)
        return objective.advantage(networks, batch, networks.rewards(x, batch))[0]

    expected = signals.gdpo_advantages(raw, {"line": 1.0, "wide": 2.0}, group, valid)
    assert torch.allclose(advantage(objective, line, wide), expected, atol=1e-5)
    least = torch.minimum(raw["line"], 2 * raw["wide"])
    expected = signals.gdpo_advantages({"value": least}, {"value": 1.0}, group, valid)
    assert torch.allclose(advantage(objective, line, wide, aggregate="min"), expected, atol=1e-5)
    loo = advantage(dataclasses.replace(objective, normalise_advantages=False), line).reshape(10, 4)
    r = raw["line"].reshape(10, 4)
    assert torch.allclose(loo, r - (r.sum(1, keepdim=True) - r) / 3, atol=1e-5)
    assert advantage(dataclasses.replace(objective, advantage_clip=0.5), line).abs().max() == 0.5


@pytest.mark.parametrize("std", ["batch", "within_groups"])
def test_an_update_of_two_micro_batches_is_that_of_one(std: Any) -> None:
    """The gradient of the whole update, 24 samples at once and in halves: advantages are of the update, and so is the
    number of samples that have one. The rewards of the prompts differ in mean and spread, so that the advantages of a
    half by itself are others, and the halves do not have equally many."""

    def uneven(x: Tensor, _: Sequence[str]) -> Tensor:
        prompt = torch.where(x[:, :1] < -0.5, 3.0, 0.0)[:, 0]
        return torch.where(x[:, 0] > 0.6, torch.nan, x[:, 0] + prompt)  # no reward, and no advantage

    student = AffineStudent(*FOUR_AFFINE, FOUR_STEP)
    networks = matching_networks(student, gaussian(), FOUR_STEP, points_reward(uneven), Linear((-0.3,), weight=2.0))
    objective = RTDMD(stage=2, group_size=4, guidance_scale=1.0, std=std, dm_weight=1.0, reward_weight=0.0)
    _, turn = objective.turns(0, {})
    assert turn.collects and not any(t.collects for t in RTDMD().turns(0, {}))

    def gradient(*batches: Batch) -> Tensor:
        state = objective.init_state()
        batches = tuple(dataclasses.replace(batch, shared={}) for batch in batches)
        for batch in batches:
            objective.collect(turn, networks, batch, state)
        losses = [total(objective.loss(turn, networks, batch, state)) for batch in batches]
        objective.finish(turn, networks, state)
        assert not state
        return torch.cat(torch.autograd.grad(torch.stack(losses).mean(), list(student.parameters())))

    whole, halves = grouped_batch(24, 4), [grouped_batch(12, 4, first=first) for first in (0, 12)]
    once, twice = gradient(whole), gradient(*halves)
    alone = torch.stack([total(objective.loss(turn, networks, half, {})) for half in halves]).mean()
    apart = torch.cat(torch.autograd.grad(alone, list(student.parameters())))
    error, away = ((g - once).norm() / once.norm() for g in (twice, apart))
    print(f"{std}: halves differ by {error:.1e}, halves by themselves by {away:.2f}")
    assert error < 1e-6 and away > 1e-3


def test_raw_advantages_and_the_rewards_gradient_are_means_over_all_samples() -> None:
    """Halves of an update have the gradient of the whole, though the rewards of the first prompts are all equal, and
    those of others invalid."""
    student = AffineStudent(*FOUR_AFFINE, FOUR_STEP)

    def uneven(x: Tensor, _: Sequence[str]) -> Tensor:
        return torch.where(x[:, 0] > 0.6, torch.nan, x[:, 0].clamp(min=0.3))

    networks = matching_networks(student, gaussian(), FOUR_STEP, points_reward(uneven))
    shared = {"stage": 2, "group_size": 4, "guidance_scale": 1.0, "dm_weight": 1.0, "reward_hinge": None}
    for options in (
        {"normalise_advantages": False, "reward_weight": 0.0},
        {"selected_steps": 0, "reward_weight": 1.0},
    ):
        objective, found = RTDMD(**shared, **options), []
        for parts in (1, 2):
            size = 24 // parts
            batches = [grouped_batch(size, 4, first=size * i) for i in range(parts)]
            loss = torch.stack([total(objective.loss(STUDENT, networks, batch, {})) for batch in batches]).mean()
            found.append(torch.cat(torch.autograd.grad(loss, list(student.parameters()))))
        error = (found[0] - found[1]).norm() / found[0].norm()
        print(f"{options}: {error:.1e}")
        assert error < 1e-6


def test_samples_without_a_reward_are_left_out() -> None:
    """NaN for some: they get no advantage and no reward gradient, and count in its mean as 0."""
    student, batch = AffineStudent((0.0,), (1.0,), ONE_STEP), grouped_batch(40, size=4)
    part = points_reward(lambda x, _: torch.where(x[:, 0] > 0.5, torch.nan, x[:, 0]))
    networks = matching_networks(student, gaussian(), ONE_STEP, part)
    x = batch.normal("initial")
    score = networks.rewards(x, batch)
    advantage, used = dataclasses.replace(rewarded(), group_size=4).advantage(networks, batch, score)
    assert used == 1
    assert (
        bool((advantage[~score.valid] == 0).all()) and 0 < score.valid.sum() < 40 and bool(advantage.isfinite().all())
    )
    objective = RTDMD(
        stage=2, guidance_scale=1.0, selected_steps=0, group_size=1, reward_weight=1.0, reward_hinge=None
    )
    heavy, light = (
        torch.autograd.grad(
            matched(dataclasses.replace(objective, reward_weight=w), networks, batch).total, student.a
        )[0]
        for w in (1.0, 0.5)
    )
    assert (2 * (heavy - light)).item() == pytest.approx(-score.valid.double().mean().item())


# --- who moves, and what is refused


SETTINGS: dict[str, dict[str, Any]] = {
    "stage 1": {"condition_on_stop": True, "stops": "per_sample"},
    "inverse tilt": {
        "critic_weight": "inverse_tilt",
        "reward_temperature": 1.0,
        "group_size": 4,
        "stops": "per_sample",
    },
    "stage 2": {"stage": 2, "group_size": 4, "condition_on_stop": True, "selected_steps": 3, "stops": "per_sample"},
    "published stage 2": {"stage": 2, "group_size": 4, "stops": "last"},
    "policy gradient alone": {"stage": 2, "group_size": 4, "reward_weight": 0.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_turn_leaves_gradient_on_its_own_network_alone(name: str) -> None:
    """Every tensor of the turn's role is reached, and no other network holds so much as a zero gradient."""
    objective = RTDMD(guidance_scale=2.0, **SETTINGS[name])
    for turn in objective.turns(0, {}):
        scorer = Scorer(Composite((Linear((1.0, 0.0)),)), lambda x, clamp=True: x)
        networks = tiny_networks(objective, FOUR_STEP, scorer if objective.rewards_required else None)
        batch = grouped_batch(32, size=4, dim=2)
        total(objective.loss(turn, networks, batch, {})).backward()
        assert turn.roles == (turn.name,)
        assert all(reached(networks[turn.name]).values()) and touched(networks) == {turn.name}


def test_turns_roles_and_uses() -> None:
    """The fake score's updates come first; rewards are for stage 2 and for the tilted critic; K = 16 in stage 2."""
    uses = {name: RTDMD(**options).reward_use for name, options in SETTINGS.items()}
    assert list(uses.values()) == ["none", "score", "gradient", "gradient", "score"]
    assert [RTDMD(**o).rewards_required for o in SETTINGS.values()] == [False, True, True, True, True]
    first, second = RTDMD(), RTDMD(stage=2)
    assert (first.fake_updates, first.stops, first.group_size) == (10, "shared", 1)
    assert (second.fake_updates, second.stops, second.group_size) == (1, "last", 16)
    given = RTDMD(stage=2, fake_updates=3, stops="shared")
    assert (given.fake_updates, given.stops) == (3, "shared") and dataclasses.replace(
        given, group_size=4
    ).stops == "shared"
    assert validated(RTDMD, {"stage": 2, "group_size": 8}, "objective.") == RTDMD(stage=2, group_size=8)
    for objective in (RTDMD(), RTDMD(stage=2, fake_updates=1)):
        assert objective.trained_roles == ("student", "fake_score") and objective.needs == frozenset()
        first, second = objective.turns(3, {})
        assert (first.roles, first.updates, second.roles) == (("fake_score",), objective.fake_updates, ("student",))


def test_the_matching_term_is_at_the_last_step_or_at_one_that_is_drawn() -> None:
    objective = RTDMD(stage=2, group_size=4, stops="last")
    batch = grouped_batch(64)
    assert objective.draw_stop(FOUR_STEP, batch).tolist() == [3] * 64
    drawn = {RTDMD().draw_stop(FOUR_STEP, grouped_batch(2, key=key))[0].item() for key in range(40)}
    assert drawn == {0, 1, 2, 3}


def test_a_step_made_again_is_the_trajectorys() -> None:
    """The last one exactly; a stochastic one has the same law and noise of its own."""
    student, batch = AffineStudent(*FOUR_AFFINE, FOUR_STEP), grouped_batch(40)
    networks, objective = matching_networks(student, gaussian(), FOUR_STEP), rewarded()
    rollout = trajectory(student, FOUR_STEP, batch)
    again = objective.repeat_step(networks, batch, rollout, torch.full_like(batch.ids, 3))
    assert torch.equal(again.x, rollout.x) and again.x.requires_grad
    stop = batch.ids % 4
    mixed = objective.repeat_step(networks, batch, rollout, stop)
    assert torch.equal(mixed.s, next_levels(FOUR_STEP, stop, mixed.x))
    for k in range(3):
        rows, step = stop == k, rollout.steps[k]
        mean, std = transition_law(FLOW, step.x0, step.x_t, step.t, rollout.steps[k + 1].t, ETA)
        assert torch.allclose(mixed.x[rows], (mean + std * batch.normal("exit"))[rows])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dm_weight": 0.5}, "dm_weight: only for stage 2"),
        ({"reward_hinge": None, "log_prob": "nats"}, "log_prob, reward_hinge: only for stage 2"),
        ({"stops": "last"}, "untrained"),
        ({"reward_temperature": 1.0}, "inverse_tilt"),
        ({"critic_weight": "inverse_tilt"}, "reward_temperature"),
        ({"stage": 2, "critic_weight": "inverse_tilt", "reward_temperature": 1.0}, "already tilts"),
        ({"stage": 2, "selected_steps": 0, "reward_weight": 0.0}, "no reward is used"),
        ({"stage": 2, "group_size": 1}, "no other sample to compare"),
        ({"stage": 3}, "stage"),
        ({"stage": 2, "ratio_clip": 0.0}, "ratio_clip"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RTDMD(**options)


def test_a_tilt_needs_two_samples() -> None:
    """The weights of one sample by itself have a mean of 1, whatever its reward."""
    tilt, batch = "objective={name: rtdmd, critic_weight: inverse_tilt, reward_temperature: 0.5}", "train.batch_size="
    rewards = "rewards={parts: [{name: linear, direction: [1.0, 0.0]}]}"
    recipe = Path(__file__).parents[1] / "recipes/mixture_rtdmd_4step.yaml"
    with pytest.raises(RecipeError, match=r"train\.batch_size is 1, so that every weight would be 1"):
        load_recipe(recipe, [tilt, rewards, batch + "1"])
    load_recipe(recipe, [tilt, rewards, batch + "2"])


@pytest.mark.parametrize(
    ("objective", "policy", "message"),
    [
        (RTDMD(), RolloutPolicy((1.0, 0.5), "ode"), "cps"),
        (RTDMD(), RolloutPolicy((1.0, 0.98), "cps", 0.9), "below 0.97"),
        (RTDMD(stage=2), TWO_STEP, "selected_steps is 2"),
    ],
)
def test_samplers_it_cannot_train_are_refused(objective: RTDMD, policy: RolloutPolicy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective.check(policy)
    for allowed in (FOUR_STEP, RolloutPolicy(FOUR_STEP.timesteps, "renoise")):
        objective.check(allowed)
