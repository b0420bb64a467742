"""What several objectives stand on: transitions with log-probabilities, sub-interval targets, group statistics,
advantages, hinge losses. Against closed forms, in float64."""

import math

import pytest
import torch
from oracles import gaussian, grouped_batch, point_batch
from torch import Tensor

from fastgen import signals
from fastgen.rollout import RolloutPolicy, backward_simulation, next_levels, trajectory, transition_law
from fastgen.schedule import FlowSchedule, Schedule, VPSchedule

FLOW = FlowSchedule()
CPS = RolloutPolicy(timesteps=(1.0, 0.75, 0.5, 0.25), transition="cps", eta=0.9)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(value: float, count: int) -> Tensor:
    return torch.full((count,), value, dtype=torch.float64)


def regression(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and intercept of y on x."""
    slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var(correction=0)
    return slope.item(), (y.mean() - slope * x.mean()).item()


# --- transitions


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("schedule", [FLOW, "vp"], ids=["flow", "vp"])
def test_a_transition_from_the_true_pair_has_the_exact_marginal(
    schedule: Schedule | str, eta: float, vp_schedule: VPSchedule
) -> None:
    """x_s given the true (x0, noise) is alpha_s x0 plus noise of std sigma_s, for every eta."""
    schedule = vp_schedule if isinstance(schedule, str) else schedule
    count = 200_000
    x0, noise, fresh = (randn(count, 1, seed=i) for i in range(3))
    t, s = full(0.8, count), full(0.45, count)
    mean, std = transition_law(schedule, x0, schedule.add_noise(x0, noise, t), t, s, eta)
    alpha, sigma = schedule.coefficients(s, x0)
    residual = (mean + std * fresh - alpha * x0) / sigma
    exact = ((mean - alpha * x0) / sigma).square().mean() + (std / sigma).square().mean()
    print(f"std of the residual {residual.std():.4f}, correlation with x0 {(residual * x0).mean():.4f}")
    assert abs(residual.std() - 1) < 8e-3 and abs((residual * x0).mean()) < 5e-3
    assert abs(exact - 1) < 8e-3


def test_the_transitions_meet_at_their_ends() -> None:
    """eta = 0 is the Euler step x + (s - t) v, eta = 1 renoising, and at level 0 a step is its clean prediction."""
    x0, x_t, t, s = randn(5, 3), randn(5, 3, seed=1), full(0.7, 5), full(0.2, 5)
    velocity = (x_t - x0) / 0.7
    mean, std = transition_law(FLOW, x0, x_t, t, s, 0.0)
    assert torch.allclose(mean, x_t + (0.2 - 0.7) * velocity, atol=1e-14) and bool((std == 0).all())
    mean, std = transition_law(FLOW, x0, x_t, t, s, 1.0)
    assert torch.equal(mean, 0.8 * x0) and bool((std == 0.2).all())
    for eta in (0.0, 0.9, 1.0):
        mean, std = transition_law(FLOW, x0, x_t, t, 0 * s, eta)
        assert torch.allclose(mean, x0) and bool((std == 0).all())


def test_log_probabilities_are_those_of_the_normal_law_up_to_their_constant() -> None:
    x, mean, std = randn(6, 2, 3), randn(6, 2, 3, seed=1).requires_grad_(), full(0.3, 6)[:, None, None]
    exact = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)
    constant = 6 * math.log(0.3 * math.sqrt(2 * math.pi))
    nats = signals.transition_log_prob(x, mean, std, reduction="sum", scaled=True)
    assert torch.allclose(nats, exact + constant, atol=1e-5)
    rtdmd = signals.transition_log_prob(x, mean, std)  # RTDMD's unit: 2 std^2 / d times the true one
    assert torch.allclose(rtdmd, nats * 2 * 0.3**2 / 6, atol=1e-6)
    nats.sum().backward()
    assert mean.grad is not None and torch.allclose(mean.grad, ((x - mean) / std**2).detach(), atol=1e-5)
    with pytest.raises(ValueError, match="deterministic"):
        signals.transition_log_prob(x, mean, 0 * std)


def test_a_trajectory_keeps_every_step_and_scores_the_stochastic_ones() -> None:
    student, batch = gaussian(), grouped_batch(12, 4, key=3)
    rollout = trajectory(student, CPS, batch)
    assert [step.t[0].item() for step in rollout.steps] == list(CPS.timesteps)
    assert [step.log_prob is None for step in rollout.steps] == [False, False, False, True]
    for here, after in zip(rollout.steps, rollout.steps[1:], strict=False):
        assert torch.equal(here.x_next, after.x_t)
        mean, std = transition_law(FLOW, student(here.x_t, here.t, batch.cond), here.x_t, here.t, after.t, 0.9)
        again = signals.transition_log_prob(here.x_next, mean, std)
        assert here.log_prob is not None and torch.allclose(again, here.log_prob, atol=1e-6)
    assert torch.equal(rollout.x, rollout.steps[-1].x0) and bool((rollout.s == 0).all())


def test_shared_steps_share_their_noise_within_a_group_alone() -> None:
    """What is left to differ within a group after a shared step is the initial noise: steps 0 to 2 shared give
    x_next with one fresh noise a group."""
    batch = grouped_batch(12, 4, key=3)
    rollout = trajectory(gaussian(), CPS, batch, shared_steps={0, 2})
    for i, shared in enumerate((True, False, True)):
        step = rollout.steps[i]
        t_next = torch.full_like(step.t, CPS.timesteps[i + 1])
        mean, std = transition_law(FLOW, step.x0, step.x_t, step.t, t_next, 0.9)
        fresh = ((step.x_next - mean) / std).reshape(3, 4)
        spread = (fresh - fresh[:, :1]).abs().max().item()
        assert (spread < 1e-9) == shared
        assert (fresh[0, 0] - fresh[1, 0]).abs() > 1e-3


@pytest.mark.parametrize("transition", ["ode", "renoise", "cps"])
def test_backward_simulation_stops_at_the_level_it_is_told(transition: str) -> None:
    """x_s follows the policy's own transition from the executed step, with gradient; s = 0 is the clean prediction."""
    eta = {"eta": 0.9} if transition == "cps" else {}
    policy = RolloutPolicy(timesteps=CPS.timesteps, transition=transition, **eta)  # type: ignore[arg-type]
    batch, student = point_batch(8, dim=1), gaussian()
    stop = torch.tensor([0, 1, 2, 3] * 2)
    to = next_levels(policy, stop, batch.normal("initial"))
    assert to.tolist() == [0.75, 0.5, 0.25, 0.0] * 2
    rollout = backward_simulation(student, policy, batch, stop, to=to)
    step = rollout.steps[0]
    mean, std = transition_law(FLOW, step.x0, step.x_t, step.t, to, policy.transition_eta)
    expected = mean + std * (batch.normal("exit") if policy.transition_eta else 0)
    assert torch.allclose(rollout.x, expected, atol=1e-13) and torch.equal(rollout.s, to)
    clean = backward_simulation(student, policy, batch, stop)
    assert torch.equal(clean.x, step.x0) and torch.allclose(clean.x[to == 0], rollout.x[to == 0], atol=1e-13)


# --- training above level 0


def test_the_sub_interval_target_regresses_to_the_true_denoiser_and_the_naive_one_does_not() -> None:
    """m = .7, std 1.3, s = .4, t = .75: the true velocity has slope .4902 and intercept -.7858 in x_t."""
    count, s, t = 2_000_000, 0.4, 0.75
    x0 = 0.7 + 1.3 * randn(count, 1)
    x_s = FLOW.add_noise(x0, randn(count, 1, seed=1), full(s, count))
    noise = randn(count, 1, seed=2)
    x_t = FLOW.renoise(x_s, noise, full(s, count), full(t, count))
    target = signals.renoised_target(FLOW, x_s, noise, full(s, count), full(t, count))
    slope, intercept = regression(x_t, (x_t - target) / t)
    naive = regression(x_t, noise - x_s)
    print(f"velocity {slope:.4f} {intercept:.4f}; naive {naive[0]:.4f} {naive[1]:.4f}")
    assert abs(slope - 0.4902) < 2e-3 and abs(intercept + 0.7858) < 3e-3
    assert abs(naive[0] - 0.4902) > 0.1 and abs(naive[1] + 0.7858) > 0.2


def test_the_sub_interval_target_as_a_velocity_is_phased_dmds() -> None:
    """-x_s / (1 - s) + (t + (1 - t) s^2 / (1 - s)^2) / sigma_ts noise; at s = 0 it is noise - x0."""
    x_s, noise, s, t = randn(7, 2), randn(7, 2, seed=1), full(0.4, 7), full(0.75, 7)
    x_t = FLOW.renoise(x_s, noise, s, t)
    velocity = FLOW.from_sample(signals.renoised_target(FLOW, x_s, noise, s, t), x_t, t, "flow_prediction")
    sigma_ts = math.sqrt(0.75**2 - (0.25 / 0.6 * 0.4) ** 2)
    published = -x_s / 0.6 + (0.75 + 0.25 * 0.4**2 / 0.6**2) / sigma_ts * noise
    assert torch.allclose(velocity, published, atol=1e-13)
    assert torch.equal(signals.renoised_target(FLOW, x_s, noise, 0 * s, t), x_s)
    weight = signals.renoised_weight(FLOW, s, t)
    assert torch.allclose(weight * (1 / sigma_ts**2), full(min(1 / sigma_ts**2, 10.0), 7))
    assert signals.renoised_weight(FLOW, s, s + 0.01).max() < 0.2  # close to s the target is large: clamped


# --- groups and advantages


def test_a_group_normaliser_of_one_sample_is_dmds_and_of_many_the_mean() -> None:
    x, fake, real = randn(6, 3), randn(6, 3, seed=1), randn(6, 3, seed=2)
    alone = signals.score_difference(x, fake, real, group=torch.arange(6))
    assert torch.equal(alone, signals.score_difference(x, fake, real))
    group = torch.tensor([5, 5, 5, 2, 2, 2])
    g = signals.score_difference(x, fake, real, group=group)
    for rows in (slice(0, 3), slice(3, 6)):
        assert torch.allclose(g[rows], (fake - real)[rows] / (x - real)[rows].abs().mean(), atol=1e-14)


def test_group_means_leave_masked_samples_out() -> None:
    value, group = torch.tensor([1.0, 3.0, float("nan"), 4.0]), torch.tensor([0, 0, 0, 7])
    mask = torch.tensor([True, True, False, False])
    assert signals.group_mean(value, group, mask).tolist() == [2.0, 2.0, 2.0, 0.0]


def test_advantages_are_centred_scale_free_and_zero_without_a_difference() -> None:
    group = torch.arange(12) // 4
    reward = randn(12).float()
    reward[8:] = 0.3  # a group in which all are equal
    a = signals.advantages(reward, group)
    assert torch.allclose(signals.group_mean(a, group), torch.zeros(12), atol=1e-6)
    assert torch.allclose(a[:8].reshape(2, 4).std(1, correction=0), torch.ones(2), atol=1e-3)
    assert torch.equal(a[8:], torch.zeros(4))
    scaled = signals.advantages(100 * reward + 7, group)
    assert torch.allclose(scaled[:8], a[:8], atol=2e-3)
    centred = (reward - signals.group_mean(reward, group))[:8]
    shifted = reward + torch.tensor([0.0, 5.0, -5.0]).repeat_interleave(4)
    for std, spread in (("batch", shifted.std(correction=0)), ("within_groups", (centred.square().sum() / 12).sqrt())):
        a = signals.advantages(shifted, group, std=std)  # type: ignore[arg-type]
        assert torch.allclose(a[:8], centred / (spread + 1e-4), atol=1e-5), std
    assert signals.advantages(torch.tensor([0.0] * 99 + [1.0]), torch.zeros(100).long()).max() == 5.0


def test_equal_rewards_have_no_advantage_whatever_their_size() -> None:
    """The float32 mean of ten equal numbers is not always that number; its rounding is no difference of rewards."""
    group = torch.zeros(10, dtype=torch.int64)
    for value in (0.1, 300.1, -7e4 / 3, 1e-9, 0.0):
        for std in ("group", "batch", "within_groups", "none"):
            assert torch.equal(signals.advantages(torch.full((10,), value), group, std=std), torch.zeros(10))  # type: ignore[arg-type]


def test_an_invalid_reward_is_left_out_and_is_not_a_zero() -> None:
    reward, group = torch.tensor([1.0, 3.0, float("nan"), 5.0, 2.0]), torch.tensor([0, 0, 0, 1, 1])
    valid = torch.tensor([True, True, False, True, False])
    a = signals.advantages(reward, group, valid, std="none")
    assert a.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0]


def test_gdpo_divides_by_the_spread_of_the_whole_batch_and_weighs_the_parts() -> None:
    """T = sum_k w_k (r_k - mean_g r_k) / (std r_k + 1e-4), A = T / (std T + 1e-4), in numbers of one's own. Fails
    without the weights, with a spread within groups, and if the parts are clipped."""
    group, valid = torch.arange(400) // 8, torch.ones(400, dtype=torch.bool)
    small = randn(400).float() + 3 * randn(50, seed=2).float().repeat_interleave(8)
    wide = 1000 * randn(400, seed=1).float()
    wide[5] = 2e5  # one part of T is 200 times its standard deviation
    weights = {"a": 1.0, "b": 2.5}
    total = torch.zeros(400, dtype=torch.float64)
    for part, weight in ((small, 1.0), (wide, 2.5)):
        part = part.double()
        total += weight * (part - part.reshape(50, 8).mean(1).repeat_interleave(8)) / (part.std(correction=0) + 1e-4)
    expected = (total / (total.std(correction=0) + 1e-4)).clamp(-5, 5)
    a = signals.gdpo_advantages({"a": small, "b": wide}, weights, group, valid)
    error = (a - expected).abs().max().item()
    print(f"{error:.1e}")
    assert error < 1e-5 and a[5] == 5
    equal = signals.gdpo_advantages({"a": small, "b": wide}, {"a": 1.0, "b": 1.0}, group, valid)
    assert (a - equal).abs().max() > 0.1


def test_within_groups_gives_equal_weights_equal_influence() -> None:
    """A reward of a thousand times the range does not drown the other, nor does one that differs less between prompts
    drown one that differs more: each has the same correlation with A. With std: batch one has more than twice that of
    the other."""
    group, valid = torch.arange(400) // 8, torch.ones(400, dtype=torch.bool)
    between = 5 * randn(50, seed=3).float().repeat_interleave(8)
    small, wide = randn(400).float() + between, 1000 * randn(400, seed=1).float()

    def influence(std: signals.Spread) -> list[float]:
        a = signals.gdpo_advantages({"a": small, "b": wide}, {"a": 1.0, "b": 1.0}, group, valid, std)
        assert abs(a.square().mean() - 1) < 0.05
        parts = [signals.advantages(r, group, std="within_groups") for r in (small, wide)]
        return [torch.corrcoef(torch.stack([a, part]))[0, 1].item() for part in parts]

    ours, published = influence("within_groups"), influence("batch")
    print(ours, published)
    assert abs(ours[0] - ours[1]) < 1e-3 and published[0] < published[1] / 2


def test_the_policy_loss_is_reinforce_on_policy_and_flat_beyond_its_clip() -> None:
    log_ratio = torch.zeros(4, requires_grad=True)
    advantage = torch.tensor([1.0, -2.0, 0.0, 3.0])
    signals.policy_loss(log_ratio, advantage, 0.2).backward()
    assert log_ratio.grad is not None and torch.allclose(log_ratio.grad, -advantage / 3)
    outside = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    signals.policy_loss(outside, torch.tensor([1.0, -1.0, -1.0, 1.0]), 0.2).backward()
    assert outside.grad is not None and bool((outside.grad[:2] == 0).all()) and bool((outside.grad[2:] != 0).all())


# --- the hinge


def test_the_hinge_optimum_is_two_times_one_minus_total_variation() -> None:
    """N(0, 1) against N(1, 1): D = sign(p_real - p_fake) gives 2 (1 - TV) = 1.2342."""
    x = torch.linspace(-12, 13, 200_001, dtype=torch.float64)
    real, fake = (torch.exp(-0.5 * (x - m) ** 2) / math.sqrt(2 * math.pi) for m in (0.0, 1.0))
    step = (x[1] - x[0]).item()

    def loss(d: Tensor) -> float:
        return ((real * torch.relu(1 - d)).sum() + (fake * torch.relu(1 + d)).sum()).item() * step

    best = loss(torch.sign(real - fake))
    assert abs(best - 1.2342) < 1e-4
    assert best < min(loss(torch.tanh(real - fake)), loss(0 * x)) and abs(loss(0 * x) - 2) < 1e-6
    logits = randn(10), randn(10, seed=1)
    expected = torch.relu(1 - logits[0]).mean() + torch.relu(1 + logits[1]).mean()
    assert torch.equal(signals.hinge_discriminator_loss(*logits), expected)
    assert torch.equal(signals.hinge_generator_loss(logits[1]), -logits[1].mean())
