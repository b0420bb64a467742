"""reflow beside SlimFlow's code."""

from typing import Any

from golden_mean_flow import both
from golden_rows import Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from torch import Tensor, ones

from fastgen.networks import Networks
from fastgen.objectives.reflow import FlowGuide, Reflow, ReflowTurn
from fastgen.rollout import RolloutPolicy

REVERSED = "their time is 1 - t, and their eps of 1e-3 is 0"


def compared(golden: Golden, objective: Reflow, fresh: float) -> tuple[Tensor, Tensor]:
    """The loss and gradient at the pairs of the file; the guide is the teacher of the file."""
    draws = {"fresh": golden["fresh"], "guided": golden["fresh"], "time": golden["t"], "middle": golden["middle"]}
    pairs: Any = (golden["noise"], golden["x"])
    batch = given_batch(draws, golden["cond"], latents=golden["x"], pairs=pairs)
    student, guide = GoldenDenoiser(GoldenNetwork()), GoldenDenoiser(GoldenNetwork(1))
    networks = Networks({"student": student, "guide": guide}, RolloutPolicy((1.0,), "ode"))
    turn = ReflowTurn("student", ("student",), fresh=fresh)
    total = objective.loss(turn, networks, batch, {"updates": ones(())}).total  # type: ignore[union-attr]
    total.backward()
    return both(total, student.network.flat()), both(golden["loss"], golden["gradient"])  # type: ignore[operator]


@comparison("slim_flow_reflow", "reflow", "loss and gradient with 0.6 of fresh noise", REVERSED)
def annealed(golden: Golden) -> tuple[Tensor, Tensor]:
    return compared(golden, Reflow(anneal=10), 0.6)


@comparison("slim_flow_guide", "reflow", "loss and gradient of a distillation with the guide of the paper", REVERSED)
def guided(golden: Golden) -> tuple[Tensor, Tensor]:
    return compared(golden, Reflow(stage="distill", guide=FlowGuide()), 0.0)


@comparison("slim_flow_guide_code", "reflow", "the same with the guide that the code's training uses", REVERSED)
def guided_by_the_students_step(golden: Golden) -> tuple[Tensor, Tensor]:
    return compared(golden, Reflow(stage="distill", guide=FlowGuide(first="student")), 0.0)
