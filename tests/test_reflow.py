"""The reflow and progressive objectives on a Gaussian, whose pairs and whose DDIM steps are known."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    GaussianMap,
    M,
    Recorder,
    S,
    exact_networks,
    gaussian_batch,
    mixed_teacher,
    one_loss,
    reached,
    spread,
    tiny_batch,
    tiny_networks,
)
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.config import load_recipe
from fastgen.denoiser import Denoiser, Inputs
from fastgen.networks import Networks
from fastgen.objectives.progressive import Progressive, StageTurn, clean_prediction
from fastgen.objectives.reflow import FlowGuide, Reflow, ReflowTurn
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy, transition
from fastgen.schedule import FlowSchedule, TimeSampler, VPSchedule, expand

ROOT = Path(__file__).parents[1]
FOUR = RolloutPolicy((1.0, 0.75, 0.5, 0.25), "ode")
ONE = RolloutPolicy((1.0,), "ode")


class Straight(Denoiser):
    """The rectified flow of the pairs (z, M + S z), where z is known from x_t = (1 - t) M + ((1 - t) S + t) z."""

    def __init__(self, off: float = 0.0):
        super().__init__(nn.Identity(), FlowSchedule(), "flow_prediction")
        self.off = nn.Parameter(torch.tensor(off, dtype=torch.float64))

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        level = expand(t, x_t)
        z = (x_t - (1 - level) * M) / ((1 - level) * S + level)
        return z - (M + S * z) + self.off * torch.sin(2 * x_t + level)


def test_the_flow_of_the_exact_pairs_is_straight() -> None:
    """No loss at the rectified flow of the pairs, whose single Euler step is exact; that of independent noise and data
    has one. Errors grow as their square."""
    batch = gaussian_batch(pairs=True)
    at = [float(one_loss(Reflow(), exact_networks(Straight(off), FOUR), batch)) for off in (0.0, 0.01, 0.1)]
    assert at[0] < 1e-25 and 90 < at[2] / at[1] < 110
    curved = float(one_loss(Reflow(), exact_networks(GaussianMap(end=lambda t: t), FOUR), batch))
    assert curved > 1e-3
    z = batch.normal("z")
    one = torch.ones(64, dtype=torch.float64)
    assert torch.allclose(z - Straight()(z, one, batch.cond, predict="flow_prediction"), M + S * z)


def test_annealing_begins_as_flow_matching_and_ends_as_reflow() -> None:
    """At beta = 1 the optimum is the marginal velocity, whose mean gradient then vanishes (4 standard errors), and the
    rectified flow of the pairs is no optimum. At beta = 0.6 the noise still has unit variance."""
    objective = Reflow(anneal=100)
    assert [objective.turns(k, {})[0].fresh for k in (0, 25, 100, 200)] == [1.0, 0.75, 0.0, 0.0]  # type: ignore

    def gradients(student: Any) -> Tensor:
        networks, found = exact_networks(student, FOUR), []
        for key in range(60):
            loss = one_loss(objective, networks, gaussian_batch(256, key, pairs=True), ReflowTurn("s", (), fresh=1.0))
            found.append(torch.autograd.grad(loss, student.off)[0])
        return torch.stack(found)

    errors = [float(g.mean().abs() / (g.std() / 60**0.5)) for g in map(gradients, (marginal(), Straight()))]
    print(errors)
    assert errors[0] < 4 < errors[1]

    student = Recorder(Straight())
    batch = gaussian_batch(4000, pairs=True)
    high = dataclasses.replace(objective, time=TimeSampler(low=0.99999, high=1.0))
    one_loss(high, exact_networks(student, FOUR), batch, ReflowTurn("s", (), fresh=0.6))
    seen = student.calls[0].x_t
    assert float(seen.std()) == pytest.approx(1.0, abs=0.03)
    assert float((seen * batch.pairs[0]).mean()) == pytest.approx(0.8, abs=0.04)  # type: ignore[index]


def marginal() -> GaussianMap:
    return GaussianMap(end=lambda t: t)


def test_distillation_sees_level_one_alone() -> None:
    student = Recorder(Straight())
    one_loss(Reflow(stage="distill"), exact_networks(student, ONE), gaussian_batch(pairs=True))
    assert len(student.calls) == 1 and bool((student.calls[0].t == 1).all())


@pytest.mark.parametrize("first", ["guide", "student"])
def test_a_straight_guide_confirms_its_own_step(first: Any) -> None:
    """Two steps of the straight flow end where one does: no loss at it, and one where the student's step is off."""
    objective = Reflow(stage="distill", guide=FlowGuide(first=first))
    batch, state = gaussian_batch(pairs=True), {"updates": torch.ones((), dtype=torch.int64)}
    found = []
    for off in (0.0, 0.1):
        networks = exact_networks(Straight(off), ONE)
        networks.modules["guide"] = Straight()
        found.append(objective.loss(objective.turns(0, {})[0], networks, batch, state).terms["guided"])  # type: ignore
    assert float(found[0]) < 1e-25 and float(found[1]) > 1e-4


def test_the_guide_takes_two_steps_of_its_own_or_the_second_one() -> None:
    """Against Euler steps written out, for a curved flow, from fresh noise. The guide gets no gradient."""
    batch = gaussian_batch(pairs=True)
    z, m = batch.normal("guided"), 0.2 + 0.6 * batch.uniform("middle")
    flow, student, one = marginal(), Straight(0.1), torch.ones(64, dtype=torch.float64)
    for first, source in (("guide", flow), ("student", student)):
        networks = exact_networks(student, ONE)
        networks.modules["guide"] = flow
        start = source(z, one, batch.cond, predict="flow_prediction").detach()
        x_m = z - (1 - m)[:, None] * start
        end = x_m - m[:, None] * flow(x_m, m, batch.cond, predict="flow_prediction").detach()
        own = student(z, one, batch.cond, predict="flow_prediction")
        wanted = (own - (z - end)).square().mean()
        found = Reflow(stage="distill").guided_loss(networks, batch, FlowGuide(first=first))  # type: ignore[arg-type]
        assert torch.allclose(found, wanted)
        gradients = torch.autograd.grad(found, [student.off, flow.off], allow_unused=True)
        assert gradients[0] is not None and gradients[1] is None


def test_the_guide_is_the_student_as_the_run_began() -> None:
    objective = Reflow(stage="distill", guide=FlowGuide())
    networks, state = tiny_networks(objective, ONE), objective.init_state()
    with torch.no_grad():
        for p in networks.student.parameters():
            p.add_(0.1)
    turn = objective.turns(0, state)[0]
    objective.loss(turn, networks, tiny_batch(), state).total.backward()  # type: ignore[union-attr]
    pairs = list(zip(networks["guide"].parameters(), networks.student.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs) and not any(reached(networks["guide"]).values())
    objective.finish(turn, networks, state)
    with torch.no_grad():
        for _, b in pairs:
            b.add_(0.1)
    objective.loss(turn, networks, tiny_batch(), state)
    assert not any(torch.equal(a, b) for a, b in pairs)


# --- progressive


def test_the_clean_prediction_of_a_step_makes_that_step() -> None:
    batch = gaussian_batch()
    x_t, x_s = batch.normal("a"), batch.normal("b")
    t, s = torch.full((64,), 0.75, dtype=torch.float64), torch.full((64,), 0.5, dtype=torch.float64)
    for schedule in (FlowSchedule(), VPSchedule(torch.linspace(0.99, 0.01, 100))):
        for end in (s, torch.zeros_like(s)):
            x0 = clean_prediction(schedule, x_t, x_s, t, end)
            assert torch.allclose(transition(schedule, x0, x_t, t, end, None), x_s.to(x0), atol=1e-9)


def stage_loss(objective: Progressive, student: Denoiser, previous: Denoiser, turn: StageTurn, key: int = 0) -> Tensor:
    networks = exact_networks(student, FOUR)
    networks.modules["previous"] = previous
    return objective.loss(turn, networks, gaussian_batch(key=key), objective.init_state()).total  # type: ignore


def test_on_a_flow_the_target_is_the_mean_of_two_half_steps() -> None:
    """With weight: velocity, the loss is that of v on (v1 + v2) / 2, of the teacher at first and then of the student
    of the stage before."""
    objective, batch, student = Progressive(weight="velocity"), gaussian_batch(), marginal_off()
    for first, source in ((True, GaussianMap(end=lambda t: t)), (False, Straight())):
        turn = StageTurn("student", ("student",), halvings=1, first=first)
        t, s = objective.levels(FOUR, batch, 1)
        x = student.schedule.add_noise(batch.latents, batch.normal("noise"), t)  # type: ignore[arg-type]
        middle, half = (t + s) / 2, ((t - s) / 2)[:, None]
        v1 = source(x, t, batch.cond, predict="flow_prediction")
        v2 = source(x - half * v1, middle, batch.cond, predict="flow_prediction")
        wanted = (student(x, t, batch.cond, predict="flow_prediction") - (v1 + v2) / 2).square().mean()
        assert torch.allclose(stage_loss(objective, student, Straight(), turn), wanted)


def marginal_off() -> GaussianMap:
    return GaussianMap(0.1, end=lambda t: t)


def test_the_other_weight_is_the_larger_of_the_signal_to_noise_ratio_and_one() -> None:
    objective, batch, student = Progressive(), gaussian_batch(), marginal_off()
    turn = StageTurn("student", ("student",))
    t, s = objective.levels(FOUR, batch, 0)
    x = student.schedule.add_noise(batch.latents, batch.normal("noise"), t)  # type: ignore[arg-type]
    networks = exact_networks(student, FOUR)
    error = student(x, t, batch.cond) - objective.target(turn, networks, batch, x, t, s)
    wanted = (((1 - t) / t).square().clamp_min(1)[:, None] * error.square()).mean()
    assert torch.allclose(stage_loss(objective, student, student, turn), wanted)


def test_each_stage_has_half_the_steps_of_the_one_before() -> None:
    objective = Progressive(stages=3, stage_updates=(2, 3, 1))
    turns = [objective.turns(k, {})[0] for k in range(6)]
    found = [(turn.halvings, turn.first, turn.begins, turn.progress) for turn in turns]  # type: ignore[attr-defined]
    assert found == [
        (2, True, False, (0, 2)),
        (2, True, False, (1, 2)),
        (1, False, True, (0, 3)),
        (1, False, False, (1, 3)),
        (1, False, False, (2, 3)),
        (0, False, True, (0, 1)),
    ]
    policy = RolloutPolicy((1.0, 0.4), "ode")
    levels = {
        (round(float(t), 4), round(float(s), 4))
        for t, s in zip(*objective.levels(policy, gaussian_batch(200), 1), strict=True)
    }
    assert levels == {(1.0, 0.7), (0.7, 0.4), (0.4, 0.2), (0.2, 0.0)}


def test_the_last_student_has_the_samples_of_the_finest_grid() -> None:
    """Perfect students of each stage make the Euler steps of the finest grid: the standard deviation at the end is
    that of 16 Euler steps, and not S (derived: the product of the steps' slopes)."""

    class Halved(Denoiser):
        """The perfect student: the clean prediction of two steps of the network before."""

        def __init__(self, before: Denoiser, length: float):
            super().__init__(nn.Identity(), FlowSchedule(), "sample")
            self.before, self.length = before, length

        def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
            networks = Networks({"student": self, "teacher": self.before, "previous": self.before}, FOUR)
            turn = StageTurn("student", ("student",), first=False)
            return Progressive().target(turn, networks, batch, x_t, t, (t - self.length).clamp_min(0))

    batch = gaussian_batch()
    network: Denoiser = GaussianMap(end=lambda t: t)
    for length in (1 / 8, 1 / 4):
        network = Halved(network, length)
    x = batch.normal("z")
    slope = 1.0
    for i in range(16, 0, -1):
        t, s = torch.tensor(i / 16), torch.tensor((i - 1) / 16)
        slope *= float(((1 - s) * (1 - t) * S**2 + s * t) / spread(t) ** 2)
    wanted = M + slope * x
    for start in FOUR.timesteps:
        level = torch.full((64,), start, dtype=torch.float64)
        x = transition(network.schedule, network(x, level, batch.cond), x, level, level - 0.25, None)
    print(slope)
    assert torch.allclose(x, wanted, atol=1e-6) and slope == pytest.approx(0.456, abs=1e-3)


def test_the_previous_student_is_stored_once_when_its_stage_ends() -> None:
    objective = Progressive(stages=2, stage_updates=1)
    networks, state = tiny_networks(objective, FOUR), objective.init_state()
    first, second = (objective.turns(k, {})[0] for k in (0, 1))
    with torch.no_grad():
        for p in networks.student.parameters():
            p.add_(0.1)

    def same() -> bool:
        pairs = zip(networks["previous"].parameters(), networks.student.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    objective.loss(first, networks, tiny_batch(), state)
    assert not same()
    objective.loss(second, networks, tiny_batch(), state)
    assert same()
    with torch.no_grad():
        for p in networks.student.parameters():
            p.add_(0.1)
    objective.loss(second, networks, tiny_batch(), state)  # the next micro-batch
    assert not same() and int(state["stored"]) == 1
    objective.finish(second, networks, state)
    assert int(state["stored"]) == 0
    loss: Any = objective.loss(first, networks, tiny_batch(), state)
    loss.total.backward()
    assert any(reached(networks.student).values()) and not any(reached(networks["previous"]).values())


def test_guidance_is_the_teachers_in_the_first_stage() -> None:
    networks, batch = exact_networks(Straight(), FOUR), gaussian_batch(uncond=2)
    networks.modules |= {"teacher": mixed_teacher(), "previous": Straight()}
    t, s = Progressive().levels(FOUR, batch, 0)
    x = batch.normal("x")
    for first, differs in ((True, True), (False, False)):
        turn = StageTurn("student", ("student",), first=first)
        plain, guided = (Progressive(guidance_scale=w).target(turn, networks, batch, x, t, s) for w in (1.0, 3.0))
        assert torch.allclose(plain, guided) != differs


# --- refusals


@pytest.mark.parametrize(
    ("make", "policy", "text"),
    [
        (lambda: Reflow(guide=FlowGuide()), ONE, "set stage: distill"),
        (lambda: Reflow(stage="distill", anneal=5), ONE, "for stage: straighten"),
        (lambda: Reflow(stage="distill", time=TimeSampler()), ONE, "leave out time"),
        (lambda: FlowGuide(low=0.8, high=0.2), ONE, "low must be below high"),
        (lambda: Reflow(stage="distill"), FOUR, r"give \[1.0\]"),
        (Reflow, RolloutPolicy((1.0, 0.5)), "use ode"),
        (Reflow, RolloutPolicy((1.0,), "ode", conditioning_time=0.4), "conditioning_time"),
        (Progressive, RolloutPolicy((1.0, 0.5)), "use ode"),
        (Progressive, RolloutPolicy((1.0,), "ode", conditioning_time=0.4), "conditioning_time"),
        (lambda: Progressive(stages=12), FOUR, "too many"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, policy: RolloutPolicy, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make().check(policy)


def test_stages_must_fill_the_run() -> None:
    for line, text in (
        ("train.steps=100", "make them equal"),
        ("objective.stage_updates=[1, 2]", "one for each of the 4 stages"),
    ):
        with pytest.raises(RecipeError, match=text):
            load_recipe(ROOT / "recipes/mixture_progressive_4step.yaml", [line])


def test_a_two_time_student_is_refused() -> None:
    for name in ("reflow", "progressive"):
        with pytest.raises(RecipeError, match="cannot train a student with two_time"):
            load_recipe(ROOT / f"recipes/mixture_{name}_4step.yaml", ["rollout.two_time=true"])
