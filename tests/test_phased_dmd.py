"""Phased DMD against closed forms: its gradient, its fixed point at a phase's end, its reduction to DMD2; and which
networks a phase moves, resets and exports.

For data N(m, S) the teacher's law at level s is N(alpha_s m, alpha_s^2 S + sigma_s^2). A student that takes pure noise
z to x0 = a + b z and goes on deterministically to s has x_s = alpha_s a + (alpha_s b + sigma_s) z."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import WanPipeline
from oracles import (
    AffineStudent,
    ExactFake,
    Given,
    affine_networks,
    gaussian,
    guided_pair,
    point_batch,
    reached,
    tiny_batch,
    tiny_networks,
    touched,
)
from tiny_wan import tiny_wan
from torch import Tensor, nn

from fastgen import noise
from fastgen.backbones.base import RoleOptions
from fastgen.backbones.wan import WanConfig
from fastgen.batch import Batch
from fastgen.config import build_recipe, load_recipe
from fastgen.modules.experts import Experts
from fastgen.networks import Ema, Networks
from fastgen.objectives import DMD2, PhasedDMD
from fastgen.objectives.phased_dmd import Phase, PhaseTurn, velocity_gradient
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.rollout import Rollout, RolloutPolicy, predict_x0, transition
from fastgen.run import checkpoint
from fastgen.run.build import TrainingRun, build, start_from
from fastgen.run.distributed import start
from fastgen.run.export import export_run
from fastgen.sampling.sampler import Sampler, load_sampler
from fastgen.schedule import FlowSchedule, Schedule, VPSchedule
from fastgen.train import reset_roles, set_rates, train, update

ROOT = Path(__file__).parents[1]
FOUR = RolloutPolicy(timesteps=(1.0, 0.75, 0.5, 0.25), transition="ode")
HALVES = (Phase(0, 2, 3), Phase(2, 4, 4))


def phased(*phases: Phase, **fields: Any) -> PhasedDMD:
    return PhasedDMD(phases=phases or HALVES, **fields)


# --- the gradient


@pytest.mark.parametrize("kind", ["flow", "vp"])
def test_the_weighted_velocities_are_the_scores(kind: str, vp_schedule: VPSchedule) -> None:
    """w (v_r - v_f) = -alpha_ts (s_r - s_f), which at s = 0 is alpha_t (s_f - s_r), the gradient of the KL."""
    schedule: Schedule = FlowSchedule() if kind == "flow" else vp_schedule
    generator = torch.Generator().manual_seed(0)
    x_t, fake, real = (torch.randn(200, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    s = torch.linspace(0, 0.9, 200, dtype=torch.float64)
    t = s + (1 - s) * torch.linspace(0.02, 0.98, 200, dtype=torch.float64).flip(0)
    ratio, _ = schedule.renoise_coefficients(s, t, x_t)
    scores = ratio * (schedule.score(fake, x_t, t) - schedule.score(real, x_t, t))
    found = velocity_gradient(schedule, x_t, s, t, fake, real)
    error = ((found - scores).abs() / scores.abs().clamp_min(1e-3)).max().item()
    print(f"{kind}: relative {error:.1e}")
    assert error < 1e-9
    if kind == "flow":
        w = (1 - t) ** 2 / (1 - s) / t  # alpha_t alpha_ts / sigma_t
        velocity = w[:, None] * ((x_t - real) / t[:, None] - (x_t - fake) / t[:, None])
        assert torch.allclose(found, velocity, atol=1e-12, rtol=1e-9)


TWO = RolloutPolicy(timesteps=(1.0, 0.4), transition="ode")
SINGLES = (Phase(0, 1, 1), Phase(1, 2, 1))


def test_the_papers_gradient_and_the_lag_are_those_of_their_formulas() -> None:
    """-alpha_ts (s_r - s_f) = alpha_t alpha_ts (fake - real) / sigma_t^2, and the lag from the unbiased target
    x_s / alpha_s - alpha_ts sigma_s^2 / (alpha_s sigma_ts) noise, at s = 0.4. Fails where s and t are exchanged."""
    batch = point_batch(8)
    fake, real, x, noise_ = (batch.normal(name) for name in ("fake", "real", "x", "renoise"))
    networks = Networks({"student": Given(x), "teacher": Given(real), "fake_score": Given(fake)}, FOUR)
    s = torch.full((8,), 0.4, dtype=torch.float64)
    objective = phased(gradient="paper")
    grad, terms = objective.score_gradient(networks, batch, Rollout(x, s, torch.ones(8, dtype=torch.int64)))
    t = 0.4 + 0.6 * objective.renoise_time(batch.uniform("renoise_time"))[:, None]
    ratio = (1 - t) / 0.6
    assert torch.allclose(grad, (1 - t) * ratio * (fake - real) / t**2)
    target = x / 0.6 - ratio * 0.4**2 / (0.6 * (t**2 - (ratio * 0.4) ** 2).sqrt()) * noise_
    assert torch.allclose(terms["fake_error"], ((target - fake) * (fake - real)).mean())
    assert torch.allclose(terms["score_gap"], (fake - real).square().mean())


@pytest.mark.parametrize("gradient", ["normalised", "paper"])
def test_a_phase_ends_at_the_teachers_law_of_its_level(gradient: str) -> None:
    """Trained on the first phase's own student loss against its exact fake score, x_0.4 ends at N(0.6 m, 0.36 S +
    0.16): a = m and 0.6 b + 0.4 = sqrt(0.36 S + 0.16), m = 0.7, S = 1.3^2. Fails if the student is matched below s or
    renoised as if it were clean, or if it is sent to 0."""
    student, objective = AffineStudent(-1.0, 0.4, TWO), phased(*SINGLES, gradient=gradient, normaliser_floor=0.1)
    networks = affine_networks(student, gaussian(), ExactFake(student, stop=0))
    optimizer = torch.optim.Adam(student.parameters(), 0.04)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=250)
    for step in range(250):
        batch = point_batch(torch.arange(256) + 256 * step, key=step, dim=1)
        optimizer.zero_grad()
        objective.student_loss(networks, batch, objective.phases[0]).total.backward()
        optimizer.step()
        decay.step()
    mean, std = 0.6 * student.a.item(), 0.6 * student.b.item() + 0.4
    off = (mean - 0.6 * 0.7, std - math.sqrt(0.36 * 1.69 + 0.16))
    print(f"{gradient}: mean of x_s off by {off[0]:+.1e}, standard deviation by {off[1]:+.1e}")
    assert abs(off[0]) < 0.005 and abs(off[1]) < 0.005


@pytest.mark.parametrize("gradient", ["normalised", "paper"])
def test_the_field_vanishes_at_the_answer_and_not_beside_it(gradient: str) -> None:
    """For every sample, with the exact fake score of the right law; a fake score of another mean leaves some."""
    student = AffineStudent(0.7, (math.sqrt(0.36 * 1.69 + 0.16) - 0.4) / 0.6, TWO)
    objective, batch = phased(*SINGLES, gradient=gradient), point_batch(300, dim=1)

    def field(shift: float) -> Tensor:
        networks = affine_networks(student, gaussian(), ExactFake(student, shift, stop=0))
        rollout = objective.rollout(networks, batch, objective.phases[0], grad=False)
        assert torch.equal(rollout.s, torch.full_like(rollout.s, 0.4))
        return objective.score_gradient(networks, batch, rollout)[0]

    print(f"{gradient}: {field(0).abs().max():.1e} at the answer, {field(0.06).abs().mean():.2f} beside it")
    assert field(0).abs().max() < 1e-10 and field(0.06).abs().mean() > 0.01


def test_the_normalised_field_goes_through_the_clean_prediction() -> None:
    """Its gradient in the step's clean prediction x0, of a step to s = 0.5: g / numel, whatever s is, and
    normalised by mean|x0 - real|. Applied to x_s it would be half or a third of that; a normaliser of x_s, another."""
    policy, batch = FOUR, point_batch(300, dim=3)
    x0 = (0.3 * batch.normal("x0") - 1).requires_grad_()
    networks = Networks({"student": Given(x0), "teacher": gaussian(), "fake_score": gaussian(-0.4, 0.9)}, policy)
    objective = phased()
    phase = objective.phases[0]
    rollout = objective.rollout(networks, batch, phase, grad=False)
    s = rollout.s
    t = s + (1 - s) * objective.renoise_time(batch.uniform("renoise_time"))
    x_t = FlowSchedule().renoise(rollout.x, batch.normal("renoise"), s, t)
    fake, real = (networks[role](x_t, t, batch.cond) for role in ("fake_score", "teacher"))
    expected = (fake - real) / (x0 - real).abs().mean(1, keepdim=True)
    objective.student_loss(networks, batch, phase).total.backward()
    assert x0.grad is not None and bool((s == 0.5).all())
    error = (x0.numel() * x0.grad - expected).abs().max().item()
    print(f"{error:.1e}")
    assert error < 1e-12 and expected.abs().mean() > 0.1


# --- the fake score


@pytest.mark.parametrize("space", ["sample", "flow_prediction", None])
def test_the_fake_loss_is_least_at_the_law_of_x_s(space: Any) -> None:
    """Against fakes of another mean or spread, on the same 40,000 samples. Fails with the naive target, the student's
    clean prediction: then fakes of a smaller spread win."""
    student, batch = AffineStudent(-1.0, 0.9, TWO), point_batch(40_000, dim=1)
    objective = phased(*SINGLES, fake_space=space)

    def loss(shift: float, stretch: float) -> float:
        networks = affine_networks(student, gaussian(), ExactFake(student, shift, stretch, stop=0))
        total = objective.fake_loss(networks, batch, objective.phases[0]).total
        assert not total.requires_grad
        return total.item()

    others = [loss(s, r) for s, r in ((0.06, 1.0), (-0.06, 1.0), (0.0, 1.15), (0.0, 0.87))]
    print(f"exact {loss(0, 1):.5f}, others {others}")
    assert loss(0, 1) < min(others)


def test_the_fake_loss_is_clamped_near_s() -> None:
    """RTDMD's form: the mean of min(1 / sigma_ts^2, 10) |sigma_ts (v - v_target)|^2, v_target as in the paper. Fails
    without the clamp, or with a naive target."""
    objective, batch = phased(*SINGLES, fake_space="flow_prediction"), tiny_batch(24)
    networks = tiny_networks(objective, TWO)
    found = objective.fake_loss(networks, batch, objective.phases[0]).total
    rollout = objective.rollout(networks, batch, objective.phases[0], grad=False)
    s, noise = rollout.s, batch.normal("fake_noise")
    t = s + (1 - s) * objective.fake_time(batch.uniform("fake_time"))
    ratio, sigma_ts = FlowSchedule().renoise_coefficients(s, t, noise)
    x_t = ratio * rollout.x + sigma_ts * noise
    v = networks.fake_score(x_t, t, batch.cond, predict="flow_prediction")
    t, s = t[:, None], s[:, None]
    target = -rollout.x / (1 - s) + noise * (t + (1 - t) * s**2 / (1 - s) ** 2) / sigma_ts
    expected = ((sigma_ts**-2).clamp(0, 10) * (sigma_ts * (v - target)) ** 2).mean()
    clamped = (sigma_ts**-2 > 10).double().mean().item()
    print(f"{found.item():.6f}, by hand {expected.item():.6f}; clamped {clamped:.0%}")
    assert abs(found - expected) < 1e-9 * expected and 0 < clamped < 1


# --- the reduction to DMD2


@pytest.mark.parametrize("transition", ["ode", "renoise"])
def test_one_phase_to_level_0_is_dmd2(transition: Any) -> None:
    """The same student and fake losses, and the same gradients, bit for bit."""
    shared: dict[str, Any] = {
        "stops": "per_sample",
        "condition_on_stop": True,
        "guidance_scale": 1.5,
        "normaliser_floor": 1e-6,
    }
    policy = RolloutPolicy(FOUR.timesteps, transition)
    one, dmd2 = phased(Phase(0, 4, 1), **shared), DMD2(**shared)
    results = []
    for objective in (one, dmd2):
        networks, batch = tiny_networks(objective, policy), tiny_batch(24)
        losses = []
        for turn in objective.turns(0, {}):
            loss = objective.loss(turn, networks, batch, {})
            assert not hasattr(loss, "__next__")
            loss.total.backward()  # type: ignore[union-attr]
            losses.append(loss.total)  # type: ignore[union-attr]
        results.append([*losses, *(p.grad for role in ("student", "fake_score") for p in networks[role].parameters())])
    assert len(results[0]) == len(results[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- phases, experts and turns


def test_turns_go_through_the_phases_and_reset_the_fake_score_at_each_start() -> None:
    objective = phased(Phase(0, 1, 2), Phase(1, 3, 1), Phase(3, 4, 3), fake_updates=7)
    seen = []
    for step in range(8):
        fake, student = objective.turns(step, {})
        assert isinstance(fake, PhaseTurn) and isinstance(student, PhaseTurn)
        assert (fake.name, fake.roles, fake.updates) == ("fake_score", ("fake_score",), 7)
        assert (student.name, student.roles, student.updates, student.reset) == ("student", ("student",), 1, ())
        assert fake.phase == student.phase and fake.progress == student.progress
        seen.append((fake.phase, fake.reset, fake.progress))
    reset = ("fake_score",)
    assert seen == [
        (0, reset, (0, 2)),
        (0, (), (1, 2)),
        (1, reset, (0, 1)),
        (2, reset, (0, 3)),
        (2, (), (1, 3)),
        (2, (), (2, 3)),
        (2, (), (3, 3)),
        (2, (), (4, 3)),
    ]


@pytest.mark.parametrize("phase", [0, 1])
def test_a_phase_reaches_its_own_expert_alone(phase: int) -> None:
    """The student's turn: every tensor of the phase's expert holds a gradient, no other network any. The fake's turn:
    the fake score alone."""
    objective = phased(condition_on_stop=True, stops="per_sample")
    networks = tiny_networks(objective, FOUR)
    student = networks.student
    assert isinstance(student, Experts)
    fake, turn = objective.turns(3 * phase, {})
    batch = tiny_batch(24)
    objective.loss(turn, networks, batch, {}).total.backward()
    assert all(reached(student.experts[phase]).values()) and touched(networks) == {"student"}
    assert touched(dict(student.experts.named_children())) == {str(phase)}
    student.zero_grad()
    objective.loss(fake, networks, batch, {}).total.backward()
    assert all(reached(networks.fake_score).values()) and touched(networks) == {"fake_score"}


def test_every_step_calls_the_expert_of_its_phase() -> None:
    """Also for phases of unequal length; a level at the boundary itself belongs to the upper expert."""
    policy = RolloutPolicy(tuple(7 * u / (1 + 6 * u) for u in (1.0, 0.8, 0.6, 0.4, 0.2)))
    objective = phased(Phase(0, 2, 1), Phase(2, 3, 1), Phase(3, 5, 1))
    student = tiny_networks(objective, policy).student
    assert isinstance(student, Experts)
    called = student.expert_of(torch.tensor(policy.timesteps))
    assert called.tolist() == [0, 0, 1, 2, 2]
    exact = torch.tensor(student.boundaries, dtype=torch.float64)
    assert student.expert_of(exact).tolist() == [0, 1]
    assert student.expert_of(torch.nextafter(exact, torch.zeros_like(exact))).tolist() == [1, 2]
    for k, (last, first) in enumerate(pairwise([1, 2, 3])):
        assert policy.timesteps[first] < student.boundaries[k] < policy.timesteps[last]


def test_experts_begin_as_the_pretrained_network() -> None:
    networks, one = tiny_networks(phased(), FOUR), tiny_networks(phased(experts=False), FOUR)
    batch, x = tiny_batch(24), tiny_batch(24).normal("x")
    t = torch.linspace(0.05, 1, 24, dtype=torch.float64)
    assert isinstance(networks.student, Experts) and not isinstance(one.student, Experts)
    assert torch.allclose(networks.student(x, t, batch.cond), one.student(x, t, batch.cond), atol=1e-13)
    first, second = networks.student.experts
    assert all(a is not b for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("phase", HALVES)
@pytest.mark.parametrize("transition", ["ode", "renoise"])
def test_the_rollout_ends_at_the_level_of_its_phase(phase: Phase, transition: Any) -> None:
    """Wherever it exits: at s the law of x_s, given the student's clean prediction, is the policy's transition."""
    objective, policy = phased(stops="per_sample"), RolloutPolicy(FOUR.timesteps, transition)
    networks, batch = tiny_networks(objective, policy), tiny_batch(24)
    rollout = objective.rollout(networks, batch, phase, grad=False)
    level = (*policy.timesteps, 0.0)[phase.last]
    step = rollout.steps[0]
    assert set(rollout.stop.tolist()) == set(range(phase.first, phase.last))
    assert torch.equal(rollout.s, torch.full_like(rollout.s, level))
    fresh = batch.normal("exit") if transition == "renoise" else None
    expected = step.x0 if level == 0 else transition_to(step.x0, step.x_t, step.t, rollout.s, fresh)
    assert torch.equal(rollout.x, expected)


def transition_to(x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, fresh: Tensor | None) -> Tensor:
    return transition(FlowSchedule(), x0, x_t, t, s, fresh)


def test_without_random_exits_all_steps_of_a_phase_carry_gradient() -> None:
    """Against the two steps written out: the same x_s and the same gradient; and a phase of one step is the same with
    and without. Fails if the gradient is cut between the steps."""
    objective = phased(random_exit=False)
    networks, batch = tiny_networks(objective, FOUR), tiny_batch(24)
    student, direction = networks.student, tiny_batch(24).normal("direction")
    parameters = list(student.experts[0].parameters())  # type: ignore[union-attr]

    rollout = objective.rollout(networks, batch, HALVES[0], grad=True)
    found = torch.autograd.grad((rollout.x * direction).sum(), parameters)
    x = batch.normal("initial")
    for level, below in ((1.0, 0.75), (0.75, 0.5)):
        t, t_next = (torch.full((24,), value, dtype=torch.float64) for value in (level, below))
        x = transition(FlowSchedule(), predict_x0(student, x, t, batch.cond, FOUR), x, t, t_next, None)
    expected = torch.autograd.grad((x * direction).sum(), parameters)
    cut = torch.autograd.grad((objective_exit(networks, batch) * direction).sum(), parameters)
    assert torch.equal(rollout.x, x) and rollout.stop.tolist() == [1] * 24 and rollout.s.tolist() == [0.5] * 24
    assert rollout.steps[-1].t.tolist() == [0.75] * 24
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))
    assert any(not torch.allclose(a, b, atol=1e-6) for a, b in zip(found, cut, strict=True))
    singles = [dataclasses.replace(objective, random_exit=r) for r in (True, False)]
    a, b = (o.rollout(networks, batch, Phase(1, 2, 1), grad=False) for o in singles)
    assert torch.equal(a.x, b.x) and torch.equal(a.stop, b.stop)


def objective_exit(networks: Networks, batch: Batch) -> Tensor:
    """x_s with gradient through the phase's last step alone."""
    x, t, s = batch.normal("initial"), *(torch.full((24,), v, dtype=torch.float64) for v in (1.0, 0.75))
    with torch.no_grad():
        x = transition(FlowSchedule(), networks.student(x, t, batch.cond), x, t, s, None)
    return transition(FlowSchedule(), networks.student(x, s, batch.cond), x, s, torch.full_like(s, 0.5), None)


def test_a_guidance_scale_an_expert_of_the_teacher() -> None:
    """A tuple gives each sample the scale of the teacher expert at its own t, not at s. In every update all samples
    have the same expert, and each of the two has its turn."""
    parts = [guided_pair(0.7, -0.1) for _ in range(2)]
    for part in parts:
        part.feature_dim = 0  # Experts wants to know
    student = AffineStudent(0.0, 0.5, TWO)
    networks = affine_networks(student, Experts(parts, (0.7,)), ExactFake(student, stop=0))

    def field(scale: Any, batch: Batch) -> Tensor:
        objective = phased(*SINGLES, guidance_scale=scale)
        rollout = objective.rollout(networks, batch, SINGLES[0], grad=False)
        return objective.score_gradient(networks, batch, rollout)[0]

    seen = set()
    for key in range(8):
        batch = point_batch(50, key, dim=1, uncond=2)
        high, low, each = (field(scale, batch) for scale in (2.0, 5.0, (2.0, 5.0)))
        assert not torch.equal(high, low) and (torch.equal(each, high) or torch.equal(each, low))
        seen.add(torch.equal(each, high))
    assert seen == {True, False}


def test_the_average_is_right_for_an_expert_that_does_not_move() -> None:
    """While the second expert trains, the first one's average arrives at its final weights; before, that of the second
    has not moved at all."""
    student = tiny_networks(phased(), FOUR).student
    ema = Ema(student.average(), student, 0.9)
    with torch.no_grad():
        for phase in range(2):
            for _ in range(300):
                for p in student.experts[phase].parameters():  # type: ignore[index,union-attr]
                    p.add_(0.01)
                ema.update(student)
            lag = [
                max((a - p).abs().max().item() for a, p in zip(x.parameters(), y.parameters(), strict=True))
                for x, y in zip(ema.module.experts, student.experts, strict=True)  # type: ignore[arg-type,union-attr]
            ]
            print(f"after phase {phase}: lag of the averages {lag}")
            if phase == 0:
                assert lag[1] == 0 and abs(lag[0] - 0.09) < 1e-3  # 0.01 x 0.9 / 0.1
    assert lag[0] < 1e-12 and abs(lag[1] - 0.09) < 1e-3


# --- in the loop


SHORT = [
    "backbone.means=[[0,0],[3,1]]",
    "backbone.stds=[0.3,0.2]",
    "backbone.weights=[1,2]",
    "backbone.width=16",
    "backbone.fit_steps=20",
    "backbone.fit_batch_size=32",
    "objective.fake_updates=2",
    "train.batch_size=8",
    "objective.phases=[{first: 0, last: 2, updates: 3}, {first: 2, last: 4, updates: 4}]",
    "train.steps=7",
    "train.log_every=1",
    "train.sample_every=0",
    "train.eval_every=0",
    "train.checkpoint_every=2",
    "eval.num_samples=64",
    "eval.quick_num_samples=64",
    "train.keep_checkpoints=9",
    "optimizers.student.warmup=2",
    "eval.teacher_steps=[2]",
]


def short(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/mixture_phased_dmd_4step.yaml", [*SHORT, f"output_dir={folder}", *overrides])


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def moments(run: TrainingRun, role: str) -> int:
    return len(run.optimizers[role].state)


@pytest.mark.parametrize("start_of", ["run", "export"])
def test_every_expert_starts_from_the_network_of_a_run_with_one(start_of: str, tmp_path: Path) -> None:
    first = train(short(tmp_path / "one", "objective.experts=false"))
    path = first if start_of == "run" else first / "export"
    recipe = short(tmp_path / "two", f"init_from={path}")
    run = build(recipe, start(recipe))
    start_from(run)
    given = flat(load_sampler(first).denoiser)
    experts = [flat(expert) for expert in run.networks.student.experts]  # type: ignore[union-attr]
    assert len(experts) == 2 and all(torch.equal(expert, given) for expert in experts)


def test_a_run_resets_the_fake_score_and_its_optimizer_at_each_phase_and_only_there(tmp_path: Path) -> None:
    """Turn by turn, as the loop does it: right before the fake score's turn of steps 0 and 3 it is the teacher's copy
    with an empty optimizer, before every other it is not. Each phase moves its own expert and no other. Learning rates
    begin anew."""
    recipe = short(tmp_path)
    run = build(recipe, start(recipe))
    fresh = recipe.objective.auxiliary(run.backbone, recipe.rollout)["fake_score"]
    position, rates, resets = 0, [], []
    for step in range(7):
        experts = [flat(e) for e in run.networks.student.experts]  # type: ignore[union-attr]
        for turn in recipe.objective.turns(step, run.state):
            reset_roles(run, turn, step)
            set_rates(run, turn, step)
            if turn.name == "fake_score":
                new = torch.equal(flat(run.networks.fake_score), flat(fresh))
                assert new == (moments(run, "fake_score") == 0)
                resets.append(new)
            for inner in range(turn.updates):
                update(run, turn, position, key=10 * step + inner)
                position += 8
        moved = [not torch.equal(flat(e), b) for e, b in zip(run.networks.student.experts, experts, strict=True)]  # type: ignore[union-attr,arg-type]
        assert moved == ([True, False] if step < 3 else [False, True])
        rates.append(run.optimizers["student"].param_groups[0]["lr"] / recipe.optimizers["student"].lr)
    assert resets == [True, False, False, True, False, False, False]
    expected = [0.5, 2 / 3, 1 / 3, 0.5, 3 / 4, 2 / 4, 1 / 4]  # warm-up of 2, then linear decay over the phase
    assert max(abs(a - b) for a, b in zip(rates, expected, strict=True)) < 1e-12


def last_weights(folder: Path) -> dict[str, Tensor]:
    last = checkpoint.complete(folder / "checkpoints")[-1]
    roles = {re.sub(r"\.\d+-of-\d+$", "", file.stem) for file in last.glob("*.safetensors")}
    found = {role: checkpoint.stored(last, role) for role in sorted(roles)}
    return {f"{role}.{name}": tensors.whole(name) for role, tensors in found.items() for name in tensors.shapes}


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed right before the second phase begins, at 3, and in its middle, and continued from the last checkpoint."""
    overrides = [f"train.checkpoint_every={killed_at}"]
    whole = last_weights(train(short(tmp_path / "whole", *overrides)))
    turns = PhasedDMD.turns

    def killed(self: PhasedDMD, step: int, state: Any) -> Any:
        if step == killed_at:
            raise KeyboardInterrupt
        return turns(self, step, state)

    monkeypatch.setattr(PhasedDMD, "turns", killed)
    with pytest.raises(KeyboardInterrupt):
        train(short(tmp_path / "parts", *overrides))
    monkeypatch.setattr(PhasedDMD, "turns", turns)
    parts = last_weights(train(short(tmp_path / "parts", *overrides)))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


def test_an_export_holds_its_experts_and_their_exact_boundary(tmp_path: Path) -> None:
    """The mixture's own folder, by the run's path: the averaged experts, bit for bit, and the same points."""
    timesteps = "rollout.timesteps=[1.0, 0.87, 0.6666666666666666, 0.3]"
    folder = train(short(tmp_path / "run", timesteps))
    sampler = load_sampler(folder)
    assert isinstance(sampler.denoiser, Experts)
    assert sampler.denoiser.boundaries == ((0.87 + 0.6666666666666666) / 2,)
    averaged = {k.removeprefix("ema."): v for k, v in last_weights(folder).items() if k.startswith("ema.")}
    states = sampler.denoiser.state_dict()
    assert averaged.keys() == states.keys() and all(torch.equal(v, states[k]) for k, v in averaged.items())
    assert json.loads((folder / "export/experts.json").read_text())["boundaries"] == list(sampler.denoiser.boundaries)
    again = load_sampler(export_run(folder, tmp_path / "again"))  # by `fastgen export`, from the checkpoint
    points = [s.sample([""] * 5, range(5)) for s in (sampler, again)]
    assert points[0].shape == (5, 2) and torch.equal(*points)


# --- what is refused


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.phases=[{first: 0, last: 2, updates: 900}, {first: 3, last: 4, updates: 900}]", r"\[3, 4\)"),
        ("objective.phases=[{first: 1, last: 4, updates: 1800}]", "the first must begin at 0"),
        ("objective.phases=[{first: 0, last: 0, updates: 9}, {first: 0, last: 4, updates: 1791}]", "phases"),
        ("objective.phases=[{first: 0, last: 3, updates: 1800}]", "must cover all 4"),
        ("objective.phases=[{first: 0, last: 4, updates: 1801}]", "add up to 1801, but train.steps is 1800"),
        ("objective.phases=[{first: 0, last: 4}]", "updates"),
        ("objective.phases=[]", "phases"),
        ("lora.student={rank: 4}", "experts that are adapters"),
        ("objective.fake_clamp=0", "fake_clamp"),
    ],
)
def test_what_does_not_fit_is_refused(override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(ROOT / "recipes/mixture_phased_dmd_4step.yaml", [override])


def test_one_network_for_all_phases_may_be_an_adapter() -> None:
    recipe = load_recipe(
        ROOT / "recipes/mixture_phased_dmd_4step.yaml",
        ["lora.student={rank: 4}", "objective.experts=false", "backbone.fit_steps=0"],
    )
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0, RoleOptions(recipe.lora))
    assert recipe.objective.make_student(backbone, recipe.rollout).role == "student"


def test_phases_have_to_be_the_pipelines_own_experts() -> None:
    objective = phased(Phase(0, 3, 1), Phase(3, 4, 1))
    objective.check_pipeline_experts((0.5,), FOUR)  # 0.5 itself belongs to the upper expert
    for own in ((0.6,), (0.9, 0.3), ()):
        with pytest.raises(ValueError, match="pipeline's experts"):
            objective.check_pipeline_experts(own, FOUR)


@pytest.mark.slow
def test_two_divided_processes_train_as_one_through_a_reset(tmp_path: Path) -> None:
    """fully_shard: experts filled from one network's weights, a fake score filled anew as the second phase begins."""
    common = [
        "train.dtype=float64",
        "train.steps=3",
        "train.checkpoint_every=3",
        "train.sample_every=0",
        "objective.phases=[{first: 0, last: 2, updates: 1}, {first: 2, last: 4, updates: 2}]",
        "train.eval_every=0",
        "objective.fake_updates=1",
        "health.num_samples=4",
        "eval.quick_num_samples=20",
        "eval.teacher_steps=[2]",
        "eval.metrics=[throughput]",
        "train.num_samples=4",
    ]
    path = ROOT / "recipes/digits_phased_dmd_4step.yaml"
    one = train(load_recipe(path, [*common, "train.batch_size=4", f"output_dir={tmp_path / 'one'}"]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "fastgen/train.py"]
    arguments = [*common, "train.batch_size=2", f"output_dir={tmp_path / 'two'}", "train.strategy=fsdp"]
    result = subprocess.run([*command, str(path), *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    a, b = (last_weights(folder) for folder in (one, tmp_path / "two"))
    error = max((a[k].double() - b[k].double()).abs().max().item() for k in a)
    print(f"largest difference {error:.2g}")
    assert a.keys() == b.keys() and error < 1e-9


# --- Wan, whose stock pipeline has two experts


def test_one_wan_network_becomes_two_experts_of_the_stock_pipeline(tmp_path: Path) -> None:
    """Its boundary_ratio is the boundary of training to the last bit, WanPipeline's frames are our sampler's, and the
    export is read back as experts, also by the backbone it came from. Three experts are refused."""
    folder = tiny_wan(tmp_path / "wan", experts=1)
    config = WanConfig(path=str(folder), height=32, width=32, num_frames=5, max_sequence_length=16)
    policy = RolloutPolicy((1.0, 0.9375, 5 / 6, 0.625), "ode")
    backbone = config.build(torch.device("cpu"), torch.float32, 0)
    student = phased().make_student(backbone, policy)
    assert isinstance(student, Experts)
    config.check_experts(student.boundaries)
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):
            p.mul_(1 + 0.02 * ((i % 7) - 3))
    backbone.save_pipeline(student, policy, tmp_path / "export")
    index = json.loads((tmp_path / "export/model_index.json").read_text())
    assert index["boundary_ratio"] == student.boundaries[0] == (0.9375 + 5 / 6) / 2
    assert index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    again = backbone.load_exported(tmp_path / "export")
    assert isinstance(again, Experts) and again.boundaries == student.boundaries

    ours = Sampler(backbone, again, policy).sample(["a cat runs"], [3])
    pipeline = WanPipeline.from_pretrained(tmp_path / "export")
    noise_of = noise.normal(torch.tensor([3]), backbone.latent_shape, noise.make_key("sample", "initial"))
    frames = pipeline(
        "a cat runs",
        height=32,
        width=32,
        num_frames=5,
        max_sequence_length=16,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=noise_of.transpose(1, 2),
    ).frames
    error = (ours - torch.from_numpy(frames).permute(0, 1, 4, 2, 3)).abs().max().item()
    print(f"largest pixel difference {error:.2g}")
    assert error < 1e-4
    with pytest.raises(ValueError, match="two experts, not 3"):
        config.check_experts((0.9, 0.5))


def test_wans_own_experts_are_the_students(tmp_path: Path) -> None:
    """Phases that do not fit them are refused before weights load, and when they load; fitting ones keep them."""
    folder = tiny_wan(tmp_path / "wan", experts=2)
    path = ROOT / "recipes/wan22_a14b_dmd2_4step.yaml"
    backbone = f"backbone={{name: wan, path: {folder}, height: 32, width: 32, num_frames: 5}}"

    def recipe(first: int) -> Recipe:
        phases = f"[{{first: 0, last: {first}, updates: 500}}, {{first: {first}, last: 4, updates: 500}}]"
        return load_recipe(path, [backbone, f"objective={{name: phased_dmd, phases: {phases}}}"])

    fitting = recipe(3)  # 1.0, 0.9545 and 0.875 itself belong to the upper expert
    with pytest.raises(RecipeError, match=r"boundaries are \[0.875\]"):
        recipe(2)
    wan = fitting.backbone.build(torch.device("cpu"), torch.float32, 0)
    student = fitting.objective.make_student(wan, fitting.rollout)
    assert isinstance(student, Experts) and student.boundaries == (0.875,)
    with pytest.raises(ValueError, match="pipeline's experts"):
        phased().make_student(wan, fitting.rollout)


def test_a_family_without_a_place_for_experts_refuses_them() -> None:
    raw = yaml.safe_load((ROOT / "recipes/sd15_dmd2_1step.yaml").read_text())
    raw["rollout"] = {"timesteps": [1.0, 0.5]}
    raw["objective"] = {"name": "phased_dmd", "phases": [{"first": i, "last": i + 1, "updates": 5} for i in range(2)]}
    raw["train"]["steps"] = 10
    raw["optimizers"].pop("discriminator", None)
    raw.pop("lora", None)
    with pytest.raises(RecipeError, match="single network, no experts"):
        build_recipe(raw)
