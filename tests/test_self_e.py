"""The self_e objective: its parts against closed forms, and what it refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    FOUR_JUMPS,
    AffineStudent,
    ExactFake,
    Given,
    M,
    Recorder,
    S,
    exact_networks,
    gaussian,
    gaussian_batch,
    guided_pair,
    point_batch,
    reached,
    tiny_batch,
    tiny_networks,
)
from torch import Tensor, nn

from fastgen.config import load_recipe
from fastgen.denoiser import Denoiser, Inputs
from fastgen.networks import Networks
from fastgen.objectives.self_e import Fake, SelfE, SelfETurn, pull_share
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule, TimeSampler

ROOT = Path(__file__).parents[1]
UNIFORM = TimeSampler(low=0.0, high=1.0)
STUDENT = SelfETurn("student", ("student",))


def loss_of(objective: SelfE, networks: Networks, batch: Any, turn: SelfETurn = STUDENT) -> Tensor:
    """The loss in an update after the first, whose target network is the one that is given."""
    return objective.loss(turn, networks, batch, {"updates": torch.ones((), dtype=torch.int64)}).total  # type: ignore


def self_networks(student: Denoiser, evaluator: Denoiser, fake: Denoiser | None = None) -> Networks:
    modules: dict[str, nn.Module] = {"student": student, "teacher": gaussian((M, M), (S, S)), "target": evaluator}
    return Networks(modules | ({} if fake is None else {"fake_score": fake}), FOUR_JUMPS)


def test_the_share_of_the_pull_is_lambda_over_one_plus_lambda() -> None:
    schedule = FlowSchedule()
    t, s = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.6, 0.9, 1.0, 1.0], [0.1, 0.6, 0.2, 0.5, 1.0]))
    weight = t[:3] / (1 - t[:3]) - s[:3] / (1 - s[:3])
    found = pull_share(schedule, t, s)
    assert torch.allclose(found[:3], weight / (1 + weight))
    assert found[3:].tolist() == [1.0, 0.0] and found[1] == 0


def test_on_the_diagonal_it_is_flow_matching() -> None:
    """At s = t the evaluation has no weight: the loss is the square of the velocity's error, whatever evaluates."""
    objective = SelfE(time=UNIFORM, diagonal=0.999, normalise=False)
    networks = self_networks(exact_networks(0.1).student, Given(torch.tensor(5.0, dtype=torch.float64)))
    batch = gaussian_batch()
    t, s = objective.levels(batch, 1.0, 0.999)
    assert torch.equal(t, s)
    x_t = networks.student.schedule.add_noise(batch.latents, batch.normal("noise"), t)  # type: ignore[arg-type]
    v = networks.student(x_t, t, batch.cond, Inputs(s=t), predict="flow_prediction")
    wanted = (v - (batch.normal("noise") - batch.latents)).square().mean()  # type: ignore[operator]
    assert torch.allclose(loss_of(objective, networks, batch), wanted)


def test_the_evaluation_is_the_score_of_a_classifier() -> None:
    """For two classes N(a, S^2) and N(b, S^2), G(c) - G(empty) = t^2 / (1 - t) grad log p(c | x)  (Tweedie)."""
    pair = guided_pair((0.7, 0.7), (-0.3, 0.2), (0.5, 0.5))
    ids = torch.arange(64)
    batch = point_batch(ids, uncond=2)
    networks = self_networks(Plain(pair), Plain(pair))
    x0, s = batch.normal("x"), torch.full((64,), 0.4, dtype=torch.float64)
    pull = SelfE().evaluation(STUDENT, networks, batch, batch.cond, x0, s, s)
    x_s = (0.6 * x0 + 0.4 * batch.normal("renoise")).requires_grad_()
    alpha, sigma = s[:, None] * 0 + 0.6, s[:, None]
    label, empty = batch.cond["label"], batch.uncond["label"]
    ratio = pair.mixture.log_density(x_s, alpha, sigma, label) - pair.mixture.log_density(x_s, alpha, sigma, empty)
    (score,) = torch.autograd.grad(ratio.sum(), x_s)
    assert torch.allclose(-pull, 0.4**2 / 0.6 * score, atol=1e-9)


class Plain(Denoiser):
    """A denoiser that is told a second level and does not read it."""

    def __init__(self, denoiser: Denoiser):
        super().__init__(nn.Identity(), denoiser.schedule, "sample")
        self.denoiser = denoiser

    def call_network(self, x_t: Tensor, t: Tensor, cond: Any, inputs: Any) -> Tensor:
        return self.denoiser(x_t, t, cond)


def test_the_conditional_evaluator_is_the_target_and_the_other_the_student() -> None:
    """Both at (s, s): x0 - x_self = G(empty) - G^-(c), with one number for each."""
    student, target = (Given(torch.tensor(v, dtype=torch.float64)) for v in (0.25, 1.0))
    watched = [Recorder(student), Recorder(target)]
    batch = gaussian_batch(uncond=2)
    t, s = SelfE().levels(batch, 1.0, 0.0)
    pull = SelfE().evaluation(STUDENT, self_networks(*watched), batch, batch.cond, batch.normal("x"), t, s)
    assert torch.equal(pull, torch.full_like(pull, 0.25 - 1.0))
    for network in watched:
        (call,) = network.calls
        assert torch.equal(call.t, s) and torch.equal(call.inputs.s, s)  # type: ignore[arg-type]


def test_a_narrow_student_with_its_fake_model_is_widened_and_without_it_is_not() -> None:
    """Samples m + 0.3 z of data N(m, S^2) at t = 1, s below: with the exact model of them, descent spreads them. The
    classifier alone has no opinion, as there are no classes."""
    student = AffineStudent([[M, M]], [[0.3, 0.3]])
    evaluator, found = Plain(gaussian((M, M), (S, S))), {}
    for fake in (True, False):
        networks = self_networks(Plain(student), evaluator, Plain(ExactFake(student)))
        networks.modules["empty"] = evaluator
        kind = SelfE if fake else Blind
        objective = kind(time=TimeSampler(low=0.9999, high=1.0), diagonal=0.0, normalise=False, fake=Fake())
        loss = loss_of(objective, networks, gaussian_batch(512), dataclasses.replace(STUDENT, fake=fake))
        found[fake] = float(torch.autograd.grad(loss, student.b)[0].mean())
    print(found)
    assert found[True] < -1e-3 and abs(found[False]) < 1e-9 + abs(found[True]) / 100


class Blind(SelfE):
    """Evaluates with and without the prompt by one network."""

    def evaluation(self, turn: Any, networks: Networks, batch: Any, cond: Any, x0: Tensor, t: Any, s: Any) -> Tensor:
        both = {"student": networks["empty"], "target": networks["empty"]}
        return super().evaluation(turn, Networks(both, networks.policy), batch, cond, x0, t, s)


def test_the_target_has_the_norm_of_the_data() -> None:
    """With a prediction of 0 and no pull, the residual is y / t, and y has the norm of x0."""
    zero = Given(torch.zeros((), dtype=torch.float64))
    objective = SelfE(time=TimeSampler(low=0.5, high=0.5000001), diagonal=0.0)
    batch = gaussian_batch()
    assert batch.latents is not None
    wanted = (batch.latents / 0.5).square().mean()
    found = loss_of(objective, self_networks(zero, zero), batch)
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert not torch.allclose(
        loss_of(dataclasses.replace(objective, normalise=False), self_networks(zero, zero), batch), wanted
    )


def test_levels_keep_their_law_and_the_gap_grows() -> None:
    objective, batch = SelfE(time=UNIFORM, diagonal=0.5, gap_growth=4), gaussian_batch(4000)
    t, s = objective.levels(batch, 0.5, 0.5)
    assert float((s == t).double().mean()) == pytest.approx(0.5, abs=0.03)
    assert bool((s >= 0.5 * t - 1e-9).all()) and bool((s <= t).all())
    gaps = [objective.turns(k, {})[-1].max_gap for k in (0, 1, 3, 9)]  # type: ignore[attr-defined]
    assert gaps == [0.25, 0.5, 1.0, 1.0]


def test_the_fake_model_is_trained_from_the_first_update_and_used_from_its_start() -> None:
    objective = SelfE(fake=Fake(start=2, updates=3))
    kinds = [[(turn.name, turn.updates, turn.fake) for turn in objective.turns(k, {})] for k in (1, 2)]  # type: ignore
    assert kinds[0] == [("fake_score", 3, False), ("student", 1, False)] and kinds[1][1] == ("student", 1, True)
    student = Recorder(exact_networks(0.1).student)
    fake = Recorder(Plain(gaussian((M, M), (S, S))))
    networks = self_networks(student, student, fake)
    loss_of(objective, networks, gaussian_batch(), objective.turns(0, {})[0])  # type: ignore[arg-type]
    (asked,), (seen,) = student.calls, fake.calls
    assert not asked.grad and seen.grad
    assert torch.equal(seen.t, asked.inputs.s) and torch.equal(seen.inputs.s, asked.t)  # type: ignore[arg-type]


def test_each_turn_moves_its_own_networks_and_the_target_follows() -> None:
    objective = SelfE(fake=Fake(), target_decay=0.5, time=UNIFORM, gap_growth=0)
    networks, state = tiny_networks(objective, FOUR_JUMPS), objective.init_state()
    for turn in objective.turns(0, state):
        objective.loss(turn, networks, tiny_batch(), state).total.backward()  # type: ignore[union-attr]
        for role, module in networks.items():
            assert any(reached(module).values()) == (role in turn.roles), (turn.name, role)
            module.zero_grad()
    pairs = list(zip(networks["target"].parameters(), networks.student.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)  # it began as the student
    before = [a.detach().clone() for a, _ in pairs]
    with torch.no_grad():
        for _, b in pairs:
            b.add_(1.0)
    objective.finish(objective.turns(0, state)[0], networks, state)
    assert all(torch.equal(a, old) for (a, _), old in zip(pairs, before, strict=True)) and int(state["updates"]) == 0
    objective.finish(objective.turns(0, state)[-1], networks, state)
    assert all(torch.allclose(a, old + 0.5) for (a, _), old in zip(pairs, before, strict=True))
    assert int(state["updates"]) == 1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="two_time: true"):
        SelfE().check(RolloutPolicy((1.0,)))
    with pytest.raises(ValueError, match="embedded_guidance"):
        SelfE().check(RolloutPolicy((1.0,), "ode", two_time=True, embedded_guidance=2.0))
    recipe = ROOT / "recipes/mixture_self_e_4step.yaml"
    with pytest.raises(RecipeError, match=r"give backbone\.classes"):
        load_recipe(recipe, ["backbone.classes=null", "objective.fake=null", "optimizers={student: {lr: 1e-3}}"])
    with pytest.raises(RecipeError, match="can be adapters are"):
        load_recipe(recipe, ["lora={student: {rank: 2}}"])
