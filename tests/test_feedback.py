"""Rewards beside consistency distillation (Hyper-SD's second stage): the optimum, what is scored, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import M, S, gaussian, gaussian_batch
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.config import load_recipe
from fastgen.denoiser import Denoiser, Inputs
from fastgen.networks import Networks
from fastgen.objectives.base import Loss
from fastgen.objectives.consistency import Consistency
from fastgen.objectives.feedback import Feedback
from fastgen.registry import RecipeError
from fastgen.rewards import Composite, Scorer
from fastgen.rewards.linear import Linear
from fastgen.rollout import RolloutPolicy

ROOT = Path(__file__).parents[1]
DIRECTION = (0.8, -0.3)
TEACHER = gaussian((M, M), (S, S))
A = torch.tensor(DIRECTION, dtype=torch.float64)
ONE = RolloutPolicy((1.0,))


class Shifted(Denoiser):
    """The exact denoiser with a constant added to its prediction: what a reward can move."""

    def __init__(self, shift: tuple[float, float] = (0.0, 0.0)):
        super().__init__(nn.Identity(), TEACHER.schedule, "sample")
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        return TEACHER(x_t, t, cond) + self.shift


def loss_of(student: Shifted, policy: RolloutPolicy = ONE, seen: list[Tensor] | None = None, **keys: Any) -> Loss:
    """seen: gets what the reward is asked about."""

    def decode(x: Tensor, clamp: bool = True) -> Tensor:
        if seen is not None:
            seen.append(x.detach())
        return x

    networks = Networks(
        {"student": student, "teacher": TEACHER}, policy, Scorer(Composite((Linear(DIRECTION),)), decode)
    )
    objective = Consistency(distance="square", **{"grid": {"count": 1}, **keys})
    return objective.loss(objective.turns(0, {})[-1], networks, gaussian_batch(512), {})


def gradient(student: Shifted, **keys: Any) -> Tensor:
    return torch.autograd.grad(loss_of(student, **keys).total, student.shift)[0]


def test_at_the_optimum_the_prediction_is_the_teachers_plus_weight_times_the_rewards_gradient() -> None:
    """One interval, from t = 1 to 0: the target is the teacher's prediction, which no student moves. The loss is
    |b|^2 / 2 - w a'b for a prediction that is off by b, so that b = w a at its minimum."""
    feedback = {"weight": 0.4}
    optimum = (0.4 * DIRECTION[0], 0.4 * DIRECTION[1])
    assert float(gradient(Shifted(optimum), feedback=feedback).abs().max()) < 1e-6  # rewards are in float32
    expected = -0.4 * A
    assert torch.allclose(gradient(Shifted(), feedback=feedback), expected, atol=1e-6)
    assert float(gradient(Shifted()).abs().max()) < 1e-12  # without it the teacher's own prediction is the optimum


def test_a_satisfied_reward_pushes_no_further() -> None:
    values = TEACHER(
        gaussian_batch(512).normal("noise"), torch.ones(512, dtype=torch.float64), gaussian_batch(512).cond
    )
    reward = values @ A
    target = float(reward.median())
    share = float((reward < target).double().mean())
    found = gradient(Shifted(), feedback={"weight": 0.4, "target": target})
    assert torch.allclose(found, -0.4 * share * A, atol=1e-6)
    loss = loss_of(Shifted(), feedback={"weight": 0.4, "target": target})
    assert float(loss.terms["feedback"]) == pytest.approx(float((target - reward).clamp_min(0).mean()), abs=1e-6)
    satisfied = gradient(Shifted(), feedback={"weight": 0.4, "target": float(reward.min()) - 1e-3})
    assert float(satisfied.abs().max()) < 1e-12


def test_predictions_outside_the_levels_are_not_scored() -> None:
    keys = {"grid": {"count": 4}}
    full, low, high = (
        loss_of(Shifted(), **keys, feedback={"weight": 1.0, "levels": levels}).terms["feedback"]
        for levels in ([0.0, 1.0], [0.0, 0.6], [0.6, 1.0])
    )
    assert torch.allclose(low + high, full) and 0 < abs(float(low)) < abs(float(full))


def test_the_clean_prediction_is_scored_and_not_the_point_at_the_edge_of_a_phase() -> None:
    seen: list[Tensor] = []
    policy = RolloutPolicy((1.0, 0.5), "ode")
    loss = loss_of(Shifted(), policy, seen, grid={"count": 2}, phases=[2], feedback={"weight": 1.0})
    (scored,) = seen
    batch = gaussian_batch(512)
    drawn = Consistency(grid={"count": 2}, phases=[2]).levels(batch, policy, 0)[0]
    assert batch.latents is not None
    x_t = TEACHER.schedule.add_noise(batch.latents, batch.normal("noise"), drawn)
    assert torch.allclose(scored, TEACHER(x_t, drawn, batch.cond))
    assert float(loss.terms["reward"]) == pytest.approx(float((scored @ A).mean()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "missing key rewards"),
        (["rewards={parts: [{name: digit_stroke}]}", "objective.feedback.levels=[0.5, 0.5]"], "must be below"),
        (["rewards={parts: [{name: digit_stroke}]}", "objective.feedback.weight=0"], "weight"),
    ],
)
def test_what_is_refused(overrides: list[str], message: str) -> None:
    recipe = ROOT / "recipes/digits_consistency_4step.yaml"
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, ["objective.feedback={weight: 0.1}", *overrides])


def test_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="feedback"):
        Consistency(teach="data", grid={"count": 4}, feedback=Feedback(weight=1.0)).check(
            RolloutPolicy((1.0, 0.5), chunks={"frames": 1})
        )
