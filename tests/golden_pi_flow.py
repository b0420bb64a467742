"""pi_flow beside the authors' code."""

from typing import Any

import torch
from golden_mean_flow import both
from golden_rows import Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from torch import Tensor

from fastgen.denoiser import NO_INPUTS, Inputs
from fastgen.modules.segment_flow import Line, Mixture
from fastgen.networks import Networks
from fastgen.objectives.pi_flow import PiFlow
from fastgen.policy import SegmentFlow
from fastgen.rollout import RolloutPolicy

EULER = "their flow is 100,000 Euler steps of a unit of time, ours 300 by midpoints in each part of the segment"


def clean(golden: Golden, velocities: Tensor) -> Tensor:
    """[B, N, ...]: the clean predictions of velocities at x and its level."""
    return golden["x"][:, None] - golden["top"].reshape(-1, 1, 1, 1, 1) * velocities


def mixture(golden: Golden, means: Tensor, logits: Tensor, log_std: Tensor) -> Mixture:
    """What they predict of velocities, here of clean samples."""
    top, bottom = golden["top"], golden["top"] - golden["length"]
    width = (log_std + top.log()).reshape(-1, 1, 1, 1, 1)
    return Mixture(top, bottom, golden["x"], clean(golden, means), logits.log_softmax(1), width)


@comparison("pi_flow_line", "pi_flow", "velocity of a line of clean predictions (DXPolicy) at given states")
def line(golden: Golden) -> tuple[Tensor, Tensor]:
    top = golden["top"]
    points = clean(golden, golden["means"]).flip(1)  # theirs begin at the lower end
    segment = Line(top, top - golden["length"], points)
    return segment.velocity(golden["y"], golden["t"]), golden["velocity"]


@comparison("pi_flow_mixture", "pi_flow", "velocity of a mixture (GMFlowPolicy) at given states")
def of_mixture(golden: Golden) -> tuple[Tensor, Tensor]:
    segment = mixture(golden, golden["means"], golden["logits"], golden["log_std"])
    return segment.velocity(golden["y"], golden["t"]), golden["velocity"]


class Predicted(GoldenDenoiser):
    """A student that predicts a given mixture."""

    segment: Mixture

    def forward(self, x_t: Tensor, t: Tensor, cond: Any, inputs: Inputs = NO_INPUTS, **_: Any) -> Tensor:
        assert inputs.segment is not None
        inputs.segment.append(self.segment)
        return x_t


@comparison("pi_flow_segment", "pi_flow", "loss of a segment with three states, and gradient of the mixture", EULER)
def segment(golden: Golden) -> tuple[Tensor, Tensor]:
    leaves = [golden[name].clone().requires_grad_() for name in ("means", "logits", "log_std")]
    student = Predicted(GoldenNetwork())
    student.segment = mixture(golden, *leaves)
    policy = RolloutPolicy((1.0,), "ode", segment=SegmentFlow("mixture", 4, 300))
    networks = Networks({"student": student, "teacher": GoldenDenoiser(GoldenNetwork(1))}, policy)
    given = {name: golden[name] for name in ("student_states", "teacher_states", "components")}
    batch = given_batch(given, torch.zeros(len(golden["x"]), 4, dtype=torch.float64), latents=golden["x"])
    objective = PiFlow(states=3, window=0, teacher_updates=0, dropout=0.3)
    state = {"updates": torch.tensor(0)}
    loss = objective.segment_loss(networks, batch, state, "", golden["x"], golden["top"])[0].mean()
    gradients = torch.autograd.grad(loss, leaves)
    return both(loss, torch.cat([g.flatten() for g in gradients])), both(golden["loss"], golden["gradient"])
