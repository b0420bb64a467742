"""GNDM against closed forms: its path form beside DMD2, its reward as a log-ratio, its policy gradient; replayed
trajectories; and who gets gradient.

For data N(m, S) the exact denoiser is known at every level, and so are R_dm and its gradients. In one dimension,
unless it says otherwise."""

import math
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from oracles import (
    AffineStudent,
    Given,
    Recorder,
    affine_networks,
    gaussian,
    grouped_batch,
    reached,
    tiny_networks,
    touched,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.gaussian_mixture import AnalyticDenoiser
from fastgen.batch import Batch, Conditioning
from fastgen.config import build_recipe
from fastgen.evaluation.folders import evaluate_path
from fastgen.networks import Networks
from fastgen.objectives import DMD2, GNDM, Loss, State, Turn, replay
from fastgen.registry import RecipeError
from fastgen.rewards import Score
from fastgen.rollout import RolloutPolicy, step_log_prob, trajectory
from fastgen.schedule import FlowSchedule, VPSchedule, expand
from fastgen.train import main

ROOT = Path(__file__).parents[1]
FLOW = FlowSchedule()
FOUR = RolloutPolicy(timesteps=(1.0, 0.75, 0.5, 0.25))
TWO = RolloutPolicy(timesteps=(1.0, 0.5))
STUDENT, FAKE = Turn("student", ("student",)), Turn("fake_score", ("fake_score",))


def losses(objective: GNDM, turn: Turn, networks: Networks, batch: Batch, state: State) -> list[Loss]:
    """Backpropagates all losses of a micro-batch, as the loop does."""
    result = objective.loss(turn, networks, batch, state)
    kept = []
    for loss in [result] if isinstance(result, Loss) else result:
        loss.total.backward()
        kept.append(loss)
    return kept


def largest(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """The largest difference between two lists of tensors."""
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def gradients(module: nn.Module) -> list[Tensor]:
    """Taken off the parameters."""
    taken = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
    module.zero_grad()
    return taken


# --- the path form


@pytest.mark.parametrize(("stops", "dmd2_stops"), [("per_group", "per_sample"), ("shared", "shared")])
def test_a_group_of_one_is_dmd2(stops: Any, dmd2_stops: Any) -> None:
    """Bit for bit: both turns' losses and every gradient."""
    ours = GNDM(group_size=1, stops=stops, condition_on_stop=True, guidance_scale=2.0)
    theirs = DMD2(stops=dmd2_stops, condition_on_stop=True, guidance_scale=2.0)
    batch = grouped_batch(32, 1, key=3, dim=2)
    found = []
    for objective in (ours, theirs):
        networks = tiny_networks(objective, FOUR)
        with torch.no_grad():  # so that being told another stop would show
            table = networks.fake_score.time_embedding.tables["stop"].weight  # type: ignore[union-attr,index]
            table.copy_(torch.linspace(-1, 1, table.numel()).view_as(table))
        for turn in (STUDENT, FAKE):
            loss = objective.loss(turn, networks, batch, objective.init_state())
            assert isinstance(loss, Loss)
            loss.total.backward()
            found.append([loss.total.detach(), *gradients(networks[turn.name])])
    pairs = [*zip(found[0], found[2], strict=True), *zip(found[1], found[3], strict=True)]
    print(f"{len(pairs)} tensors, largest difference {max((a - b).abs().max().item() for a, b in pairs)}")
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_group_has_one_scale_and_its_size_does_not_matter() -> None:
    """g_i = d_i / (mean of the group's n): directions and relative sizes within a group are those of d; all d and n of
    a group times c change nothing; another group's scale does not enter. Fails if each sample is divided by its own n,
    or by the batch's."""
    batch, objective = grouped_batch(24, 8, dim=2), GNDM()
    x, d, n = batch.normal("x"), batch.normal("d"), batch.normal("n")

    def g(scale: Tensor) -> Tensor:
        real = x + expand(scale, x) * n
        networks = Networks({"teacher": Given(real), "fake_score": Given(real + expand(scale, x) * d)}, FOUR)
        return objective.score_gradient(networks, batch, x, torch.zeros_like(batch.ids))[0]

    assert batch.group is not None
    plain, scaled = g(torch.ones(24)), g(torch.tensor([1.0, 1e-3, 50.0])[batch.group])
    exact = torch.cat([d[i : i + 8] / n[i : i + 8].abs().mean() for i in (0, 8, 16)])
    errors = [(plain - exact).abs().max().item(), (scaled - plain).abs().max().item()]
    print(errors)
    assert max(errors) < 1e-12


def test_a_group_is_judged_at_one_level_with_one_noise() -> None:
    """In both forms. Fails if t or noise are drawn a sample. The students' own noise is not shared."""
    batch, objective, teacher = grouped_batch(24, 8), GNDM(), Recorder(Given(torch.zeros(1)))
    x = batch.normal("x")
    networks = Networks({"teacher": teacher, "fake_score": Given(torch.zeros(1))}, FOUR)
    for judge in (
        lambda: objective.score_gradient(networks, batch, x, torch.zeros_like(batch.ids)),
        lambda: GNDM(form="score").log_ratio(networks, batch, x),
    ):
        judge()
        x_t, t = teacher.calls[-1][:2]
        noise = (x_t - (1 - t[:, None]) * x) / t[:, None]
        for value in (t, noise[:, 0]):
            groups = value.reshape(3, 8)
            assert (groups - groups[:, :1]).abs().max() < 1e-12
            assert groups[:, 0].unique().numel() == 3
    student = AffineStudent(0.0, 1.0, FOUR)
    made = objective.rollout(Networks({"student": student, "teacher": teacher}, FOUR), batch, grad=False)
    assert made.stop.reshape(3, 8).unique(dim=1).shape == (3, 1)  # one stop a group
    assert made.x.unique().numel() == 24


def test_a_pure_shift_is_not_centred_away() -> None:
    """Teacher N(.7, S), student N(-1, S): at shared t all samples of a group have the same d = rho_t (m_f - m_r), and
    that is all signal. Fails if the group-mean vector is subtracted: the student would get no gradient at all.

    The student's gradient on a is the mean of g, in closed form; and with it the student moves to .7."""
    student, objective, batch = AffineStudent(-1.0, 1.3), GNDM(), grouped_batch(800, 8)
    networks = affine_networks(student, gaussian())
    losses(objective, STUDENT, networks, batch, objective.init_state())
    assert student.a.grad is not None and batch.group is not None
    t = objective.renoise_time(batch.uniform("renoise_time", by_group=True))[:, None]
    rho = t**2 / ((1 - t) ** 2 * 1.3**2 + t**2)
    x = -1 + 1.3 * batch.normal("initial")
    x_t = (1 - t) * x + t * batch.normal("renoise", by_group=True)
    distance = (x - networks.teacher(x_t, t[:, 0], batch.cond)).abs()[:, 0]
    exact = (rho[:, 0] * -1.7 / signals.group_mean(distance, batch.group)).mean()
    print(f"gradient on a {student.a.grad.item():.6f}, closed form {exact:.6f}")
    assert abs(student.a.grad.item() - exact) < 1e-10 and exact < -0.1


def test_an_affine_student_converges_by_the_path_form() -> None:
    """Against the exact fake score of where it stands, from N(-1, .4^2) to N(.7, 1.3^2)."""
    objective, student = GNDM(), AffineStudent(-1.0, 0.4)
    networks = affine_networks(student, gaussian())
    optimizer = torch.optim.Adam(student.parameters(), 0.04)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=250)
    for step in range(250):
        optimizer.zero_grad()
        losses(objective, STUDENT, networks, grouped_batch(512, 8, step, first=512 * step), objective.init_state())
        optimizer.step()
        decay.step()
    mean, std = student.a.item(), abs(student.b.item())
    print(f"mean {mean:.4f}, std {std:.4f}")
    assert abs(mean - 0.7) < 0.02 and abs(std - 1.3) < 0.02


# --- R_dm


def nodes(count: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite: expectations under N(0, 1) are sums with these weights."""
    z, w = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(z), torch.tensor(w / w.sum())


def log_ratio(real: AnalyticDenoiser, fake: AnalyticDenoiser, x: Tensor, low: float, high: float) -> Tensor:
    """`signals.log_ratio_rate` integrated by quadrature over noise and log t, at points x [N, 1]: [N]."""
    u, du = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(80))
    span, (z, v) = math.log(high / low) / 2, nodes(40)
    t = low * torch.exp(span * (u + 1))
    weight = (span * t * du)[:, None, None] * v[None, :, None]
    t, z, at = (a.flatten() for a in torch.broadcast_tensors(t[:, None, None], z[None, :, None], x[None, None, :, 0]))
    at, cond = at[:, None], Conditioning({"label": torch.zeros(len(t), dtype=torch.int64)})
    x_t = real.schedule.add_noise(at, z[:, None], t)
    rate = signals.log_ratio_rate(real.schedule, at, t, fake(x_t, t, cond), real(x_t, t, cond))
    return (weight * rate.reshape(80, 40, len(x))).sum((0, 1))


def exact_log_ratio(x: Tensor, m: float, s: float, m_f: float, s_f: float) -> Tensor:
    real, fake = (torch.distributions.Normal(torch.tensor(a, dtype=x.dtype), b) for a, b in ((m, s), (m_f, s_f)))
    return real.log_prob(x) - fake.log_prob(x)


@pytest.mark.parametrize("name", ["flow", "vp"])
def test_the_rate_integrates_to_the_log_ratio(name: str, vp_schedule: VPSchedule) -> None:
    """x = .8, N(.2, 1.1^2) against N(-.3, .7^2): log p_real - log p_fake = .63395, on either schedule. Stable
    Diffusion's has SNR .0047 left at t = 1: the missing end of the integral is its error."""
    schedule, low = (FLOW, 1e-4) if name == "flow" else (vp_schedule, 1e-5)
    found = log_ratio(
        gaussian(0.2, 1.1, schedule), gaussian(-0.3, 0.7, schedule), torch.tensor([[0.8]]).double(), low, 1.0 - 1e-9
    ).item()
    exact = exact_log_ratio(torch.tensor(0.8).double(), 0.2, 1.1, -0.3, 0.7).item()
    print(f"{name}: {found:.5f}, exact {exact:.5f}")
    assert abs(exact - 0.63395) < 1e-5 and abs(found - exact) < (1e-4 if name == "flow" else 3e-3)


def legendre(low: float, high: float, count: int = 40) -> list[tuple[float, float]]:
    """Averages over (low, high) are sums of f(t) with these (t, weight)."""
    u, w = np.polynomial.legendre.leggauss(count)
    return [(low + (high - low) * (a + 1) / 2, b / 2) for a, b in zip(u.tolist(), w.tolist(), strict=True)]


def test_the_estimate_of_r_dm_is_unbiased() -> None:
    """The objective's own draws, averaged over 40,000 groups of two: E[log p_t(x_t) - log q_t(x_t)] over the noise and
    over t in (.02, .98), from the exact densities. And shared draws compare two samples better than they measure them.
    """
    objective, batch = GNDM(form="score"), grouped_batch(80_000, 2)
    points = torch.tensor([0.8, -0.5], dtype=torch.float64)
    networks = Networks({"teacher": gaussian(0.2, 1.1), "fake_score": gaussian(-0.3, 0.7)}, FOUR)
    found = objective.log_ratio(networks, batch, points.repeat(40_000)[:, None]).reshape(-1, 2)
    exact, (z, w) = torch.zeros(2, dtype=torch.float64), nodes(40)
    for t, weight in legendre(0.02, 0.98):
        x_t = (1 - t) * points + t * z[:, None]
        scale = [math.hypot((1 - t) * std, t) for std in (1.1, 0.7)]
        ratio = exact_log_ratio(x_t, (1 - t) * 0.2, scale[0], (1 - t) * -0.3, scale[1])
        exact += weight * (w[:, None] * ratio).sum(0)
    error = (found.mean(0) - exact) / (found.std(0) / 200)
    spread = [(found[:, 0] - found[:, 1]).std().item(), found.std(0).square().sum().sqrt().item()]
    print(f"mean {found.mean(0).tolist()}, exact {exact.tolist()}, off by {error.tolist()} standard errors")
    print(f"std of the difference {spread[0]:.3f}; it would be {spread[1]:.3f} with draws of their own")
    assert error.abs().max() < 4 and spread[0] < 0.95 * spread[1]


def test_r_dm_is_zero_where_the_student_is_the_teacher() -> None:
    """For every sample and draw, not on average; its advantages and policy losses are then 0 as well."""
    objective = GNDM(form="score")
    networks = affine_networks(AffineStudent(0.0, 0.5, TWO), gaussian(0.3, 0.8), gaussian(0.3, 0.8))
    batch = grouped_batch(64, 8)
    assert bool((objective.log_ratio(networks, batch, batch.normal("x")) == 0).all())
    found = losses(objective, STUDENT, networks, batch, objective.init_state())
    assert [loss.total.item() for loss in found] == [0.0, 0.0]


def test_the_score_function_of_a_renoised_sample_is_dmds_direction() -> None:
    """The Stein bridge for x_t = (1 - t) x + t eps, R_t = log p_t - log q_t: E[R_t eps] (1 - t) / t, which is
    E[R_t grad_x log N(x_t; (1 - t) x, t^2)], equals (1 - t) E[s_real - s_fake]. Over eps by quadrature."""
    real, fake, (z, w) = gaussian(0.2, 1.1), gaussian(-0.3, 0.7), nodes(30)
    for t_value in (0.1, 0.5, 0.9):
        x = torch.full((30, 1), 0.8, dtype=torch.float64, requires_grad=True)
        t, cond = torch.full((30,), t_value, dtype=torch.float64), Conditioning({"label": torch.zeros(30).long()})
        alpha, sigma = FLOW.coefficients(t, x)
        x_t = (alpha * x + sigma * z[:, None]).detach()
        log_p, log_q = (m.mixture.log_density(x_t, alpha, sigma, cond["label"]) for m in (real, fake))
        log_prob = signals.transition_log_prob(x_t, alpha * x, sigma, "sum", scaled=True)
        (score_function,) = torch.autograd.grad((w * (log_p - log_q) * log_prob).sum(), x)
        scores = [FLOW.score(m(x_t, t, cond), x_t, t)[:, 0] for m in (real, fake)]
        path = (1 - t_value) * (w * (scores[0] - scores[1])).sum()
        stein = (w * (log_p - log_q) * z).sum() * (1 - t_value) / t_value
        errors = [abs(score_function.sum() - path).item(), abs(stein - path).item()]
        print(f"t = {t_value}: path {path:.4f}, errors {errors}")
        assert max(errors) < 1e-5


def test_r_dm_as_a_reward_gives_the_gradient_of_the_divergence() -> None:
    """p_theta = N(mu, s^2), real N(m, S): E[R_dm d log p_theta / d mu] = -(mu - m) / S."""
    (mu, s), (m, std), (z, w) = (0.9, 0.6), (0.2, 1.1), nodes(24)
    x = (mu + s * z)[:, None]
    found = (w * log_ratio(gaussian(m, std), gaussian(mu, s), x, 1e-4, 1.0) * z / s).sum().item()
    print(f"{found:.5f}, exact {-(mu - m) / std**2:.5f}")
    assert abs(found + (mu - m) / std**2) < 2e-3


# --- the score form


def test_the_policy_term_is_the_gradient_of_r_dm_through_the_stochastic_step() -> None:
    """Two affine steps: x_1 = .5 (a_0 + b_0 z) + .5 eps, x = a_1 + b_1 x_1. With a floor that dwarfs every std the
    advantages are (R_dm - mean) / floor; the policy loss's gradient, times floor K / (K - 1) and out of its unit, is
    that of E[R_dm] on (a_0, b_0), which is closed form; on (a_1, b_1) it has none."""
    count, size, floor, unit = 160_000, 8, 1e4, 2 * 0.5**2
    student = AffineStudent((0.4, -0.2), (0.7, 1.1), TWO)
    mean, variance = -0.2 + 1.1 * 0.5 * 0.4, 1.1**2 * (0.25 * 0.7**2 + 0.25)
    networks = affine_networks(student, gaussian(0.9, 1.3), gaussian(mean, math.sqrt(variance)))
    objective = GNDM(form="score", std_floor=floor, num_pairs=8)
    first = next(iter(objective.loss(STUDENT, networks, grouped_batch(count, size), objective.init_state())))  # type: ignore[arg-type]
    first.total.backward()
    found = -torch.stack(gradients(student)) * floor * size / (size - 1) / unit

    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 0.7))
    m, v = -0.2 + 1.1 * 0.5 * a, 1.1**2 * (0.25 * b**2 + 0.25)
    total = torch.zeros((), dtype=torch.float64)
    for t, weight in legendre(0.02, 0.98):
        for sign, center, spread in ((1, 0.9, 1.69), (-1, mean, variance)):  # E log N(x_t; (1 - t) center, V_t)
            error = (1 - t) ** 2 * (v + (m - center) ** 2) + t**2
            total = total - sign * weight * 0.5 * error / ((1 - t) ** 2 * spread + t**2)
    exact = torch.stack(torch.autograd.grad(total, (a, b)))
    print(f"on (a_0, b_0) {found[:, 0].tolist()}, exact {exact.tolist()}; on (a_1, b_1) {found[:, 1].tolist()}")
    assert (found[:, 0] - exact).abs().max() < 0.02 and exact.abs().min() > 0.05
    assert bool((found[:, 1] == 0).all())


def score_networks(objective: GNDM, scorer: Any = None, policy: RolloutPolicy = FOUR) -> Networks:
    networks = tiny_networks(objective, policy, scorer)
    with torch.no_grad():
        for p in networks.fake_score.parameters():  # so that the fake is not the student's own start
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    return networks


def test_ratios_are_one_on_policy() -> None:
    """Exactly: new log-probabilities are computed as the stored ones were. The gradient is REINFORCE's, - mean A grad
    log pi, and the path term's weight is 1."""
    objective, batch = GNDM(form="score"), grouped_batch(32, 8, dim=2)
    networks = score_networks(objective)
    found = losses(objective, STUDENT, networks, batch, objective.init_state())
    assert len(found) == 4 and found[-1].terms["importance"] == 1
    gradients(networks.student)
    used, _ = objective.trajectories(networks, batch, objective.init_state())
    for k in range(3):
        assert found[k].total.item() == pytest.approx(-used["advantage"].mean().item(), abs=1e-7)
    *policy_losses, _ = objective.loss(STUDENT, networks, batch, objective.init_state())  # type: ignore[misc]
    sum(loss.total for loss in policy_losses).backward()
    ppo, x = gradients(networks.student), used["x"].unbind(1)
    for k in range(3):
        x0 = networks.student(x[k], x[k].new_full((32,), FOUR.timesteps[k]), batch.cond)
        log_prob = step_log_prob(networks.student.schedule, networks.policy, k, x0, x[k], x[k + 1])
        (-used["advantage"] * log_prob).mean().backward()
    error = largest(ppo, gradients(networks.student))
    print(f"PPO against REINFORCE {error:.1e}")
    assert error < 1e-6


def test_samples_without_an_advantage_count_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """As zeros: halves of an update have the gradient of the whole, though the first group has no advantage."""
    objective, advantages = GNDM(form="score"), signals.advantages
    networks = score_networks(objective)

    def some(reward: Tensor, group: Tensor, *rest: Any, **options: Any) -> Tensor:
        return advantages(reward, group, *rest, **options) * (group > 0)

    monkeypatch.setattr(signals, "advantages", some)
    found = []
    for parts in (1, 2):
        for i in range(parts):
            batch = grouped_batch(16 // parts, 8, dim=2, first=16 // parts * i)
            losses(objective, STUDENT, networks, batch, objective.init_state())
        found.append([grad / parts for grad in gradients(networks.student)])
    assert largest(*found) < 1e-6 < 1e-3 < max(grad.abs().max() for grad in found[0])


def test_the_last_step_is_trained_by_the_path_form_alone() -> None:
    """An affine student with a parameter a step: the policy losses reach all but the last, the path loss the last
    alone, with min(pi / pi_old, 1 + clip) on each sample. Fails if the path term is left out."""
    objective, batch, policy = GNDM(form="score", clip=0.3, replay_updates=2), grouped_batch(64, 8), FOUR
    student = AffineStudent((0.1, 0.2, 0.3, 0.4), (0.9, 0.8, 0.7, 0.6), policy)
    networks = affine_networks(student, gaussian(), gaussian(0.2, 0.6))
    state = objective.init_state()
    *first, last = objective.loss(STUDENT, networks, batch, state)  # type: ignore[misc]
    sum(loss.total for loss in first).backward()
    for grad in gradients(student):
        assert bool((grad[:3] != 0).all()) and grad[3] == 0
    last.total.backward()
    for grad in gradients(student):
        assert bool((grad[:3] == 0).all()) and grad[3] != 0

    objective.finish(STUDENT, networks, state)
    with torch.no_grad():
        student.b[:3] += 0.3  # off policy now
    *_, last = objective.loss(STUDENT, networks, batch, state)  # type: ignore[misc]
    last.total.backward()
    used = replay.recall(state, batch.ids)
    x = used["x"].unbind(1)
    predictions = [student(x[k], x[k].new_full((64,), policy.timesteps[k]), batch.cond) for k in range(3)]
    schedule = networks.student.schedule
    new = [step_log_prob(schedule, networks.policy, k, x0, x[k], x[k + 1]) for k, x0 in enumerate(predictions)]
    weight = (torch.stack(new, 1) - used["log_prob"]).sum(1).exp().clamp(max=1.3).detach()
    g, _ = objective.score_gradient(networks, batch, student.a[3] + student.b[3] * x[3], torch.full((64,), 3))
    exact = (weight * g[:, 0]).mean().item()
    found = gradients(student)[0][3].item()
    print(f"path gradient on a_3 {found:.6f}, exact {exact:.6f}; weights {weight.min():.2f} to {weight.max():.2f}")
    assert abs(found - exact) < 1e-6 and weight.min() < 0.95 and weight.max() == 1.3


def test_advantages_of_the_log_ratio_and_of_a_reward() -> None:
    """A = (R - mean_g) / (std_g + floor) + weight times the reward's, centred and scale-free in its group: an affine
    map of the rewards changes nothing, equal rewards add nothing, an invalid one is no zero."""
    objective, batch = GNDM(form="score", reward_weight=0.7, std_floor=0.05), grouped_batch(32, 8, dim=2)
    reward, valid = batch.normal("reward")[:, 0].float(), torch.ones(32, dtype=torch.bool)

    def advantage(value: Tensor | None, valid: Tensor = valid) -> tuple[Tensor, dict[str, Tensor]]:
        used_by = objective if value is not None else GNDM(form="score", std_floor=0.05)
        networks = score_networks(objective, lambda x0, prompts, group, grad: Score(value, valid))  # type: ignore[arg-type]
        used, terms = used_by.trajectories(networks, batch, objective.init_state())
        r_dm = used_by.log_ratio(networks, batch, trajectory(networks.student, networks.policy, batch).x)
        spread = r_dm.detach().reshape(4, 8).std(1, correction=0).square().mean().sqrt()
        assert torch.allclose(terms["r_dm_std"], spread.to(terms["r_dm_std"]))
        return used["advantage"], terms

    (alone, terms), (both, more) = advantage(None), advantage(reward)
    groups = alone.reshape(4, 8)
    assert groups.mean(1).abs().max() < 1e-6 and bool((groups.std(1, correction=0) < 1).all())
    assert terms["r_dm_std"] > 0.5 and groups.std(1, correction=0).min() > 0.8  # the floor is far below
    expected = alone + 0.7 * signals.advantages(reward, batch.group)  # type: ignore[arg-type]
    assert torch.allclose(both, expected, atol=1e-6) and "reward" in more
    assert (advantage(30 * reward - 4)[0] - both).abs().max() < 1e-3
    assert torch.equal(advantage(torch.full((32,), 3.0))[0], alone)
    valid = valid.clone()
    valid[5] = False
    poisoned = torch.where(valid, reward, torch.tensor(1e6))
    assert advantage(poisoned, valid)[0][5] == alone[5] and advantage(poisoned, valid)[0].abs().max() < 7


def test_the_floor_keeps_noise_from_being_blown_up() -> None:
    """A fake score that is all but the teacher: R_dm of a thousandth of a nat moves nothing. Fails without the floor,
    with which the advantages' std is spread / floor."""
    objective, batch = GNDM(form="score", std_floor=0.1), grouped_batch(64, 8)
    networks = affine_networks(AffineStudent(0.0, 1.0, TWO), gaussian(0.3, 0.8), gaussian(0.3002, 0.8))
    used, terms = objective.trajectories(networks, batch, objective.init_state())
    print(f"R_dm spreads by {terms['r_dm_std']:.2e}, advantages by {used['advantage'].std():.2e}")
    assert 0 < terms["r_dm_std"] < 0.003 and used["advantage"].std() < 0.03


# --- replay


def test_trajectories_serve_so_many_updates_and_are_then_made_anew() -> None:
    """Three updates on the same trajectories with other batches' draws; the fourth has new ones. Fails if the age is
    not counted, or if old rows are kept."""
    objective, size = GNDM(form="score", replay_updates=3), 32
    networks = score_networks(objective)
    optimizer, state, seen = torch.optim.SGD(networks.student.parameters(), 0.05), objective.init_state(), []
    for update in range(5):
        batch = grouped_batch(size, 8, key=update, dim=2, first=size * (7 + 3 * update))
        found = losses(objective, STUDENT, networks, batch, state)
        seen.append(({k: v.clone() for k, v in state.items()}, found[-1].terms))
        optimizer.step()
        optimizer.zero_grad()
        objective.finish(FAKE, networks, state)  # the fake score's turns do not count
        objective.finish(STUDENT, networks, state)
    (first, terms), (second, later), (third, _), (fourth, again), _ = seen
    assert [int(s["replay.age"]) for s, _ in seen] == [0, 1, 2, 0, 1]
    assert first["replay.x"].shape == (32, 4, 2) and first["replay.log_prob"].shape == (32, 3)
    for key in ("replay.x", "replay.log_prob", "replay.advantage", "replay.cond.label"):
        assert torch.equal(first[key], second[key]) and torch.equal(first[key], third[key])
    assert not torch.equal(first["replay.x"], fourth["replay.x"]) and len(fourth["replay.x"]) == 32
    assert terms["importance"] == 1 and later["importance"] != 1 and again["importance"] == 1
    assert "r_dm" in terms and "r_dm" not in later and "r_dm" in again


def test_a_replay_gives_every_sample_its_own_row() -> None:
    """Two micro-batches stored, ids of a later update recalled; then dropped with age. Fails if rows are shifted."""
    state = replay.empty()
    for first in (64, 68):
        replay.store(
            state, {"x": torch.arange(first, first + 4), "cond.label": torch.arange(first, first + 4)[:, None]}
        )
    ids = torch.tensor([83, 80, 86, 81])
    found = replay.recall(state, ids)
    assert set(found) == {"x", "cond.label"}
    assert found["x"].tolist() == [67, 64, 70, 65] and found["cond.label"][:, 0].tolist() == [67, 64, 70, 65]
    assert replay.needs_samples(state)
    replay.count_use(state, 2)
    assert not replay.needs_samples(state)
    replay.count_use(state, 2)
    assert replay.needs_samples(state) and set(state) == {"replay.age"}


def test_samples_that_are_not_finite_are_used_once() -> None:
    state = replay.empty()
    replay.store(state, {"x": torch.tensor([1.0, float("nan")]), "cond.label": torch.arange(2)})
    replay.count_use(state, 3)
    assert replay.needs_samples(state) and set(state) == {"replay.age"}


def test_replayed_trajectories_keep_their_prompts() -> None:
    """Re-used while the student stands still, in a batch of other prompts: all ratios are exactly 1. Fails if the
    new batch's conditioning is used."""
    objective, ratios, labels = GNDM(form="score", replay_updates=2), [], []
    networks, state = score_networks(objective), objective.init_state()
    for first in (0, 8):  # one group each
        batch = grouped_batch(8, 8, dim=2, first=first)
        labels += batch.cond["label"].unique().tolist()
        found = losses(objective, STUDENT, networks, batch, state)
        ratios.append(found[-1].terms["importance"].item())
        objective.finish(STUDENT, networks, state)
    assert ratios == [1.0, 1.0] and labels == [0, 1]


def test_replayed_trajectories_keep_their_negative_prompts() -> None:
    """What a sample is made from is in both conditionings: the gradient of a replay does not depend on those of the
    batch that it comes in."""
    objective = GNDM(form="score", replay_updates=2, guidance_scale=3.0)
    networks, state = score_networks(objective), objective.init_state()
    losses(objective, STUDENT, networks, grouped_batch(8, 4, dim=2), state)
    objective.finish(STUDENT, networks, state)
    gradients(networks.student)
    later, found = grouped_batch(8, 4, dim=2, first=8, key=1), []
    for uncond in (later.uncond, later.cond):
        losses(objective, STUDENT, networks, replace(later, uncond=uncond), state)
        found.append(gradients(networks.student))
    assert largest(*found) == 0


def test_micro_batches_share_a_replay_without_knowing_of_it() -> None:
    """One batch of 32 against four of 8: the same rows in the same order, the same gradient on every update."""
    objective = GNDM(form="score", replay_updates=2)

    def run(parts: int) -> tuple[list[list[Tensor]], State]:
        networks, state, found = score_networks(objective), objective.init_state(), []
        for update in range(2):
            for i in range(parts):
                batch = grouped_batch(32 // parts, 8, update, 2, first=32 * update + i * 32 // parts)
                losses(objective, STUDENT, networks, batch, state)
            found.append([g / parts for g in gradients(networks.student)])
            if update == 0:
                objective.finish(STUDENT, networks, state)
                with torch.no_grad():
                    for p, g in zip(networks.student.parameters(), found[0], strict=True):
                        p -= 0.01 * g
        return found, state

    (whole, one), (parted, four) = run(1), run(4)
    assert one.keys() == four.keys()
    rows = max((one[k] - four[k]).abs().max().item() for k in one)
    error = max(largest(a, b) for a, b in zip(whole, parted, strict=True))
    print(f"stored rows differ by {rows:.1e}, gradients by {error:.1e}")
    assert rows < 1e-5 and error < 1e-5


def recipe(folder: Path, steps: int, **objective: Any) -> dict[str, Any]:
    adam = {"lr": 1e-3, "weight_decay": 0.0}
    return {
        "output_dir": str(folder),
        "seed": 0,
        "backbone": {
            "name": "gaussian_mixture",
            "means": [[-1.0, 0.0], [1.0, 0.5]],
            "stds": [0.3, 0.3],
            "classes": [0, 1],
            "width": 16,
            "depth": 2,
            "fit_steps": 20,
        },
        "rollout": {"timesteps": [1.0, 0.6, 0.3]},
        "data": {"name": "mixture"},
        "objective": {"name": "gndm", "fake_updates": 1, "group_size": 4} | objective,
        "optimizers": {"student": adam, "fake_score": adam},
        "train": {"steps": steps, "batch_size": 16, "sample_every": 0, "checkpoint_every": 3, "keep_checkpoints": 9},
        "eval": {"metrics": ["energy_distance"], "quick_num_samples": 50, "teacher_steps": [2]},
    }


def run_recipe(values: dict[str, Any], *overrides: str) -> Path:
    """Trains; returns the newest checkpoint, or the run folder if it keeps none."""
    path = Path(values["output_dir"] + ".yaml")
    path.write_text(yaml.safe_dump(values))
    assert main([str(path), *overrides]) == 0
    folder = Path(values["output_dir"])
    return sorted([folder, *folder.glob("checkpoints/step_*")])[-1]


@pytest.mark.slow
def test_a_run_stopped_in_the_middle_of_a_replay_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Checkpointed after 3 updates of trajectories that serve 4, and continued to 6: every tensor, and the state, is
    the uninterrupted run's; and what is stored are the trajectories, not leftovers."""
    values = recipe(tmp_path / "parts", 3, form="score", replay_updates=4)
    early = load_file(run_recipe(values) / "objective.safetensors")
    assert int(early["replay.age"]) == 3 and early["replay.x"].shape == (16, 3, 2)
    parts = run_recipe(values | {"train": values["train"] | {"steps": 6}})
    whole = run_recipe(recipe(tmp_path / "whole", 6, form="score", replay_updates=4))
    for name in ("objective", "student", "fake_score", "ema", "student.optimizer"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (parts, whole))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert not torch.equal(load_file(parts / "objective.safetensors")["replay.x"], early["replay.x"])


@pytest.mark.slow
def test_the_policy_gradient_alone_finds_both_modes(tmp_path: Path) -> None:
    """Modes of .3 and .7 between which the last step, at t = .3, cannot move mass; its own training is weighted away.
    60 updates bring the energy distance of the start, .143, and its error of the shares, .17, down."""
    values = recipe(
        tmp_path / "run", 60, form="score", group_size=8, fake_updates=4, fake_space="sample", last_step_weight=1e-9
    )
    values["backbone"] |= {
        "means": [[-1.0, 0.0], [1.0, 0.0]],
        "stds": [0.2, 0.2],
        "weights": [0.3, 0.7],
        "classes": None,
        "width": 64,
        "depth": 3,
        "fit_steps": 400,
    }
    values["rollout"] = {"timesteps": [1.0, 0.3]}
    adam = {"betas": [0.0, 0.99], "weight_decay": 0.0, "decay": "linear"}
    values["optimizers"] = {"student": {"lr": 5e-4} | adam, "fake_score": {"lr": 1e-3} | adam}
    values["train"] |= {"batch_size": 256, "ema_decay": 0.98, "checkpoint_every": 0}
    values["eval"] = {"metrics": ["energy_distance", "mode_share_error"], "num_samples": 4000, "teacher_steps": [2]}
    metrics = evaluate_path(run_recipe(values))["metrics"]
    print({k: round(v, 4) for k, v in metrics.items()})
    assert metrics["energy_distance"] < 0.03 and metrics["mode_share_error"] < 0.05


@pytest.mark.slow
def test_two_processes_replay_as_one(tmp_path: Path) -> None:
    """Every process stores all rows, in the order of the samples, and trains on its own: 5 updates, 3 a replay."""
    values = recipe(tmp_path / "one", 5, form="score", replay_updates=3)
    values["train"] |= {"dtype": "float64"}
    one, two = run_recipe(values), tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "fastgen/train.py"]
    command += [str(tmp_path / "one.yaml"), "train.batch_size=8", f"output_dir={two}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("objective", "student", "fake_score"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (one, two / "checkpoints" / one.name))
        assert a.keys() == b.keys() and (name != "objective" or a["replay.x"].shape == (16, 3, 2))
        error = max((a[k].double() - b[k].double()).abs().max().item() for k in a)
        print(f"{name}: one process against two {error:.1e}")
        assert error < 1e-6  # log-probabilities and advantages are stored in float32


# --- rewards by gradient


class Slope:
    """r = scale c^T x, and its gradient, as `Networks.rewards` gives it."""

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, x0: Tensor, prompts: Any, group: Any, grad: bool) -> Score:
        value = self.scale * x0 @ torch.tensor([1.0, -2.0], dtype=x0.dtype)
        return Score(value, torch.ones(len(x0), dtype=torch.bool), {"slope": value.detach()})


def test_the_weight_of_a_rewards_gradient_follows_the_score_difference() -> None:
    """Update 0 measures alone; then g - w dr/dx with w = weight |g| / |dr/dx|, of the updates before, decay 0.9. So
    a reward of another scale gives the same student. Fails if the weight is left out or moves within an update."""
    objective = GNDM(reward_weight=0.5)
    found = {}
    for scale in (1.0, 100.0):
        networks, state, weights = tiny_networks(objective, FOUR, Slope(scale)), objective.init_state(), []
        plain = tiny_networks(GNDM(), FOUR)
        for update in range(3):
            batch = grouped_batch(32, 8, key=update, dim=2)
            rollout = objective.rollout(networks, batch, grad=False)
            g, _ = objective.score_gradient(networks, batch, rollout.x, rollout.stop)
            ascent = scale * torch.tensor([1.0, -2.0], dtype=torch.float64).expand_as(g)
            weight = state["reward.weight"].item()
            total = losses(objective, STUDENT, networks, batch, state)[0].total.item()
            exact = 0.5 * (g - weight * ascent).square().mean().item()
            assert total == pytest.approx(exact, rel=1e-6)
            ours = gradients(networks.student)
            if update == 0:
                losses(GNDM(), STUDENT, plain, batch, objective.init_state())
                assert weight == 0 and largest(ours, gradients(plain.student)) == 0
            weights.append((weight, 0.5 * g.norm().item() / ascent.norm().item()))
            objective.finish(FAKE, networks, state)
            objective.finish(STUDENT, networks, state)
        assert weights[1][0] == pytest.approx(weights[0][1], rel=1e-5)
        assert weights[2][0] == pytest.approx(0.9 * weights[0][1] + 0.1 * weights[1][1], rel=1e-5)
        assert not state["reward.squares"].any()
        found[scale] = [scale * weight for weight, _ in weights], ours
    assert found[1.0][0] == pytest.approx(found[100.0][0], rel=1e-5)
    error = largest(found[1.0][1], found[100.0][1])
    print(f"scaled weights {found[1.0][0]}; a hundredfold reward changes the gradient by {error:.1e}")
    assert error < 1e-6


def test_the_weight_does_not_depend_on_accumulation() -> None:
    objective, found = GNDM(reward_weight=0.5), []
    for parts in (1, 4):
        networks, state = tiny_networks(objective, FOUR, Slope(1.0)), objective.init_state()
        for i in range(parts):
            losses(objective, STUDENT, networks, grouped_batch(32 // parts, 8, 0, 2, first=i * 32 // parts), state)
        objective.finish(STUDENT, networks, state)
        found.append(state["reward.weight"].item())
    print(found)
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] > 0


# --- mechanics


@pytest.mark.parametrize(
    "objective",
    [GNDM(guidance_scale=2.0, condition_on_stop=True), GNDM(form="score", replay_updates=2)],
    ids=["path", "score"],
)
def test_a_turn_reaches_its_own_networks_alone(objective: GNDM) -> None:
    """Every tensor of the network it updates, and not so much as a zero gradient on another."""
    networks, batch, state = score_networks(objective), grouped_batch(64, 8, dim=2), objective.init_state()
    with torch.no_grad():  # a stop table at zero would hide the time embedding behind it
        for p in networks.fake_score.parameters():
            p.add_(1e-3)
    assert objective.turns(5, state) == (Turn("fake_score", ("fake_score",), 5), Turn("student", ("student",)))
    assert objective.trained_roles == ("student", "fake_score") and objective.needs == frozenset()
    for turn in objective.turns(0, state):
        losses(objective, turn, networks, batch, state)
        assert all(reached(networks[turn.name]).values()) and touched(networks) == set(turn.roles)
        networks[turn.name].zero_grad()


def test_a_reward_by_gradient_leaves_none_on_other_networks() -> None:
    objective = GNDM(reward_weight=0.5)
    networks = tiny_networks(objective, FOUR, Slope(1.0))
    losses(objective, STUDENT, networks, grouped_batch(32, 8, dim=2), objective.init_state())
    assert all(p.grad is None for p in networks.fake_score.parameters())
    assert all(p.grad is not None for p in networks.student.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"replay_updates": 4}, "replay_updates belongs to form: score"),
        ({"clip": 0.1}, "clip belongs to form: score"),
        ({"form": "score", "condition_on_stop": True}, "condition_on_stop belongs to form: path"),
        ({"form": "score", "stops": "shared"}, "stops belongs to form: path"),
        ({"form": "score", "group_size": 1}, "at least 2"),
        ({"form": "score", "std_floor": 0.0}, "std_floor"),
        ({"group_size": 0}, "group_size"),
        ({"reward_weight": -1.0}, "reward_weight"),
        ({"form": "vector"}, "form"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GNDM(**fields)


@pytest.mark.parametrize("policy", [RolloutPolicy((1.0,)), RolloutPolicy((1.0, 0.5), "ode")], ids=["one", "ode"])
def test_the_score_form_needs_a_stochastic_step(policy: RolloutPolicy) -> None:
    GNDM().check(policy)
    GNDM(form="score").check(RolloutPolicy((1.0, 0.5), "cps", 0.9))
    with pytest.raises(ValueError, match="stochastic steps"):
        GNDM(form="score").check(policy)


def test_a_recipe_that_does_not_fit_is_refused_before_anything_loads(tmp_path: Path) -> None:
    values = recipe(tmp_path / "run", 3)
    one, weighted = {"parts": [{"name": "linear", "direction": [1.0, 0.0]}]}, {"name": "gndm", "reward_weight": 0.5}
    sign = {"name": "function", "function": "torch:sign", "input": "points", "differentiable": False}
    build_recipe(values)
    for form in ("path", "score"):
        build_recipe(values | {"objective": weighted | {"form": form}, "rewards": one})
    build_recipe(values | {"objective": weighted | {"form": "score"}, "rewards": {"parts": [sign]}})
    for change, message in (
        ({"train": values["train"] | {"batch_size": 18}}, "group_size 4"),
        ({"objective": {"name": "gndm", "form": "score"}, "rollout": {"timesteps": [1.0]}}, "stochastic step"),
        ({"objective": weighted}, "missing key rewards"),
        ({"rewards": one}, "gndm uses none"),
        ({"objective": weighted, "rewards": {"parts": [sign]}}, "backpropagates"),
    ):
        with pytest.raises(RecipeError, match=message):
            build_recipe(values | change)
