"""ode_regression and teacher_forcing beside the authors' code of FastGen, CausVid and Self-Forcing, and the levels."""

from pathlib import Path
from typing import Any

import torch
from golden_causal import CausalGolden
from golden_mean_flow import both
from golden_rows import Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from torch import Tensor

from fastgen.config import load_recipe
from fastgen.flow.time_pairs import shifted
from fastgen.networks import Networks
from fastgen.objectives import Objective, ODERegression, TeacherForcing
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler
from fastgen.streaming.schedule import ChunkSchedule

RECIPES = Path(__file__).parents[1] / "recipes"
SHIFTED = (1.0, 0.9375, 5 / 6, 0.625)
LINE = "the states are given, on the line between noise and sample"


def found(objective: Objective, student: Any, policy: RolloutPolicy, batch: Any) -> Tensor:
    """The loss and its gradient."""
    networks = Networks({"student": student}, policy)
    loss: Any = objective.loss(objective.turns(0, {})[0], networks, batch, {})
    loss.total.backward()
    return both(loss.total, student.network.flat())


def pairs_batch(golden: Golden, draws: dict[str, Tensor]) -> Any:
    pairs: Any = (golden["noise"], golden["x"])
    return given_batch({"noise": golden["noise"]} | draws, golden["cond"], latents=golden["x"], pairs=pairs)


def regression(golden: Golden, objective: ODERegression, student: Any, policy: RolloutPolicy) -> Tensor:
    stop = (golden["index"].double() + 0.5) / policy.num_steps
    return found(objective, student, policy, pairs_batch(golden, {"stop": stop}))


@comparison("ode_regression_kd", "ode_regression", "loss and gradient of four levels", LINE)
def kd(golden: Golden) -> tuple[Tensor, Tensor]:
    policy, student = RolloutPolicy((1.0, 0.9, 0.75, 0.5), "ode"), GoldenDenoiser(GoldenNetwork())
    return regression(golden, ODERegression(), student, policy), both(golden["loss"], golden["gradient"])


def initialisation(golden: Golden, levels: tuple[float, ...], frames: int) -> tuple[Tensor, Tensor]:
    policy, student = RolloutPolicy(levels, chunks=ChunkSchedule(frames=frames)), CausalGolden(GoldenNetwork())
    ours = regression(golden, ODERegression(past="noisy"), student, policy)
    return 2 * ours, both(golden["loss"], golden["gradient"])


CLEAN = "; theirs has no half: it is twice ours; they store states of the path, and a clean one that has no loss"


@comparison("ode_regression_causvid", "ode_regression", "loss and gradient of chunks with past: noisy", LINE + CLEAN)
def causvid(golden: Golden) -> tuple[Tensor, Tensor]:
    return initialisation(golden, (1.0, 0.757, 0.522), 3)


@comparison(
    "ode_regression_self_forcing", "ode_regression", "loss and gradient of chunks, at shifted levels", LINE + CLEAN
)
def self_forcing(golden: Golden) -> tuple[Tensor, Tensor]:
    return initialisation(golden, SHIFTED, 2)


@comparison(
    "teacher_forcing", "teacher_forcing", "loss and gradient with a clean past", "run without their weight of levels"
)
def teacher_forcing(golden: Golden) -> tuple[Tensor, Tensor]:
    policy, student = RolloutPolicy(SHIFTED, chunks=ChunkSchedule(frames=2)), CausalGolden(GoldenNetwork())
    objective = TeacherForcing(time=TimeSampler(low=0.0, high=1.0), prompt_dropout=0.0)
    levels = torch.tensor(SHIFTED, dtype=torch.float64)[golden["index"]]
    batch = pairs_batch(golden, {"time": levels})
    return found(objective, student, policy, batch), both(golden["loss"], golden["gradient"])


@comparison("shifted_levels", "rollout", "the four levels of shift 5, also those of wan21_1b_self_forcing_4step.yaml")
def levels(golden: Golden) -> tuple[Tensor, Tensor]:
    recipe = load_recipe(RECIPES / "wan21_1b_self_forcing_4step.yaml")
    ours = shifted(torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64), 5.0)
    return torch.stack([ours, ours.new_tensor(recipe.rollout.timesteps)]), golden["levels"].double().expand(2, -1)
