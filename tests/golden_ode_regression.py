"""ode_regression and teacher_forcing beside the authors' code of FastGen, CausVid and Self-Forcing."""

from typing import Any

import torch
from golden_rows import Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from torch import Tensor

from fastgen.networks import Networks
from fastgen.objectives import ODERegression
from fastgen.rollout import RolloutPolicy


def both(loss: Tensor, grad: Tensor) -> Tensor:
    return torch.cat([loss.detach().reshape(1), grad])


@comparison("ode_regression_kd", "ode_regression", "loss and gradient, four levels, given the states that the student sees")
def kd(golden: Golden) -> tuple[Tensor, Tensor]:
    policy = RolloutPolicy((1.0, 0.9, 0.75, 0.5), "ode")
    stop = (golden["index"].double() + 0.5) / policy.num_steps
    batch: Any = given_batch({"noise": golden["noise"], "stop": stop}, golden["cond"], pairs=(golden["noise"], golden["x"]))
    objective, student = ODERegression(), GoldenDenoiser(GoldenNetwork())
    loss = objective.loss(objective.turns(0, {})[0], Networks({"student": student}, policy), batch, {})
    loss.total.backward()  # type: ignore[union-attr]
    return both(loss.total, student.network.flat()), both(golden["loss"], golden["gradient"])  # type: ignore
