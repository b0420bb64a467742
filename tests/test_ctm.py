"""The ctm objective on a Gaussian: the exact map, the third map, the solver, the denoising term, and refusals."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    FOUR_JUMPS,
    GAUSSIAN,
    GaussianMap,
    M,
    Recorder,
    S,
    average_velocity,
    exact_networks,
    gaussian_batch,
    guided_pair,
    one_loss,
    reached,
    spread,
    tiny_backbone,
    tiny_networks,
)
from torch import Tensor, nn

from fastgen.batch import Batch, Conditioning
from fastgen.config import load_recipe
from fastgen.denoiser import Inputs
from fastgen.flow.time_pairs import GridPairs
from fastgen.networks import Networks
from fastgen.objectives.ctm import CTM, endpoint, jump
from fastgen.objectives.ladd import Ladd
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule

RECIPE = str(Path(__file__).parents[1] / "recipes/mixture_ctm_4step.yaml")
F64 = torch.float64
EXACT = CTM(grid=GridPairs(count=8), solver_steps=4, target_decay=None, denoising_weight=0.0)


def exactly(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return x - (t - s)[:, None] * average_velocity(x, t, s)


@pytest.fixture
def exact_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher whose steps are exact."""

    def solved(_: CTM, networks: Networks, batch: Batch, x: Tensor, path: list[Tensor]) -> Tensor:
        return exactly(x, path[0], path[-1])

    monkeypatch.setattr(CTM, "solved", solved)


# --- the endpoints


def test_the_exact_map_is_a_fixed_point(exact_solver: None) -> None:
    """No loss and no gradient, on any grid; and an error of the map counts as its square."""
    for objective in (EXACT, dataclasses.replace(EXACT, grid=GridPairs(count=17, spacing="karras"))):
        at = []
        for off in (0.0, 1e-3, 1e-2):
            networks = exact_networks(off)
            loss = one_loss(objective, networks, gaussian_batch(256))
            at.append(float(loss.detach()))
            if not off:
                (grad,) = torch.autograd.grad(loss, networks.student.off)  # type: ignore[arg-type]
                assert float(grad.abs()) < 1e-9
        print(at)
        assert at[0] < 1e-20 and 90 < at[2] / at[1] < 110


def test_the_teachers_map_is_exact_up_to_its_solver() -> None:
    """The residual of the exact map falls with the number of levels, and Heun's is hundreds of times below Euler's."""
    found = {}
    for solver in ("heun", "edm_heun", "euler"):
        for count in (4, 16):
            objective = dataclasses.replace(EXACT, solver=solver, grid=GridPairs(count=count), solver_steps=4)
            found[solver, count] = float(one_loss(objective, exact_networks(0.0), gaussian_batch(512)).detach())
    print(found)
    assert all(found[solver, 16] < found[solver, 4] / 50 for solver in ("heun", "edm_heun", "euler"))
    assert found["heun", 16] < found["euler", 16] / 300 and found["heun", 16] < found["edm_heun", 16]


def test_both_points_are_taken_to_zero_by_the_third_map() -> None:
    """Against the formula: the target network is the outer map of both, and the student the inner one."""
    student, target, batch = GaussianMap(0.1), GaussianMap(-0.2), gaussian_batch(256)
    objective = dataclasses.replace(EXACT, target_decay=0.5)
    networks, state = exact_networks(student), {"updates": torch.ones((), dtype=torch.int64)}
    networks.modules["target"] = target
    path, s = objective.levels(batch)
    x = FlowSchedule().add_noise(batch.latents, batch.normal("noise"), path[0])  # type: ignore[arg-type]
    ends = []
    for point, level in ((x, path[0]), (objective.solved(networks, batch, x, path), path[-1])):
        at_s = jump(student, batch, point, level, s)
        ends.append(jump(target, batch, at_s, s, torch.zeros_like(s)))
    wanted = (ends[0] - ends[1].detach()).square().mean()
    loss = objective.loss(objective.turns(0, state)[-1], networks, batch, state).total  # type: ignore[union-attr]
    assert torch.allclose(loss, wanted)
    found = torch.autograd.grad(loss, [student.off, target.off], allow_unused=True)
    assert torch.allclose(found[0], torch.autograd.grad(wanted, student.off)[0])  # type: ignore[arg-type]
    assert found[1] is None or not float(found[1])


def test_gradient_flows_through_the_outer_map_and_not_to_its_weights() -> None:
    """Without a target network, the outer map is the student itself, as if it were another network; afterwards its
    weights are trainable again."""
    batch, t = gaussian_batch(64), torch.full((64,), 0.9, dtype=F64)
    s, student, twin = 0.9 * t, GaussianMap(0.1), GaussianMap(0.1)
    x = batch.normal("x")
    grads = []
    for outer in (student, twin):
        loss = endpoint(student, outer, batch, x, t, s).square().mean()
        grads.append(torch.autograd.grad(loss, student.off)[0])
    assert torch.allclose(*grads) and float(grads[0].abs()) > 1e-6 and student.off.requires_grad
    exact = GaussianMap()
    through, short = endpoint(student, exact, batch, x, t, s), jump(student, batch, x, t, s)
    slopes = [torch.autograd.grad(points.sum(), student.off)[0] for points in (through, short)]
    assert float(slopes[0] / slopes[1]) == pytest.approx(S / float(spread(s)[0]))  # the outer map is affine


def test_a_jump_over_no_gap_is_the_point_itself() -> None:
    """Also at 0, where a velocity has no value."""
    batch, student = gaussian_batch(8), GaussianMap(0.3)
    x = batch.normal("x")
    for level in (0.0, 0.4, 1.0):
        t = torch.full((8,), level, dtype=F64)
        assert torch.equal(jump(student, batch, x, t, t), x)
    zero = torch.zeros(8, dtype=F64)
    assert torch.allclose(jump(GaussianMap(), batch, x, zero + 1, zero), M + S * x)


# --- levels and solver


def test_levels_are_on_the_grid_and_steps_have_their_weights() -> None:
    """P(h) = h / 10 for h up to 4; t is uniform on the levels from h up, and s on those from 0 to u, both included."""
    grid = EXACT.grid.levels(0)
    counts = torch.zeros(5)
    for key in range(400):
        path, s = EXACT.levels(gaussian_batch(64, key))
        steps = len(path) - 1
        counts[steps] += 1
        places = [torch.searchsorted(grid, level) for level in path]
        assert all(torch.equal(grid[place], level) for place, level in zip(places, path, strict=True))
        assert all(torch.equal(a - 1, b) for a, b in itertools.pairwise(places))
        end = torch.searchsorted(grid, s)
        assert torch.equal(grid[end], s) and bool((end <= places[-1]).all())
        if key < 8 and steps <= 2:
            big, s = EXACT.levels(gaussian_batch(4000, key))
            start, end = torch.searchsorted(grid, big[0]), torch.searchsorted(grid, s)
            share = torch.bincount(start, minlength=9) / 4000
            assert float((share[steps:] - 1 / (9 - steps)).abs().max()) < 0.02 and not share[:steps].any()
            top = end[start == 8]
            share = torch.bincount(top, minlength=9 - steps) / len(top)
            assert float((share - 1 / (9 - steps)).abs().max()) < 0.05
    print(counts / 400)
    assert torch.allclose(counts[1:] / 400, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.06)


def test_the_solver_takes_one_step_of_the_guided_teacher_from_each_level_to_the_next() -> None:
    """Euler steps written out with the exact velocity of the guided law."""
    objective = dataclasses.replace(EXACT, solver="euler", guidance_scale=2.0)
    batch = gaussian_batch(64, uncond=2)
    networks = exact_networks(0.0)
    networks.modules["teacher"] = guided_pair((M, M), (0.0, 0.0), (S, S))  # type: ignore[arg-type]
    path, _ = next(found for key in range(9) if len((found := objective.levels(gaussian_batch(64, key)))[0]) == 4)
    x = batch.normal("x")
    wanted = x
    for t, lower in itertools.pairwise(path):
        wanted = wanted - (t - lower)[:, None] * average_velocity(wanted, t, t, mean=2 * M)
    assert torch.allclose(objective.solved(networks, batch, x, path), wanted)


# --- the denoising term


def test_the_denoiser_is_what_the_denoising_term_teaches() -> None:
    """g(x, t, t) = E[x0 | x_t]: from data the mean gradient vanishes there (4 standard errors), and not for a student
    that jumps to 0 whatever it is told. From the teacher there is no loss at all."""
    objective, errors = dataclasses.replace(EXACT, denoising_weight=1.0), []
    for student in (GaussianMap(), GaussianMap(end=torch.zeros_like)):
        networks, found = exact_networks(student), []
        for key in range(40):
            loss = objective.denoising(networks, gaussian_batch(256, key))
            found.append(torch.autograd.grad(loss, student.off)[0])
        values = torch.stack(found)
        errors.append(float(values.mean().abs() / (values.std() / 40**0.5)))
    print(errors)
    assert errors[0] < 4 < errors[1]
    exact = dataclasses.replace(objective, denoise="teacher")
    assert float(exact.denoising(exact_networks(0.0), gaussian_batch()).detach()) < 1e-20
    assert float(exact.denoising(exact_networks(0.1), gaussian_batch()).detach()) > 1e-4


def test_denoising_has_edms_weight_and_the_authors_law() -> None:
    """(sigma^2 + s^2) / (sigma s)^2 of the clean prediction's square, s = 0.5. Half of the levels are lognormal; the
    other half lie between sigma = 80 and the point at 0.7 of the spacing."""
    objective, batch = EXACT, gaussian_batch(4000)
    student = Recorder(GaussianMap(0.3))
    loss = objective.denoising(exact_networks(student), batch)
    (call,) = student.calls
    assert torch.equal(call.t, call.inputs.s)  # type: ignore[arg-type]
    t, x = call.t, call.x_t
    assert torch.allclose(x, FlowSchedule().add_noise(batch.latents, batch.normal("denoising"), t))  # type: ignore[arg-type]
    u = student.denoiser(x, t, batch.cond, call.inputs, predict="flow_prediction")
    clean = 0.5 * (x - t[:, None] * u - batch.latents)  # in the authors' unit
    sigma = 0.5 * t / (1 - t)
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    assert torch.allclose(loss, (weight[:, None] * clean.square()).mean())

    high = (sigma > 0.5).double().mean()
    low_end = (80 ** (1 / 7) + 0.7 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    print(float(high), low_end)
    below = (sigma < low_end).double().mean()
    cdf = torch.special.ndtr((torch.tensor(low_end).log() + 1.2) / 1.2)
    assert float(below) == pytest.approx(0.5 * float(cdf), abs=0.02)
    median = sigma[sigma > low_end].median()
    assert float(sigma.max()) < 80 and float(median) > 1


def test_terms_have_their_weights() -> None:
    networks, batch = exact_networks(0.1), gaussian_batch()
    parts = [one_loss(dataclasses.replace(EXACT, denoising_weight=w), networks, batch) for w in (0.0, 1.0, 3.0)]
    assert torch.allclose(parts[2] - parts[0], 3 * (parts[1] - parts[0])) and float(parts[1]) > float(parts[0])
    huber = dataclasses.replace(EXACT, distance="huber", huber=0.0)
    assert float(one_loss(huber, networks, batch)) != float(parts[0])


# --- networks


def test_the_discriminator_compares_endpoints_with_data(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = dataclasses.replace(EXACT, gan=Ladd(weight=0.1))
    networks = tiny_networks(objective, FOUR_JUMPS, backbone=tiny_backbone(GAUSSIAN))
    batch, seen = gaussian_batch(64), {}
    kept = Ladd.logits

    def logits(self: Ladd, networks: Networks, batch: Batch, x: Tensor, name: str, *rest: Any, **more: Any) -> Tensor:
        seen[name] = x
        return kept(self, networks, batch, x, name, *rest, **more)

    monkeypatch.setattr(Ladd, "logits", logits)
    for turn in objective.turns(0, {}):
        loss = objective.loss(turn, networks, batch, {})
        loss.total.backward()  # type: ignore[union-attr]
        for role, module in networks.items():
            assert any(reached(module).values()) == (role in turn.roles), role
            module.zero_grad()
    assert torch.equal(seen["gan_real"], batch.latents) and torch.equal(seen["gan"].detach(), seen["gan_fake"])  # type: ignore[arg-type]
    plain = one_loss(EXACT, networks, batch)
    assert float(loss.total) == pytest.approx(float(plain + 0.1 * loss.terms["gan"]))  # type: ignore[union-attr]


def test_the_target_network_follows_the_student_from_where_it_starts() -> None:
    objective = dataclasses.replace(EXACT, target_decay=0.75)
    networks, state = tiny_networks(objective, FOUR_JUMPS, backbone=tiny_backbone(GAUSSIAN)), objective.init_state()
    weight = networks.student.network.inlet.weight  # type: ignore[union-attr]
    target = networks["target"].network.inlet.weight  # type: ignore[union-attr]
    with torch.no_grad():
        weight.add_(1.0)
    (turn,) = objective.turns(0, state)
    objective.loss(turn, networks, gaussian_batch(), state).total.backward()  # type: ignore[union-attr]
    assert torch.equal(target, weight) and not any(reached(networks["target"]).values())
    before = target.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    objective.finish(turn, networks, state)
    assert torch.allclose(target, 0.75 * before + 0.25 * weight)
    objective.loss(turn, networks, gaussian_batch(), state)
    assert not torch.equal(target, weight)


class Dropping(GaussianMap):
    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        kept = nn.functional.dropout(torch.ones_like(x_t), 0.5, self.training)
        return kept * super().call_network(x_t, t, cond, inputs)


def test_both_endpoints_draw_the_same_dropout() -> None:
    """From neighbouring levels they differ by O(1 / n), and by O(1) with other dropout."""
    objective = dataclasses.replace(EXACT, grid=GridPairs(count=1000), solver_steps=1)
    loss = one_loss(objective, exact_networks(Dropping()), gaussian_batch(256))
    print(float(loss.detach()))
    assert float(loss.detach()) < 1e-3


def test_what_cannot_be_is_refused() -> None:
    for text, lines in {
        "set rollout.two_time": ["rollout.two_time=false"],
        "single guidance scale": ["rollout.embedded_guidance=3.0"],
        "more than the 8 intervals": ["objective.solver_steps=9"],
        "set denoise: teacher": ["objective.guidance_scale=2.0"],
        "grid.last and grid.time": ["objective.grid={count: 8, last: 16, updates: 10}"],
        "prompts of other samples.*batch_size is 1": [
            "objective.gan={weight: 0.1, mismatched: true}",
            "train.batch_size=1",
            "optimizers.discriminator={lr: 1.0e-3}",
        ],
        "roles that can be adapters": ["objective.target_decay=0.9", "lora={student: {rank: 4}}"],
    }.items():
        with pytest.raises(RecipeError, match=text):
            load_recipe(RECIPE, lines)
    load_recipe(RECIPE, ["objective.guidance_scale=2.0", "objective.denoise=teacher"])
    load_recipe(RECIPE, ["rollout={timesteps: [1.0], two_time: true}"])
    with pytest.raises(ValueError, match="two_time"):
        CTM().check(RolloutPolicy((1.0, 0.5)))
