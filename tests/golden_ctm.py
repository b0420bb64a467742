"""ctm beside the authors' code."""

from dataclasses import replace
from typing import Any

import torch
from golden_mean_flow import both, phi
from golden_rows import Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from torch import Tensor, nn

from fastgen.flow.time_pairs import GridPairs
from fastgen.networks import Networks
from fastgen.objectives.ctm import CTM
from fastgen.rollout import RolloutPolicy

STEPS = 3  # of the solver, for which 3 = 1 + 2 of the tickets are below its own
UNITS = "latents of std 1 instead of 0.5"


def networks_of() -> Networks:
    roles = {"student": 1, "target": 2, "teacher": 3}
    modules: dict[str, nn.Module] = {role: GoldenDenoiser(GoldenNetwork(seed)) for role, seed in roles.items()}
    return Networks(modules, RolloutPolicy((1.0,), "ode", two_time=True))


@comparison(
    "ctm_endpoints",
    "ctm",
    "CTM's loss and its parameter gradient, with three steps of Heun's solver and a target network",
    f"{UNITS}, so that the square is 4 times theirs; the square instead of LPIPS; jumps end at 0 instead of 0.002",
)
def endpoints(golden: Golden) -> tuple[Tensor, Tensor]:
    """Their indices count from sigma = 80: t = 17 - start, of 3 to 17, and s = 17 - end, of 0 to t - 3."""
    start, end = (17 - golden[name].double() for name in ("start", "end"))
    draws = {"noise": golden["noise"], "solver_steps": torch.tensor(STEPS)}
    draws |= {"pair": (start - STEPS + 0.5) / (17 - STEPS + 1), "end": (end + 0.5) / (start - STEPS + 1)}
    objective = CTM(grid=GridPairs(count=17, spacing="karras"), denoising_weight=0.0)
    return compared(golden, objective, draws, 4.0)


@comparison(
    "ctm_denoising", "ctm", "CTM's denoising loss and its parameter gradient, at levels of both laws", f"{UNITS}"
)
def denoising(golden: Golden) -> tuple[Tensor, Tensor]:
    """The samples with the numbers 0 and 2 have lognormal levels, and 1 and 3 those of the grid's upper part."""
    networks, objective = networks_of(), CTM()
    u = torch.cat([phi(golden["lognormal"]), golden["high"]])
    draws = {"denoising": golden["denoising"], "denoising_time": u, "denoising_kind": torch.tensor(0)}
    batch = replace(given_batch(draws, golden["cond"], latents=golden["latents"]), ids=torch.tensor([0, 2, 1, 3]))
    loss = objective.denoising(networks, batch)
    loss.backward()
    return both(loss, networks.student.network.flat()), both(golden["loss"], golden["gradient"])  # type: ignore[operator]


def compared(golden: Golden, objective: CTM, draws: dict[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """The loss and the student's gradient, divided by `scale`, and theirs."""
    networks, state = networks_of(), {"updates": torch.ones((), dtype=torch.int64)}
    batch = given_batch(draws, golden["cond"], latents=golden["latents"])
    loss: Any = objective.loss(objective.turns(0, state)[-1], networks, batch, state)
    total = loss.total / scale
    total.backward()
    return both(total, networks.student.network.flat()), both(golden["loss"], golden["gradient"])  # type: ignore[operator]
