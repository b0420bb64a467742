"""CDM against closed forms: its schedules, its term off the trajectory, its reduction to Decoupled DMD, and its fixed
point.

Straight lines from noise z to m + S z are a student whose prediction is the same at every point of a line, on any
schedule and off it: E[x0] = m + S (x_t - (1 - t) m) / (t + (1 - t) S)."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    MEAN,
    STD,
    Given,
    Recorder,
    gaussian,
    guided_pair,
    point_batch,
    posterior_mean,
    tiny_batch,
    tiny_networks,
    touched,
)
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.config import load_recipe
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.inputs import unextended
from fastgen.networks import Networks
from fastgen.objectives import CDM, DMD2
from fastgen.objectives.cdm import UNIFORM, CDMTurn
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy, backward_simulation
from fastgen.schedule import FlowSchedule, expand

FOUR = RolloutPolicy((1.0, 0.75, 0.5, 0.25), "ode")
PLAIN: dict[str, Any] = {"guidance_scale": 1.0, "ca_time": None}
STUDENT = CDMTurn("student", ("student",))


class Lines(Denoiser):
    """The student of straight lines from z to mean + std z."""

    def __init__(self, mean: float, std: float):
        super().__init__(nn.Identity(), FlowSchedule(), "sample")
        self.law = nn.Parameter(torch.tensor([mean, std], dtype=torch.float64))

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        (mean, std), t = self.law, expand(t, x_t)
        return mean + std * (x_t - (1 - t) * mean) / (t + (1 - t) * std)


class LinesFake(Denoiser):
    """Its converged fake score."""

    def __init__(self, student: Lines):
        super().__init__(nn.Identity(), FlowSchedule(), "sample")
        self.student = [student]

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        mean, std = self.student[0].law.detach()
        return posterior_mean(x_t, t, mean, std**2)


def lines(mean: float, std: float, teacher: Denoiser | None = None) -> Networks:
    student = Lines(mean, std)
    return Networks({"student": student, "teacher": teacher or gaussian(), "fake_score": LinesFake(student)}, FOUR)


# --- schedules


def test_schedules_have_random_lengths_and_levels() -> None:
    """1 to 28 steps, each as often; the first level is 1 and the others are uniform in [0.25, 0.95], in order; another
    schedule in every update, and one for all samples."""
    objective, lengths, inner = CDM(), [], list[float]()
    for key in range(3000):
        levels = objective.drawn_policy(point_batch(2, key), FOUR).timesteps
        assert levels[0] == 1 and list(levels) == sorted(levels, reverse=True)
        lengths.append(len(levels))
        inner += levels[1:]
    found, drawn = torch.tensor(lengths).double(), torch.tensor(inner).double()
    print(found.min(), found.max(), found.mean(), drawn.min(), drawn.max(), drawn.mean())
    assert (found.min(), found.max()) == (1, 28) and abs(found.mean() - 14.5) < 0.5
    assert 0.25 < drawn.min() < 0.251 and 0.949 < drawn.max() < 0.95 and abs(drawn.mean() - 0.6) < 0.01


def test_the_student_is_trained_on_the_drawn_trajectory() -> None:
    """Its calls are at the drawn levels down to each sample's stop, in steps of the ode."""
    objective, batch = CDM(**PLAIN, most_steps=6, least_steps=6), tiny_batch(64)
    networks = tiny_networks(objective, FOUR)
    recorder = Recorder(networks.student)
    networks.modules["student"] = recorder
    rollout = objective.rollout(networks, batch, grad=True)
    levels = objective.drawn_policy(batch, FOUR).timesteps
    assert set(rollout.stop.tolist()) == set(range(6))
    assert torch.equal(rollout.steps[-1].t, torch.tensor(levels, dtype=torch.float64)[rollout.stop])
    assert [call.grad for call in recorder.calls] == [False] * 5 + [True]
    other = dataclasses.replace(FOUR, timesteps=levels)
    expected = backward_simulation(recorder, other, batch, rollout.stop, grad=False)
    assert torch.equal(rollout.x, expected.x)


# --- the terms


def test_on_the_trajectory_it_is_decoupled_dmd() -> None:
    """Without the term off it, loss and gradient are those of dmd2 with ca_time, on the drawn schedule, to the bit."""
    objective, batch = CDM(guidance_scale=3.0, off_weight=0.0), tiny_batch(24)
    shared = {name: getattr(objective, name) for name in ("stops", "renoise_time", "fake_time", "normaliser_floor")}
    dmd2 = DMD2(guidance_scale=3.0, ca_time=UNIFORM, ida_decay=0.999, **shared)
    ends = []
    for one in (objective, dmd2):
        policy = FOUR if one is objective else objective.drawn_policy(batch, FOUR)
        networks = tiny_networks(one, dataclasses.replace(policy, step_counts=()))
        losses = [one.loss(turn, networks, batch, {}).total for turn in one.turns(0, {})]  # type: ignore[union-attr]
        for loss in losses:
            loss.backward()
        parameters = (p.grad for role in ("student", "fake_score") for p in networks[role].parameters())
        ends.append([*losses, *parameters])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_x_off_lies_on_the_students_own_line() -> None:
    """x_k + (t_o - t_k) v_k for levels above and below t_k, clamped to [0.02, 0.98]; no gradient reaches it. For
    straight lines the prediction there is that of the trajectory."""
    objective, batch = CDM(**PLAIN), point_batch(500, dim=1)
    networks = lines(-0.3, 0.6)
    recorder = Recorder(networks.student)
    networks.modules["student"] = recorder
    rollout = objective.rollout(networks, batch, grad=True)
    recorder.calls.clear()
    objective.off_loss(networks, batch, rollout)
    (call,), step = recorder.calls, rollout.steps[-1]
    velocity = (step.x_t - step.x0) / step.t[:, None]
    assert torch.allclose(call.x_t, step.x_t + (call.t - step.t)[:, None] * velocity, atol=1e-12)
    assert not call.x_t.requires_grad and call.grad
    assert 0.02 <= call.t.min() < 0.05 and 0.95 < call.t.max() <= 0.98 and (call.t > step.t).any()
    assert torch.allclose(recorder(call.x_t, call.t, batch.cond), step.x0, atol=1e-12)


def test_the_off_trajectory_gradient_is_the_score_difference_there() -> None:
    """(mu_fake - mu_real) / max(mean|x0 - mu_real|, 0.1) over the number of elements, at levels and noise of its own;
    without guidance, whatever the objective's is."""
    batch = point_batch(60, dim=3)
    x0 = batch.normal("x0").requires_grad_()
    teacher, fake = gaussian([0.0] * 3, [1.0] * 3), gaussian([0.5] * 3, [0.7] * 3)
    networks = Networks({"student": Given(x0), "teacher": teacher, "fake_score": fake}, FOUR)
    objective = CDM(most_steps=1)
    objective.off_loss(networks, batch, objective.rollout(networks, batch, grad=False)).backward()
    t = batch.uniform("off_renoise_time").clamp(0.02, 0.98)
    x_t = FlowSchedule().add_noise(x0.detach(), batch.normal("off_renoise"), t)
    real = teacher(x_t, t, batch.cond)
    size = (x0.detach() - real).abs().mean(1, keepdim=True)
    expected = (fake(x_t, t, batch.cond) - real) / size.clamp_min(0.1)
    assert x0.grad is not None and (size < 0.1).any()
    assert torch.allclose(x0.grad * x0.numel(), expected, atol=1e-12)


def test_the_term_is_warmed_up() -> None:
    """Linearly, over off_warmup updates: the turn says which update it is."""
    objective, batch = CDM(**PLAIN, off_warmup=3, off_weight=2.0), tiny_batch(24)
    networks = tiny_networks(objective, FOUR)
    matching = objective.matching_loss(networks, batch, objective.rollout(networks, batch, grad=True)).total
    shares = []
    for step in range(5):
        turn = objective.turns(step, {})[1]
        loss = objective.loss(turn, networks, batch, {})
        shares.append(float((loss.total - matching).detach() / loss.terms["off"]))
    assert shares == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def fitted(objective: CDM, networks: Networks) -> list[float]:
    optimizer = torch.optim.Adam(networks.student.parameters(), 0.03)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=250)
    for step in range(250):
        batch = point_batch(torch.arange(256) + 256 * step, key=step, dim=1, uncond=2)
        optimizer.zero_grad()
        objective.loss(STUDENT, networks, batch, {}).total.backward()
        optimizer.step()
        decay.step()
    return networks.student.law.tolist()  # type: ignore[operator, union-attr, return-value]


@pytest.mark.parametrize("off_weight", [pytest.param(0.0, marks=pytest.mark.slow), 1.0, 100.0])
def test_matching_ends_at_the_teacher(off_weight: float) -> None:
    """On the trajectory, on it and off it, and nearly off it alone: N(0.7, 1.3^2), on schedules of any length."""
    mean, std = fitted(CDM(**PLAIN, most_steps=4, off_weight=off_weight), lines(-1.0, 0.5))
    print(f"{mean:+.4f}, {std:.4f}")
    assert abs(mean - MEAN) < 0.03 and abs(std - STD) < 0.03


def test_guidance_pulls_beyond_the_conditional_mean() -> None:
    """Towards the conditional mean and away from the other, and less far than a guided teacher would, as the guidance
    term lies at lower levels than the matching terms."""
    pair = guided_pair(MEAN, MEAN - 0.4)
    mean, _ = fitted(CDM(guidance_scale=2.0, most_steps=4), lines(MEAN, STD, pair))
    print(f"{mean:+.4f}")
    assert MEAN + 0.05 < mean < MEAN + 0.4


# --- turns


def test_the_fake_score_is_blended_after_its_own_updates() -> None:
    objective = CDM(**PLAIN, ida_decay=0.75)
    networks = tiny_networks(objective, FOUR)
    fake, student = objective.turns(0, {})
    assert (fake.updates, fake.roles, student.roles) == (2, ("fake_score",), ("student",))
    with torch.no_grad():
        for p in networks.student.parameters():
            p.add_(1.0)
    before = [p.detach().clone() for p in networks.fake_score.parameters()]
    objective.finish(student, networks, {})
    assert all(torch.equal(a, b) for a, b in zip(before, networks.fake_score.parameters(), strict=True))
    objective.finish(fake, networks, {})
    pairs = zip(before, unextended(networks.fake_score), unextended(networks.student), strict=True)
    assert all(torch.allclose(after, 0.75 * old + 0.25 * other) for old, after, other in pairs)


@pytest.mark.parametrize("objective", [CDM(), CDM(**PLAIN)], ids=["guided", "plain"])
def test_each_turn_reaches_its_own_roles(objective: CDM) -> None:
    networks = tiny_networks(objective, FOUR)
    for turn in objective.turns(0, {}):
        objective.loss(turn, networks, tiny_batch(), {}).total.backward()  # type: ignore[union-attr]
        assert touched(networks) == set(turn.roles)
        for module in networks.values():
            module.zero_grad()


# --- what is refused, and the loop


RECIPE = Path(__file__).parents[1] / "recipes/mixture_cdm_4step.yaml"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.guidance_scale=2"], "with another scale give ca_time"),
        (["objective.ca_time={ends: clamp}"], "with guidance_scale 1 set ca_time: null"),
        (["objective.dm_weight=0.5"], "give ca_time too"),
        (["objective.guidance_rescale=0.5"], "no guided prediction"),
        (["objective.least_steps=9"], "is above most_steps 4"),
        (["objective.condition_on_stop=true"], "leave out condition_on_stop"),
        (["objective.student_input=data"], "leave out condition_on_stop"),
        (["objective.renoise_range=above"], "leave out condition_on_stop"),
        (["objective.off_weight=0", "objective.off_warmup=10"], "leave off_warmup out"),
        (["rollout={timesteps: [1.0, 0.5], transition: renoise}"], "set rollout.transition: ode"),
        (["rollout={timesteps: [0.9, 0.5], transition: ode}"], "begin rollout.timesteps with 1.0"),
        (["rollout.two_time=true"], "leave out rollout.two_time and embedded_steps"),
        (["rollout.embedded_steps=true"], "leave out rollout.two_time and embedded_steps"),
        (["objective.guidance_scale=2", "objective.ca_time={low: 0.4}"], "lowest of inner_time"),
        (["objective.ida_decay=0.999", "lora={student: {rank: 2}}"], "can be adapters are none"),
    ],
)
def test_wrong_settings_are_refused_before_anything_loads(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(RECIPE, overrides)
