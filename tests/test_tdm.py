"""TDM against closed forms: its fixed point is the exact ODE of a Gaussian, which it is not with the released fake
loss; its parts one by one; and students of several numbers of steps.

For data N(m, S^2) the ODE carries x_t to x_s = (1 - s) m + spread(s) / spread(t) (x_t - (1 - t) m), with the law of
the teacher at every level."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    MEAN,
    STD,
    AffineStudent,
    Given,
    Recorder,
    affine_networks,
    gaussian,
    guided_pair,
    point_batch,
    posterior_mean,
    reached,
    spread,
    tiny_batch,
    tiny_networks,
    touched,
)
from torch import Tensor, nn

from fastgen.batch import Batch, Conditioning
from fastgen.config import load_recipe
from fastgen.denoiser import Denoiser, Inputs
from fastgen.networks import Networks
from fastgen.objectives import TDM
from fastgen.objectives.tdm import GAP, importance_weight
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule, VPSchedule, expand

FOUR = RolloutPolicy((1.0, 0.75, 0.5, 0.25), "ode")
HALF = RolloutPolicy((1.0, 0.5), "ode")
SEVERAL = RolloutPolicy((1.0, 0.75, 0.5, 0.25), "ode", step_counts=(1, 2, 4), embedded_steps=True)


def exact_student(policy: RolloutPolicy, mean: float = MEAN) -> AffineStudent:
    """Its steps are those of the ODE of N(mean, STD^2)."""
    a, b = [], []
    for t, s in pairwise((*policy.timesteps, 0.0)):
        r = float(spread(torch.tensor(s).double(), STD) / spread(torch.tensor(t).double(), STD))
        a.append(((1 - s) - r * (1 - t)) * mean * t / (t - s))
        b.append((r - s / t) * t / (t - s))
    return AffineStudent(a, b, policy)


# --- the fixed point


@pytest.mark.parametrize("distance", ["huber", "l2"])
@pytest.mark.parametrize("renoise_range", ["segment", "above"])
def test_the_exact_ode_is_the_fixed_point(distance: Any, renoise_range: Any) -> None:
    """Its field is zero for every sample, at every segment, and not for an ODE of another mean. Fails where a sample
    is matched at another level than the end of its segment."""
    objective = TDM(distance=distance, renoise_range=renoise_range, condition_on_stop=True)
    batch = point_batch(400, dim=1)

    def field(mean: float) -> Tensor:
        networks = affine_networks(exact_student(FOUR, mean), gaussian())
        rollout = objective.rollout(networks, batch, FOUR, grad=False)
        assert set(rollout.stop.tolist()) == {0, 1, 2, 3}
        return objective.score_gradient(networks, batch, FOUR, rollout)[0]

    print(f"{field(MEAN).abs().max():.1e} at the answer, {field(MEAN + 0.05).abs().mean():.1e} beside it")
    assert field(MEAN).abs().max() < 1e-8 and field(MEAN + 0.05).abs().mean() > 0.01


@pytest.mark.parametrize("distance", [pytest.param("huber", marks=pytest.mark.slow), "l2"])
def test_training_ends_at_the_teachers_law_of_every_level(distance: Any) -> None:
    """Each step of an affine student, from another start: the mean and the variance after it."""
    student = AffineStudent([-1.0, -0.5], [0.4, 0.5], HALF)
    objective = TDM(distance=distance, condition_on_stop=True, normaliser_floor=0.1)
    networks = affine_networks(student, gaussian())
    optimizer = torch.optim.Adam(student.parameters(), 0.03)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=500)
    turn = objective.turns(0, {})[1]
    for step in range(500):
        batch = point_batch(torch.arange(256) + 256 * step, key=step, dim=1)
        optimizer.zero_grad()
        objective.loss(turn, networks, batch, {}).total.backward()
        optimizer.step()
        decay.step()
    means, variances = student.laws()
    levels = torch.tensor([0.5, 0.0], dtype=torch.float64)
    off = torch.cat([means - (1 - levels) * MEAN, variances.sqrt() - spread(levels, STD)])
    print(off.tolist())
    assert off.abs().max() < 0.02


def test_guidance_moves_the_fixed_point_to_the_guided_mean() -> None:
    """N(m + (w - 1) (m - m_uncond), S): the field is zero at its ODE."""
    objective = TDM(guidance_scale=2.0, distance="l2", condition_on_stop=True)
    batch = point_batch(200, dim=1, uncond=2)
    for mean, zero in ((MEAN + 0.4, True), (MEAN, False)):
        networks = affine_networks(exact_student(FOUR, mean), guided_pair(MEAN, MEAN - 0.4))
        rollout = objective.rollout(networks, batch, FOUR, grad=False)
        size = objective.score_gradient(networks, batch, FOUR, rollout)[0].abs().max()
        assert size < 1e-8 if zero else size > 0.1


# --- the fake score's two losses


class Line(Denoiser):
    """Predicts x0 = c + k x_t."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), FlowSchedule(), "sample")
        self.line = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        return self.line[0] + self.line[1] * x_t


class AtOneLevel(TDM):
    def draw_tau(self, batch: Batch, *_: Any) -> Tensor:
        return torch.full_like(batch.ids, 0.8, dtype=torch.float64)


def regressed(**fields: Any) -> float:
    """The slope of the line of least fake loss, for the first step of the exact student: t = 1, s = 0.5, tau = 0.8."""
    fake = Line()
    networks = affine_networks(exact_student(HALF), gaussian(), fake)
    batch = First(**vars(point_batch(400_000, dim=1)))
    objective = AtOneLevel(**fields)

    def loss() -> Tensor:
        return objective.fake_loss(networks, batch, HALF).total

    (first,) = torch.autograd.grad(loss(), fake.line, create_graph=True)  # the loss is quadratic in the line
    hessian = torch.stack([torch.autograd.grad(g, fake.line, retain_graph=True)[0] for g in first])
    return float(-torch.linalg.solve(hessian, first.detach())[1])


class First(Batch):
    """All samples stop in the first segment."""

    def uniform(self, name: str, by_group: bool = False, shape: tuple[int, ...] = ()) -> Tensor:
        value = super().uniform(name, by_group, shape)
        return 0 * value if name == "stop" else value


def test_the_segment_target_alone_makes_the_fake_score_the_teacher() -> None:
    """For the exact student the law of x_tau is the teacher's: slope 0.4777. The clean target gives 0.297; with the
    importance weights, whose mean is here a sum over one element, 0.1249, that of x0 noised to tau directly."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    t = torch.full((2,), 0.8, dtype=torch.float64)
    exact, direct = (
        float(posterior_mean(x, t, torch.tensor(0.0), torch.tensor(v)).diff(dim=0)) for v in (STD**2, 0.0)
    )
    found = [regressed(), regressed(fake_target="clean"), regressed(fake_target="clean", importance=True)]
    x0 = exact_student(HALF).b[0].item() ** 2  # the variance of the student's clean prediction
    direct = 0.2 * x0 / (0.2**2 * x0 + 0.8**2)
    print(f"{found}; the teacher {exact:.4f}, x0 noised directly {direct:.4f}")
    assert abs(found[0] - exact) < 0.005
    assert abs(found[1] - 0.297) < 0.01 and abs(found[2] - direct) < 0.01


@pytest.mark.parametrize("kind", ["flow", "vp"])
def test_the_importance_weight_is_that_of_the_two_noises(kind: str, vp_schedule: VPSchedule) -> None:
    """eta by its definition, (alpha_ts sigma_s noise_hat + sigma_ts noise) / sigma_t; with means over the elements."""
    schedule = FlowSchedule() if kind == "flow" else vp_schedule
    batch = point_batch(50, dim=3)
    x0, noise_hat, noise = (batch.normal(name) for name in ("x0", "noise_hat", "noise"))
    s, t = torch.full((50,), 0.3).double(), torch.linspace(0.35, 0.9, 50).double()
    x_t = schedule.renoise(schedule.add_noise(x0, noise_hat, s), noise, s, t)
    ratio, sigma_ts = schedule.renoise_coefficients(s, t, x0)
    eta = (ratio * expand(schedule.sigma(s), x0) * noise_hat + sigma_ts * noise) / expand(schedule.sigma(t), x0)
    expected = (-0.5 * eta.square().mean(1)).exp() / (-0.5 * noise.square().mean(1)).exp()
    assert torch.allclose(importance_weight(schedule, x0, x_t, noise, t), expected, rtol=1e-8)


def test_the_clean_targets_weight_is_min_snr() -> None:
    """By hand, with and without the importance factor; several levels lie on either side of the clamp."""
    batch = tiny_batch(24)
    for importance in (False, True):
        objective = TDM(fake_target="clean", importance=importance)
        networks = tiny_networks(objective, FOUR)
        found = objective.fake_loss(networks, batch, FOUR).total
        rollout = objective.rollout(networks, batch, FOUR, grad=False)
        t = objective.draw_tau(batch, "fake_time", objective.fake_time, FOUR, rollout, networks.fake_score)
        noise, x0 = batch.normal("fake_noise"), rollout.steps[-1].x0
        x_t = FlowSchedule().renoise(rollout.x, noise, rollout.s, t)
        snr = ((1 - t) / t) ** 2
        weight = snr.clamp(max=5) * (importance_weight(FlowSchedule(), x0, x_t, noise, t) if importance else 1)
        error = (networks.fake_score(x_t, t, batch.cond) - x0).square().mean(1)
        assert 0 < (snr > 5).sum() < 24
        assert torch.allclose(found, (weight * error).mean())


# --- the student's distance, and the levels


@pytest.mark.parametrize("distance", ["huber", "l2"])
def test_the_gradient_is_that_of_the_distance(distance: str) -> None:
    """Of sqrt(d^2 + c^2) - c, or half of d^2, over mean|x0 - real|, with respect to x0; by autograd."""
    batch = First(**vars(point_batch(40, dim=5)))
    x0 = batch.normal("x0").requires_grad_()
    modules = {"student": Given(x0), "teacher": gaussian([0.5] * 5, [1.0] * 5), "fake_score": Given(0.1 * x0.detach())}
    networks = Networks(modules, FOUR)
    objective = TDM(distance=distance, huber_c=0.2)  # type: ignore[arg-type]
    objective.student_loss(networks, batch, FOUR).total.backward()
    rollout = objective.rollout(networks, batch, FOUR, grad=False)
    t = objective.draw_tau(batch, "renoise_time", objective.renoise_time, FOUR, rollout, networks.teacher)
    x_t = FlowSchedule().renoise(rollout.x, batch.normal("renoise"), rollout.s, t)
    x = x0.detach().clone().requires_grad_()
    real, target = networks.teacher(x_t, t, batch.cond), 0.1 * x0.detach()
    d = x - (x.detach() - (target - real))
    size = (d.square() + 0.2**2).sqrt() - 0.2 if distance == "huber" else 0.5 * d.square()
    (size / (x.detach() - real).abs().mean(1, keepdim=True)).mean().backward()
    assert x0.grad is not None and torch.allclose(x0.grad, x.grad, atol=1e-15)  # type: ignore[arg-type]


@pytest.mark.parametrize("renoise_range", ["segment", "above"])
def test_tau_lies_in_the_segment(renoise_range: Any) -> None:
    """Or above its end; of teacher and fake score alike; and the law is uniform there."""
    objective = TDM(renoise_range=renoise_range, condition_on_stop=True)
    networks = tiny_networks(objective, FOUR)
    networks.modules |= {role: Recorder(networks[role]) for role in ("teacher", "fake_score")}  # type: ignore[arg-type]
    batch = tiny_batch(4000)
    rollout = objective.rollout(networks, batch, FOUR, grad=False)
    objective.student_loss(networks, batch, FOUR)
    objective.fake_loss(networks, batch, FOUR)
    begin = torch.tensor(FOUR.timesteps, dtype=torch.float64)[rollout.stop]
    top = begin.clamp(max=0.98) if renoise_range == "segment" else torch.full_like(begin, 0.98)
    low = (rollout.s + GAP).clamp(min=0.02)
    calls = [*networks.teacher.calls, *networks.fake_score.calls]  # type: ignore[operator, misc]
    assert len(calls) == 3
    for call in calls:
        share = (call.t - low) / (top - low)
        assert share.min() > -1e-9 and share.max() < 1 + 1e-9 and abs(share.mean() - 0.5) < 0.02


def test_only_the_executed_steps_prediction_carries_gradient() -> None:
    objective = TDM(condition_on_stop=True)
    networks, batch = tiny_networks(objective, FOUR), tiny_batch(64)
    fake, student = objective.turns(0, {})
    assert (fake.roles, fake.updates, student.roles) == (("fake_score",), 1, ("student",))
    objective.loss(student, networks, batch, {}).total.backward()
    assert touched(networks) == {"student"}
    networks.student.zero_grad()
    objective.loss(fake, networks, batch, {}).total.backward()
    assert touched({role: m for role, m in networks.items() if role != "student"}) == {"fake_score"}
    assert all(p.grad is None for p in networks.student.parameters())


# --- several numbers of steps


def test_one_student_is_trained_for_all_its_numbers_of_steps_and_told_which() -> None:
    """Student and fake score hear the number, which every call's levels fit; and each number has its turn."""
    objective, seen = TDM(), set[float]()
    networks = tiny_networks(objective, SEVERAL)
    networks.modules |= {role: Recorder(networks[role]) for role in ("student", "fake_score")}  # type: ignore[arg-type]
    student, fake = networks.student, networks.fake_score
    assert isinstance(student, Recorder) and isinstance(fake, Recorder)
    for key in range(12):
        student.calls.clear()
        fake.calls.clear()
        objective.loss(objective.turns(0, {})[1], networks, tiny_batch(64, key), {})
        told = {float(n) for call in (*student.calls, *fake.calls) for n in call.inputs.num_steps.unique()}  # type: ignore[union-attr]
        assert len(told) == 1
        count = told.pop()
        levels = {round(count * float(t), 9) for call in student.calls for t in call.t}
        assert levels <= set(range(1, int(count) + 1))
        seen.add(count)
    assert seen == {1, 2, 4}


def test_the_number_of_steps_reaches_both_networks() -> None:
    """Its branch is zero at the start, so that a new network is the old one, and it gets gradient in both turns."""
    objective = TDM()
    networks, plain = tiny_networks(objective, SEVERAL), tiny_networks(objective, FOUR)
    batch, x = tiny_batch(16), tiny_batch(16).normal("x")
    t = torch.linspace(0.1, 1, 16, dtype=torch.float64)
    for role in ("student", "fake_score"):
        for count in (1.0, 4.0):
            told = networks[role](x, t, batch.cond, Inputs(num_steps=torch.full_like(t, count)))
            assert torch.equal(told, plain[role](x, t, batch.cond))
    for turn in objective.turns(0, {}):
        objective.loss(turn, networks, batch, {}).total.backward()
        (role,) = turn.roles
        assert all(reached(networks[role]).values())
        networks[role].zero_grad()


def test_fake_updates_that_share_a_rollout_share_its_number_of_steps() -> None:
    objective = TDM(share_rollout=True)
    networks = tiny_networks(objective, SEVERAL)
    recorder = Recorder(networks.fake_score)
    networks.modules["fake_score"] = recorder
    turn, shared = objective.turns(0, {})[0], dict[str, object]()
    assert turn.one_rollout
    for key in range(6):
        objective.loss(turn, networks, dataclasses.replace(tiny_batch(16, key), shared=shared), {})
    assert len({float(call.inputs.num_steps[0]) for call in recorder.calls}) == 1  # type: ignore[index]


# --- what is refused, and the loop


RECIPE = Path(__file__).parents[1] / "recipes/mixture_tdm_4step.yaml"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout={timesteps: [1.0, 0.5], transition: renoise}"], "set rollout.transition: ode"),
        (["objective.importance=true"], "set fake_target: clean"),
        (["objective.fake_target=clean", "objective.fake_space=sample"], "leave them out"),
        (["objective.fake_target=clean", "objective.fake_space=null", "objective.fake_clamp=3"], "leave them out"),
        (["objective.renoise_range=above"], "set condition_on_stop: true"),
        (["objective.condition_on_stop=true"], "leave out one of the two"),
        (
            ["objective.renoise_time={low: 0.3, high: 0.98}"],
            "renoise_time.* has no level in the segment from 0 to 0.25",
        ),
        (["objective.fake_time={low: 0.02, high: 0.5}"], "fake_time.* has no level in the segment from 0.5 to 1"),
        (["rollout.step_counts=[1, 2]"], "among them the 4 of timesteps"),
        (["rollout.step_counts=[4, 4]"], "different numbers"),
        (["rollout.step_counts=[]"], "give step_counts too"),
        (["rollout.timesteps=[0.9, 0.6, 0.4, 0.2]"], "begin at 1"),
        (["objective={name: dmd2}", "rollout.embedded_steps=false"], "leave it out, or choose tdm or cdm"),
        (["objective={name: phased_dmd, phases: [{first: 0, last: 4, updates: 1800}]}"], "with embedded_steps"),
    ],
)
def test_wrong_settings_are_refused_before_anything_loads(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(RECIPE, overrides)
