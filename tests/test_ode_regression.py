"""The ode_regression objective on a Gaussian, whose ODE is known."""

from typing import Any

import pytest
import torch
from oracles import (
    AffineStudent,
    GaussianMap,
    M,
    Recorder,
    S,
    exact_networks,
    gaussian_batch,
    mixed_teacher,
    one_loss,
    spread,
)
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.networks import Networks
from fastgen.objectives import ODERegression
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule, expand

POLICY = RolloutPolicy((1.0, 0.75, 0.5, 0.25), "ode")


class CleanEnd(Denoiser):
    """The clean end of the pair whose state x_t is, off by off * sin(2 x + t): on the line between its ends x_t is
    N(alpha M, (alpha S + t)^2), on the ODE's path N(alpha M, spread(t)^2)."""

    def __init__(self, states: str, off: float = 0.0):
        super().__init__(nn.Identity(), FlowSchedule(), "sample")
        self.states, self.off = states, off

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        level = expand(t, x_t)
        scale = (1 - level) * S + level if self.states == "line" else spread(level)
        return M + S * (x_t - (1 - level) * M) / scale + self.off * torch.sin(2 * x_t + level)


@pytest.mark.parametrize(("states", "bound"), [("line", 1e-25), ("path", 1e-4)])
def test_the_exact_prediction_has_no_loss_and_a_perturbed_one_grows_as_its_square(states: Any, bound: float) -> None:
    """On the path there is the Euler error of 64 steps. The other states' prediction has a loss."""
    objective = ODERegression(states=states, path_steps=64)

    def loss(student: Denoiser) -> float:
        return float(one_loss(objective, exact_networks(student, POLICY), gaussian_batch(pairs=True)))

    losses = [loss(CleanEnd(states, off)) for off in (0.0, 0.1, 1.0)]
    other = loss(CleanEnd("path" if states == "line" else "line"))
    print(losses, other)
    assert losses[0] < bound and 90 < losses[2] / losses[1] < 110 and other > 5e-4


def test_every_level_of_the_student_is_trained_and_no_other() -> None:
    student = Recorder(CleanEnd("line"))
    networks = exact_networks(student, POLICY)
    objective = ODERegression()
    one_loss(objective, networks, gaussian_batch(pairs=True))
    assert set(student.calls[0].t.tolist()) == set(POLICY.timesteps)


def test_the_loss_is_half_the_mean_square_or_huber() -> None:
    networks, batch = exact_networks(CleanEnd("line", 0.1), POLICY), gaussian_batch(pairs=True)
    (turn,) = ODERegression().turns(0, {})
    plain = ODERegression().loss(turn, networks, batch, {})
    assert float(plain.total) == pytest.approx(0.5 * float(plain.terms["error"]) ** 2)
    wide = ODERegression(huber=100.0).loss(turn, networks, batch, {})  # e^2 / (2 c) where e is small
    assert float(wide.total) == pytest.approx(float(plain.total) / 100, rel=1e-4)


def test_the_student_alone_moves_and_learns_the_affine_map() -> None:
    """A linear student on pairs of the Gaussian: m + s noise, after 400 Adam steps."""
    student = AffineStudent([[0.0, 0.0]], [[0.0, 0.0]], RolloutPolicy((1.0,), "ode"))
    networks = exact_networks(student, student.policy)
    objective, optimizer = ODERegression(), torch.optim.Adam(student.parameters(), lr=0.02)
    for key in range(400):
        optimizer.zero_grad()
        one_loss(objective, networks, gaussian_batch(16, key, pairs=True)).backward()
        optimizer.step()
    print(student.a.tolist(), student.b.tolist())
    assert torch.allclose(student.a, torch.full_like(student.a, M), atol=1e-3)
    assert torch.allclose(student.b, torch.full_like(student.b, S), atol=1e-3)
    assert all(p.grad is None for p in networks.teacher.parameters())


def test_guidance_of_the_path_is_the_teachers() -> None:
    """With an uncond of another mean, the guided path ends elsewhere."""
    networks = Networks({"student": GaussianMap(), "teacher": mixed_teacher()}, POLICY)
    batch = gaussian_batch(uncond=2)
    x, t = batch.normal("x"), torch.full((64,), 0.2, dtype=torch.float64)
    ends = [ODERegression(guidance_scale=w).path(networks, batch, x, t) for w in (1.0, 3.0)]
    wanted = 0.8 * M + (0.8**2 * S**2 + 0.2**2) ** 0.5 * x
    assert (ends[0] - wanted).abs().max() < 0.1 and (ends[1] - ends[0]).abs().mean() > 0.1
