"""The ode_regression objective on a Gaussian, whose ODE is known."""

import dataclasses
from typing import Any

import pytest
import torch
from oracles import GAUSSIAN, GaussianMap, M, S, exact_networks, gaussian_batch, one_loss
from torch import Tensor, nn

from fastgen.networks import Networks
from fastgen.objectives import ODERegression
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import expand

POLICY = RolloutPolicy((1.0, 0.75, 0.5, 0.25), "ode")


class Exact(GaussianMap):
    """The clean end of the pair whose state x_t is: on the line between its ends, or on the ODE's path."""

    def __init__(self, states: str, off: float = 0.0):
        super().__init__(off)
        self.states, self.seen = states, list[Tensor]()

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        self.seen.append(t)
        level = expand(t, x_t)
        scale = (1 - level) * S + level if self.states == "line" else ((1 - level) ** 2 * S**2 + level**2).sqrt()
        return M + S * (x_t - (1 - level) * M) / scale + self.off * torch.sin(2 * x_t + level)


@pytest.mark.parametrize(("states", "bound"), [("line", 1e-25), ("path", 1e-4)])
def test_the_exact_prediction_has_no_loss_and_a_perturbed_one_grows_as_its_square(states: Any, bound: float) -> None:
    """On the path there is the Euler error of 64 steps. The other states' prediction has a loss."""
    objective = ODERegression(states=states, path_steps=64)
    networks, batch = exact_networks(policy=POLICY), gaussian_batch(pairs=True)
    losses = []
    for off in (0.0, 0.1, 1.0):
        networks.modules["student"] = Exact(states, off)
        losses.append(float(one_loss(objective, objective.turns(0, {})[0], networks, batch)))
    networks.modules["student"] = Exact("path" if states == "line" else "line")
    other = float(one_loss(objective, objective.turns(0, {})[0], networks, batch))
    print(losses, other)
    assert losses[0] < bound and 90 < losses[2] / losses[1] < 110 and other > 5e-4


def test_every_level_of_the_student_is_trained_and_no_other() -> None:
    networks = exact_networks(policy=POLICY)
    networks.modules["student"] = student = Exact("line")
    objective = ODERegression()
    one_loss(objective, objective.turns(0, {})[0], networks, gaussian_batch(pairs=True))
    assert set(student.seen[0].tolist()) == set(POLICY.timesteps)


def test_the_loss_is_half_the_mean_square_or_huber() -> None:
    networks, batch = exact_networks(policy=POLICY), gaussian_batch(pairs=True)
    networks.modules["student"] = Exact("line", 0.1)
    (turn,) = ODERegression().turns(0, {})
    plain = ODERegression().loss(turn, networks, batch, {})
    assert float(plain.total) == pytest.approx(0.5 * float(plain.terms["error"]) ** 2)
    wide = ODERegression(huber=100.0).loss(turn, networks, batch, {})  # e^2 / (2 c) where e is small
    assert float(wide.total) == pytest.approx(float(plain.total) / 100, rel=1e-4)


def test_the_student_alone_moves_and_learns_the_affine_map() -> None:
    """A linear student on pairs of the Gaussian: m + s noise, after 400 Adam steps."""

    class Linear(GaussianMap):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))

        def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
            return self.scale * x_t + self.shift

    one = RolloutPolicy((1.0,), "ode")
    networks = exact_networks(policy=one)
    networks.modules["student"] = student = Linear()
    objective, optimizer = ODERegression(), torch.optim.Adam(student.parameters(), lr=0.02)
    for key in range(400):
        optimizer.zero_grad()
        one_loss(objective, objective.turns(0, {})[0], networks, gaussian_batch(16, key, pairs=True)).backward()
        optimizer.step()
    print(student.scale.tolist(), student.shift.tolist())
    assert torch.allclose(student.scale, torch.full((2,), S, dtype=torch.float64), atol=1e-3)
    assert torch.allclose(student.shift, torch.full((2,), M, dtype=torch.float64), atol=1e-3)
    assert all(p.grad is None for p in networks.teacher.parameters())


def test_guidance_of_the_path_is_the_teachers() -> None:
    """With an uncond of another mean, the guided path ends elsewhere."""
    from fastgen.backbones.gaussian_mixture import GaussianMixtureConfig

    two = GaussianMixtureConfig(means=((M, M), (-2.0, 0.0)), stds=(S, S), classes=(0, 1), fit_steps=0)
    teacher = two.build(torch.device("cpu"), torch.float64, 0).load("teacher")
    networks = Networks({"student": GaussianMap(), "teacher": teacher}, POLICY)
    batch = gaussian_batch()
    batch = dataclasses.replace(batch, uncond=type(batch.cond)({"label": torch.full_like(batch.ids, 2)}))
    x, t = batch.normal("x"), torch.full((64,), 0.2, dtype=torch.float64)
    ends = [ODERegression(guidance_scale=w).path(networks, batch, x, t) for w in (1.0, 3.0)]
    wanted = 0.8 * M + (0.8**2 * S**2 + 0.2**2) ** 0.5 * x
    assert (ends[0] - wanted).abs().max() < 0.1 and (ends[1] - ends[0]).abs().mean() > 0.1
    assert GAUSSIAN.means == ((M, M),)
