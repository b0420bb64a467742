"""The mean_flow objective: exact maps, its forms and its annealing."""

import dataclasses
from typing import Any

import pytest
import torch
from oracles import (
    FOUR_JUMPS,
    GAUSSIAN,
    GaussianMap,
    Recorder,
    exact_networks,
    gaussian_batch,
    one_loss,
    reached,
    square_growth,
    tiny_backbone,
    tiny_networks,
)
from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.denoiser import NO_INPUTS, Inputs
from fastgen.flow import flow_maps
from fastgen.flow.time_pairs import TimePairs
from fastgen.networks import Networks
from fastgen.objectives import MeanFlow
from fastgen.objectives.mean_flow import AlphaSchedule, MeanFlowTurn
from fastgen.rollout import RolloutPolicy

PAIRS = TimePairs(diagonal=0.25)


@pytest.mark.parametrize("form", ["original", "improved"])
def test_the_exact_map_has_no_loss_from_a_teacher(form: Any) -> None:
    exact, growth = square_growth(MeanFlow(form=form, pairs=PAIRS, power=0.0))
    assert exact < 1e-15 and 90 < growth < 110


@pytest.mark.parametrize("form", ["original", "improved"])
def test_from_data_the_mean_gradient_vanishes_at_the_exact_map(form: Any) -> None:
    """Without the adaptive weight, within 4 standard errors; the loss itself is of order one."""
    objective = MeanFlow(teach="data", form=form, pairs=PAIRS, power=0.0)
    networks, gradients = exact_networks(), []
    del networks.modules["teacher"]
    for key in range(60):
        loss = one_loss(objective, networks, gaussian_batch(key=key))
        gradients.append(float(torch.autograd.grad(loss, networks.student.off)[0]))  # type: ignore[arg-type]
    assert loss > 0.1
    found = torch.tensor(gradients)
    error = float(found.mean().abs() / (found.std() / 60**0.5))
    print(f"{error:.2f} standard errors, gradient {found.mean():.4f}")
    assert error < 4


def test_the_improved_forms_derivative_goes_along_the_students_own_velocity() -> None:
    """v is only a target there: target - v = -(t - s) D u does not depend on it, and in the original form does."""
    networks, batch = exact_networks(0.05), gaussian_batch()
    t, s = MeanFlow(pairs=TimePairs(diagonal=0.0)).pairs(batch)
    x = networks.student.schedule.add_noise(batch.latents, batch.normal("noise"), t)  # type: ignore[arg-type]
    u = flow_maps.average_velocity(networks.student, batch.cond)
    for form, same in (("original", False), ("improved", True)):
        objective, parts = MeanFlow(teach="data", form=form), []  # type: ignore[arg-type]
        for name in ("noise", "other noise"):
            conditional = batch.normal(name) - batch.latents  # type: ignore[operator]
            v, along = objective.velocities(networks, batch, batch.cond, NO_INPUTS, x, t, conditional)
            parts.append(objective.target(u, turn(0.0), x, t, s, v, along) - v)
        assert torch.allclose(*parts) == same


def test_the_diagonal_alone_is_flow_matching() -> None:
    objective = MeanFlow(teach="data", pairs=TimePairs(diagonal=1.0), power=0.0)
    networks, batch = exact_networks(0.1), gaussian_batch()
    found = one_loss(objective, networks, batch)
    t, _ = objective.pairs(batch)
    x = networks.student.schedule.add_noise(batch.latents, batch.normal("noise"), t)  # type: ignore[arg-type]
    v = networks.student(x, t, batch.cond, Inputs(s=t), predict="flow_prediction")
    wanted = (v - (batch.normal("noise") - batch.latents)).square().sum(1).mean()
    assert torch.allclose(found, wanted)


# --- alpha-Flow


def test_the_published_values_of_alpha() -> None:
    alpha = AlphaSchedule(first=600_000, last=1_000_000, snap=0.0)
    found = [alpha(k * 1000) for k in (600, 700, 800, 900)]
    assert found == pytest.approx([0.999996, 0.998073, 0.5, 0.001927], abs=1e-6)
    snapped = AlphaSchedule(first=600_000, last=1_000_000)
    assert snapped(0) == 1.0 and snapped(600_000) == 1.0 and snapped(900_000) == 0.0 and 0 < snapped(850_000) < 1


def turn(alpha: float) -> MeanFlowTurn:
    return MeanFlowTurn("student", ("student",), alpha=alpha)


def test_alpha_goes_from_trajectory_matching_to_meanflow() -> None:
    """At 1 the target is v itself. The gradient of alpha^-1 |u - target|^2 tends to MeanFlow's as alpha falls."""
    objective = MeanFlow(pairs=TimePairs(diagonal=0.0), power=0.0)
    networks, batch = exact_networks(0.1), gaussian_batch()

    def gradient(alpha: float) -> float:
        loss = one_loss(objective, networks, batch, turn(alpha))
        return float(torch.autograd.grad(loss, networks.student.off)[0])  # type: ignore[arg-type]

    mean_flow, found = gradient(0.0), [gradient(alpha) for alpha in (0.1, 0.01, 0.001)]
    print(mean_flow, found)
    off = [abs(value - mean_flow) for value in found]
    assert off[0] > 5 * off[1] > 25 * off[2]

    t, s = objective.pairs(batch)
    x = networks.student.schedule.add_noise(batch.latents, batch.normal("noise"), t)  # type: ignore[arg-type]
    u = flow_maps.average_velocity(networks.student, batch.cond)
    v = flow_maps.guided_velocity(networks.teacher, batch.cond, batch.uncond, 1.0)(x, t)
    wanted = (u(x, t, s) - v).square().sum(1).mean()
    assert torch.allclose(one_loss(objective, networks, batch, turn(1.0)), wanted)


def test_alpha_weighs_the_square_with_the_adaptive_weight_and_divides_it_without() -> None:
    networks, batch = exact_networks(0.1), gaussian_batch()
    plain = MeanFlow(pairs=TimePairs(diagonal=0.0), power=0.0)
    adaptive = dataclasses.replace(plain, power=1.0, floor=1e9)  # |r|^2 / 1e9: the weight alone
    ratio = one_loss(plain, networks, batch, turn(0.25)) / one_loss(adaptive, networks, batch, turn(0.25))
    assert float(ratio) / 1e9 == pytest.approx(1 / 0.25 / 0.25, rel=1e-6)


def test_the_diagonal_keeps_its_weight_and_targets_are_clipped() -> None:
    networks, batch = exact_networks(0.1), gaussian_batch()
    on = MeanFlow(pairs=TimePairs(diagonal=1.0), power=0.0)
    assert torch.equal(one_loss(on, networks, batch, turn(0.25)), one_loss(on, networks, batch, turn(0.0)))
    off = MeanFlow(pairs=TimePairs(diagonal=0.0), clip=0.05)
    unclipped = dataclasses.replace(off, clip=None)
    assert one_loss(off, networks, batch, turn(0.25)) != one_loss(unclipped, networks, batch, turn(0.25))


def test_the_derivative_is_trusted_by_degrees() -> None:
    objective = MeanFlow(warmup=4)
    assert [objective.turns(k, {})[0].trust for k in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]  # type: ignore[attr-defined]
    networks, batch = exact_networks(), gaussian_batch()
    none = MeanFlow(pairs=TimePairs(diagonal=0.0), power=0.0)
    untrusted = MeanFlowTurn("student", ("student",), trust=0.0)
    trajectory = one_loss(none, networks, batch, turn(1.0))
    assert torch.allclose(one_loss(none, networks, batch, untrusted), trajectory)


def test_a_finite_difference_is_as_long_as_it_is_told() -> None:
    """At the exact map the loss is 0 with the derivative, and with a central difference of length h of order h^4."""
    networks, batch = exact_networks(), gaussian_batch()
    plain = MeanFlow(pairs=TimePairs(diagonal=0.0), power=0.0, derivative="difference")
    losses = [
        float(one_loss(dataclasses.replace(plain, difference_step=step), networks, batch, turn(0.0)))
        for step in (0.005, 0.02, 0.1)
    ]
    assert losses[0] < 1e-6 and losses[0] < losses[1] / 30 < losses[2] / 900


# --- guidance


class Labelled(GaussianMap):
    """The exact map's velocity plus the label, which tells conditions apart."""

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        return super().call_network(x_t, t, cond, inputs) + cond["label"][:, None]


def test_self_guidance_mixes_three_velocities_where_it_acts() -> None:
    """v = omega (noise - x0) + kappa u_cond + (1 - omega - kappa) u_uncond inside the interval, plain outside and for
    dropped prompts; here u_cond and u_uncond are told apart by the label."""
    objective = MeanFlow(teach="data", omega=0.2, kappa=0.5, guidance_interval=(0.0, 0.5), drop=0.3)
    batch, networks = gaussian_batch(uncond=1), Networks({"student": Labelled()}, FOUR_JUMPS)
    t, _ = objective.pairs(batch)
    noise = batch.normal("noise")
    x = networks.student.schedule.add_noise(batch.latents, noise, t)  # type: ignore[arg-type]
    conditional = noise - batch.latents
    cond = objective.drop_prompts(batch)
    gone = cond["label"] == 1
    assert 8 < int(gone.sum()) < 32
    v, along = objective.velocities(networks, batch, cond, NO_INPUTS, x, t, conditional)
    own = networks.student(x, t, batch.cond, Inputs(s=t), predict="flow_prediction")
    mixed = 0.2 * conditional + 0.5 * own + 0.3 * (own + 1)
    inside = (t <= 0.5) & ~gone
    assert torch.allclose(v[inside], mixed[inside]) and torch.equal(v[~inside], conditional[~inside])
    assert torch.equal(v, along)


def test_improved_guidance_learns_every_scale_it_is_told() -> None:
    """v = noise - x0 + (1 - 1/w) (u_c - u_0): with the guidance input drawn on [1, 8], density ~ 1 / w."""
    objective = MeanFlow(teach="data", form="improved")
    policy = RolloutPolicy(FOUR_JUMPS.timesteps, "ode", two_time=True, embedded_guidance=3.0)
    objective.check(policy)
    batch = gaussian_batch(2000, uncond=1)
    w = objective.guidance_input(policy, batch).guidance
    assert w is not None
    assert float(w.min()) >= 1 and float(w.max()) <= 8
    assert float((w < 8**0.5).double().mean()) == pytest.approx(0.5, abs=0.03)

    student = Recorder(Labelled())
    networks = Networks({"student": student}, policy)
    t = torch.full((2000,), 0.5, dtype=torch.float64)
    x, conditional = batch.normal("x"), batch.normal("v")
    v, along = objective.velocities(networks, batch, batch.cond, Inputs(guidance=w), x, t, conditional)
    assert all(call.inputs.guidance.shape == call.t.shape for call in student.calls)  # type: ignore[union-attr]
    assert torch.allclose(v - conditional, (1 - 1 / w)[:, None] * -1.0)
    own = student(x, t, batch.cond, Inputs(s=t, guidance=w), predict="flow_prediction")
    assert torch.equal(along, own)


def test_the_student_alone_moves() -> None:
    objective = MeanFlow(pairs=PAIRS)
    networks = tiny_networks(objective, FOUR_JUMPS, backbone=tiny_backbone(GAUSSIAN))
    (only,) = objective.turns(0, {})
    one_loss(objective, networks, gaussian_batch(), only).backward()
    still = {name for name, found in reached(networks.student).items() if not found}
    assert only.roles == ("student",) and still <= {"network.label.weight"}


def test_what_cannot_be_is_refused() -> None:
    for text, options in {
        "omega and kappa": {"omega": 0.5},
        "use omega and kappa": {"teach": "data", "guidance_scale": 3.0},
        "one number above 0": {"teach": "data", "form": "improved", "guidance_scale": 0.0},
        "scale of the student's own": {"teach": "data", "form": "improved", "guidance_scale": (3.0, 2.0)},
        "alpha anneals": {"alpha": AlphaSchedule(first=0, last=5), "form": "improved"},
    }.items():
        with pytest.raises(ValueError, match=text):
            MeanFlow(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two_time"):
        MeanFlow().check(RolloutPolicy((1.0,)))
    with pytest.raises(ValueError, match="embedded_guidance"):
        MeanFlow().check(RolloutPolicy((1.0,), "ode", two_time=True, embedded_guidance=2.0))
