"""Truncated training of a consistency model on a Gaussian, whose consistency function is known at every level."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    GAUSSIAN,
    GaussianMap,
    Recorder,
    consistency_map,
    exact_networks,
    gaussian_batch,
    one_loss,
    reached,
    tiny_backbone,
    tiny_networks,
)
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.config import load_recipe
from fastgen.denoiser import Denoiser, Inputs
from fastgen.flow.time_pairs import GridPairs, ShrinkingPairs
from fastgen.networks import Networks
from fastgen.objectives.consistency import Consistency, ConsistencyTurn
from fastgen.objectives.truncation import Truncation
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule, TimeSampler

RECIPE = str(Path(__file__).parents[1] / "recipes/mixture_tcm_2step.yaml")
TWO = RolloutPolicy((1.0, 0.7))
LEVEL = 2 / 3
TCM = Consistency(
    teach="data", shrinking=ShrinkingPairs(period=1, cap=0.9), distance="square", truncation=Truncation(begin=5)
)
SECOND = TCM.turns(5, {})[-1]
STORED = {"stored": torch.ones((), dtype=torch.int64)}


class WrongBelow(Denoiser):
    """The exact consistency function from t' on, and nonsense below it, in which `off` is a parameter."""

    def __init__(self, off: float = 3.0):
        super().__init__(nn.Identity(), FlowSchedule(), "sample")
        self.exact, self.off = consistency_map(), nn.Parameter(torch.tensor(off, dtype=torch.float64))

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        return self.exact(x_t, t, cond) + torch.where(t < LEVEL, self.off, 0.0)[:, None]


def second_stage(student: Denoiser, first: Denoiser) -> Networks:
    networks = exact_networks(student, TWO)
    networks.modules["first"] = first
    return networks


def loss_of(objective: Consistency, student: Denoiser, first: Denoiser, count: int = 512) -> Tensor:
    networks = second_stage(student, first)
    return objective.loss(SECOND, networks, gaussian_batch(count), STORED).total  # type: ignore[union-attr]


def exact_solver(monkeypatch: pytest.MonkeyPatch) -> Consistency:
    """TCM with a teacher whose steps are exact."""
    flow = GaussianMap()

    def step(_: Consistency, networks: Networks, batch: Any, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        u = flow(x, t, batch.cond, Inputs(s=s), predict="flow_prediction").detach()
        return x - (t - s)[:, None] * u

    monkeypatch.setattr(Consistency, "solver_step", step)
    return dataclasses.replace(TCM, teach="teacher")


def test_the_exact_map_is_a_fixed_point_whatever_the_student_is_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the exact first stage. If that is wrong below t', or the student above, there is a loss, which grows as
    the square of the student's error."""
    objective = exact_solver(monkeypatch)
    student = WrongBelow()
    loss = loss_of(objective, student, consistency_map())
    assert float(loss.detach()) < 1e-20
    off, inside = torch.autograd.grad(loss, [student.off, student.exact.off], allow_unused=True)  # type: ignore[list-item]
    assert (off is None or not float(off)) and abs(float(inside)) < 1e-12
    at = [float(loss_of(objective, consistency_map(error), consistency_map())) for error in (1e-3, 1e-2)]
    assert 90 < at[1] / at[0] < 110
    assert float(loss_of(objective, student, consistency_map(0.1))) > 1e-4
    plain = dataclasses.replace(objective, truncation=None)
    assert float(one_loss(plain, exact_networks(student, TWO), gaussian_batch(512))) > 1e-2


def test_levels_are_those_of_the_law_and_the_boundary_has_its_share() -> None:
    """t in [t', 160/161], a quarter at t' exactly, and s < t at the ratio of the shrinking law."""
    truncation, batch = Truncation(begin=5), gaussian_batch(4000)
    t, s = truncation.levels(batch, TCM.shrinking, 0)  # type: ignore[arg-type]
    at = t == LEVEL
    assert float(at.double().mean()) == pytest.approx(0.25, abs=1e-3) and torch.equal(at, truncation.boundary(batch))
    assert float(t.min()) == LEVEL and float(t.max()) <= 160 / 161 and bool((s < t).all())
    sigma = (0.5 * t / (1 - t))[~at]
    assert float(sigma.median()) == pytest.approx(1.21, abs=0.03)  # tests/test_schedule.py has the law itself
    late = TCM.shrinking.below(t, 10**6)  # type: ignore[union-attr]
    assert torch.allclose(late / (1 - late), 0.9 * t / (1 - t))
    assert not bool((late[~at] < LEVEL).all()) and bool((late[at] < LEVEL).all())


def test_the_two_means_have_their_weights() -> None:
    """The total is the mean over the other samples, and 0.1 of that at the boundary, against both written out."""
    batch, student, first = gaussian_batch(4000), consistency_map(0.2), consistency_map()
    networks = second_stage(student, first)
    points = TCM.endpoints(SECOND, networks, batch, STORED)  # type: ignore[arg-type]
    square = (points.student - points.target).square().mean(1)
    at = TCM.truncation.boundary(batch)  # type: ignore[union-attr]
    loss = TCM.loss(SECOND, networks, batch, STORED)
    wanted = square[~at].mean() + 0.1 * square[at].mean()
    assert float(loss.total) == pytest.approx(float(wanted), rel=2e-3)  # type: ignore[union-attr]
    assert float(loss.terms["boundary"]) == pytest.approx(float(square[at].mean()) ** 0.5)  # type: ignore[union-attr]


def test_each_network_is_asked_for_its_own_levels() -> None:
    """The target is the first stage's value where s < t' and the student's elsewhere; gradient reaches neither."""
    student, first = Recorder(consistency_map(0.1)), Recorder(consistency_map(-0.2))
    batch = gaussian_batch(512)
    points = TCM.endpoints(SECOND, second_stage(student, first), batch, STORED)  # type: ignore[arg-type]
    _, s = TCM.truncation.levels(batch, TCM.shrinking, 5)  # type: ignore[union-attr, arg-type]
    x_s = FlowSchedule().add_noise(batch.latents, batch.normal("noise"), s)  # type: ignore[arg-type]
    with torch.no_grad():
        wanted = torch.where((s < LEVEL)[:, None], first(x_s, s, batch.cond), student(x_s, s, batch.cond))
    assert torch.allclose(points.target, wanted) and not points.target.requires_grad
    assert 0.3 < float((s < LEVEL).double().mean()) < 0.9
    assert [call.grad for call in first.calls[:1]] == [False]
    assert sum(call.grad for call in student.calls) == 1


def test_pure_data_is_its_own_target() -> None:
    """At s = 0, as at the beginning of a shrinking law, the target is the data itself."""
    wide = dataclasses.replace(TCM, shrinking=ShrinkingPairs(period=10**6))
    networks, batch = second_stage(consistency_map(), consistency_map(0.5)), gaussian_batch(64)
    points = wide.endpoints(SECOND, networks, batch, STORED)  # type: ignore[arg-type]
    assert bool((wide.truncation.levels(batch, wide.shrinking, 5)[1] == 0).any())  # type: ignore[union-attr, arg-type]
    zero = wide.truncation.levels(batch, wide.shrinking, 5)[1] == 0  # type: ignore[union-attr, arg-type]
    assert torch.equal(points.target[zero], batch.latents[zero])  # type: ignore[index]


class Dropping(GaussianMap):
    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        kept = nn.functional.dropout(torch.ones_like(x_t), 0.5, self.training)
        return kept * super().call_network(x_t, t, cond, inputs)


def test_all_evaluations_draw_the_same_dropout() -> None:
    """Neighbouring levels: the points differ by O(t - s), and by O(1) with other dropout."""
    near = ShrinkingPairs(period=1, cap=0.9999)
    objective = dataclasses.replace(TCM, shrinking=near)
    turn = dataclasses.replace(SECOND, update=10**6)  # type: ignore[type-var]
    networks = second_stage(Dropping(end=torch.zeros_like), Dropping(end=torch.zeros_like))
    loss = objective.loss(turn, networks, gaussian_batch(256), STORED).total  # type: ignore[union-attr]
    assert float(loss) < 1e-3


def test_the_first_stage_is_ect_and_is_stored_where_it_ends() -> None:
    """Up to `begin` nothing is truncated; then the student's weights of that moment are kept, without gradient."""
    turns = [TCM.turns(k, {})[-1] for k in (0, 4, 5, 9)]
    assert [turn.truncated for turn in turns] == [False, False, True, True]  # type: ignore[attr-defined]
    networks = tiny_networks(TCM, TWO, backbone=tiny_backbone(GAUSSIAN))
    state = TCM.init_state()
    plain = dataclasses.replace(TCM, truncation=None)
    batch = gaussian_batch()
    losses = [o.loss(turns[0], networks, batch, state).total for o in (TCM, plain)]  # type: ignore[union-attr]
    assert torch.equal(*losses) and not int(state["stored"])
    with torch.no_grad():
        for p in networks.student.parameters():
            p.add_(0.1)
    TCM.loss(turns[2], networks, batch, state).total.backward()  # type: ignore[union-attr]
    pairs = list(zip(networks["first"].parameters(), networks.student.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs) and not any(reached(networks["first"]).values())
    with torch.no_grad():
        for _, b in pairs:
            b.add_(0.1)
    TCM.loss(turns[3], networks, batch, state)
    assert not any(torch.equal(a, b) for a, b in pairs)
    assert isinstance(turns[0], ConsistencyTurn)


def test_what_cannot_be_is_refused() -> None:
    for text, lines in {
        "name its run in init_from": ["objective.truncation.begin=0"],
        "is not within this run": ["objective.truncation.begin=4000"],
        "trains levels from": ["rollout.timesteps=[1.0, 0.5]"],
        "roles that can be adapters are none": ["lora={student: {rank: 4}}"],
        "give shrinking": ["objective.shrinking=null", "objective.grid={count: 8}", "objective.weight=one"],
    }.items():
        with pytest.raises(RecipeError, match=text):
            load_recipe(RECIPE, lines)
    with pytest.raises(ValueError, match="must be above 0"):
        Truncation(time=TimeSampler(low=0.0, high=0.9))
    top = Truncation(time=TimeSampler(low=0.5, high=1.0)).levels(gaussian_batch(8), TCM.shrinking, 0)  # type: ignore[arg-type]
    assert bool((top[1] < top[0]).all())
    with pytest.raises(ValueError, match="leave out phases and end"):
        dataclasses.replace(TCM, phases=(2,))
    with pytest.raises(ValueError, match="give shrinking"):
        Consistency(grid=GridPairs(count=4), truncation=Truncation(begin=5))
    lower = dataclasses.replace(TCM, truncation=Truncation(begin=5, time=TimeSampler(low=0.4, high=0.99)))
    lower.check(RolloutPolicy((1.0, 0.5)))
    assert TCM.learned_levels == () and lower.truncation is not None and lower.truncation.level == 0.4
