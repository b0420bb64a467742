"""The mdt objective: the exact map, the direction of velocity distillation, and what it refuses."""

import dataclasses
from typing import Any

import pytest
import torch
from oracles import (
    GAUSSIAN,
    ONE_STEP,
    RENOISE,
    M,
    Recorder,
    S,
    consistency_map,
    consistency_networks,
    exact_networks,
    gaussian_batch,
    mixed_teacher,
    one_loss,
    reached,
    tiny_backbone,
    tiny_networks,
)
from torch import Tensor

from fastgen.objectives.mdt import MDT, average_velocity
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler

EXACT = MDT(derivative="jvp", distillation_weight=0.0, normalise=False)


def test_the_exact_map_has_no_loss_and_a_perturbed_one_grows_as_its_square() -> None:
    """By the derivative. A backward difference of length i is off by O(i), and its loss by O(i^2)."""
    batch = gaussian_batch()
    at = [float(one_loss(EXACT, consistency_networks(off), batch)) for off in (0.0, 1e-3, 1e-2)]
    assert at[0] < 1e-15 and 90 < at[2] / at[1] < 110
    short, long = (MDT(interval=i, distillation_weight=0.0, normalise=False) for i in (0.005, 0.01))
    ratio = one_loss(long, consistency_networks(), batch) / one_loss(short, consistency_networks(), batch)
    assert float(ratio) == pytest.approx(4, rel=0.2)


def test_the_target_moves_by_the_rate_along_the_teacher() -> None:
    """u + t du/dt = v (the identity) for the exact map; with normalise, du/dt is shorter than 1."""
    networks, batch = consistency_networks(), gaussian_batch()
    u = average_velocity(networks, batch)
    t = torch.full((64,), 0.6, dtype=torch.float64)
    x = networks.student.schedule.add_noise(batch.latents, batch.normal("noise"), t)  # type: ignore[arg-type]
    velocity = EXACT.velocity(networks, batch, 1.0)(x, t)
    rate = EXACT.transport_rate(u, x, t, velocity, u(x, t, t))
    assert torch.allclose(u(x, t, t) + 0.6 * rate, velocity)
    short = dataclasses.replace(EXACT, normalise=True).transport_rate(u, x, t, velocity, u(x, t, t))
    size = rate.norm(dim=1, keepdim=True)
    assert torch.allclose(short, rate / (size + 0.1))


def test_velocity_distillation_is_zero_at_the_exact_map() -> None:
    objective = MDT(derivative="jvp", normalise=False)
    networks, batch = consistency_networks(), gaussian_batch()
    t = torch.full((64,), 0.5, dtype=torch.float64)
    loss, gap = objective.distillation(networks, batch, average_velocity(networks, batch), t)
    (grad,) = torch.autograd.grad(loss, networks.student.off)  # type: ignore[arg-type]
    assert float(gap) < 1e-9 and abs(float(grad)) < 1e-9


class Narrow(type(consistency_map())):  # type: ignore[misc]
    """The exact map of data of another standard deviation, one parameter of which is how far a step from t = 1 goes:
    x0 = m + width z there."""

    def __init__(self, std: float):
        super().__init__(std=std, end=torch.zeros_like)
        self.width = torch.nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def call_network(self, x_t: Tensor, t: Tensor, cond: Any, inputs: Any) -> Tensor:
        known = super().call_network(x_t, t, cond, inputs)
        return torch.where((t == 1)[:, None], x_t - (M + self.width * x_t), known)


@pytest.mark.parametrize(("std", "sign"), [(0.3, -1), (0.8, 1)])
def test_velocity_distillation_moves_samples_to_the_teachers_law(std: float, sign: int) -> None:
    """A student that is exact for narrower data is widened, and for wider data narrowed. With delta's sign or the
    teacher and the implied velocity exchanged, it is the reverse."""
    networks, batch = exact_networks(Narrow(std), ONE_STEP), gaussian_batch(512)
    objective, t = MDT(derivative="jvp", normalise=False), torch.full((512,), 0.5, dtype=torch.float64)
    loss, _ = objective.distillation(networks, batch, average_velocity(networks, batch), t)
    (grad,) = torch.autograd.grad(loss, networks.student.width)  # type: ignore[arg-type]
    print(float(grad))
    assert float(grad) * sign > 1e-3


def test_each_loss_has_its_weight_and_its_guidance() -> None:
    networks, batch = consistency_networks(0.1), gaussian_batch(uncond=2)
    networks.modules["teacher"] = mixed_teacher()
    both = MDT(guidance_scale=1.0, distillation_guidance_scale=3.0)
    turn = both.turns(0, {})[0]
    terms = both.loss(turn, networks, batch, {}).terms  # type: ignore[union-attr]
    weighted = dataclasses.replace(both, matching_weight=0.5, distillation_weight=2.0)
    wanted = 0.5 * terms["matching"] + 2 * terms["distillation"]
    assert torch.allclose(one_loss(weighted, networks, batch), wanted)
    plain = MDT(guidance_scale=1.0).loss(turn, networks, batch, {}).terms  # type: ignore[union-attr]
    assert torch.equal(plain["matching"], terms["matching"]) and plain["distillation"] != terms["distillation"]


def test_the_sample_is_made_from_noise_and_renoised_with_other_noise() -> None:
    student = Recorder(consistency_map())
    one_loss(MDT(), exact_networks(student, RENOISE), gaussian_batch())
    batch = gaussian_batch()
    (initial,) = [call for call in student.calls if bool((call.t == 1).all())]
    assert torch.equal(initial.x_t, batch.normal("initial")) and initial.grad
    assert sum(call.grad for call in student.calls) == 2
    assert torch.allclose(
        M + S * initial.x_t, initial.x_t - student(initial.x_t, initial.t, batch.cond, predict="flow_prediction")
    )


def test_the_student_alone_moves() -> None:
    objective = MDT()
    networks = tiny_networks(objective, RENOISE, backbone=tiny_backbone(GAUSSIAN))
    one_loss(objective, networks, gaussian_batch()).backward()
    still = {name for name, found in reached(networks.student).items() if not found}
    assert still <= {"network.label.weight"}
    assert objective.turns(0, {})[0].roles == ("student",)


def test_what_cannot_be_is_refused() -> None:
    for text, options in {
        "both 0": {"matching_weight": 0.0, "distillation_weight": 0.0},
        "raise matching_weight": {"matching_weight": 0.0},
        "raise time.low": {"time": TimeSampler(low=0.0, high=1.0)},
    }.items():
        with pytest.raises(ValueError, match=text):
            MDT(**options)  # type: ignore[arg-type]
    MDT(time=TimeSampler(low=0.0, high=1.0), derivative="jvp")
    with pytest.raises(ValueError, match="use renoise"):
        MDT().check(RolloutPolicy((1.0, 0.5), "ode"))
