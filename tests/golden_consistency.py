"""Comparisons of consistency: CM, iCT, ECT, LCM and PCM."""

import math
from dataclasses import replace
from typing import Any

import torch
from golden_rows import Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from golden_scm import Pair, gradient, join
from torch import Tensor, nn

from fastgen.flow.time_pairs import GridPairs, ShrinkingPairs
from fastgen.networks import Networks
from fastgen.objectives.consistency import Consistency, ConsistencyTurn
from fastgen.rollout import RolloutPolicy

FOUR = RolloutPolicy((1.0, 0.75, 0.5, 0.25))
F64 = torch.float64


def networks_of(*roles: str) -> Networks:
    """GoldenDenoisers with the seeds 1, 2, ... in this order."""
    modules: dict[str, nn.Module] = {role: GoldenDenoiser(GoldenNetwork(i + 1)) for i, role in enumerate(roles)}
    return Networks(modules, FOUR)


def compared(golden: Golden, objective: Consistency, networks: Networks, update: int = 0, **given: Tensor) -> Pair:
    """The student's gradient and loss, ours and theirs. given: draws that the file does not have."""
    batch = given_batch(golden.tensors | given, golden["cond"], golden.tensors.get("uncond"), golden["latents"])
    state = {"updates": torch.ones((), dtype=torch.int64)}
    turn = ConsistencyTurn("student", ("student",), update=update, phases=objective.phases[0])
    loss: Any = objective.loss(turn, networks, batch, state)
    return join(gradient(networks, loss.total), loss.total), join(golden["gradient"], golden["loss"])


# --- CM

KARRAS = GridPairs(count=39, spacing="karras")
CD = Consistency(grid=KARRAS, solver="edm_heun", target_decay=0.95, distance="square")
SCALE = "latents of std 1 instead of 0.5, so that the square is 4 times theirs; without the two outer intervals"


def of_cm(golden: Golden, objective: Consistency) -> Pair:
    """The intervals' numbers of the authors count from noise, and the square of the error is 4 times theirs."""
    pair = (len(KARRAS.levels(0)) - 1.5 - golden["index"].double()) / 39
    ours, theirs = compared(golden, objective, networks_of("student", "target", "teacher"), pair=pair)
    return ours / 4, theirs


@comparison("cm_training", "consistency", "CT's loss and its parameter gradient, with a target network", SCALE)
def cm_training(golden: Golden) -> Pair:
    return of_cm(golden, replace(CD, teach="data", solver="euler"))


@comparison("cm_distillation", "consistency", "CD's loss and its parameter gradient, with Heun's solver", SCALE)
def cm_distillation(golden: Golden) -> Pair:
    return of_cm(golden, CD)


@comparison(
    "cm_levels", "consistency", "CM's 40 levels as sigmas, without the ends", "our ends are 0 and infinity, by levels 0 and 1"
)
def cm_levels(golden: Golden) -> Pair:
    levels = KARRAS.levels(0)
    sigmas = KARRAS.sigma_data * levels / (1 - levels)
    ends = torch.tensor(KARRAS.end_ratios(0), dtype=F64) * KARRAS.sigma_data
    theirs = golden["sigmas"].flip(0)
    return join(ends[:1], sigmas[1:-1], ends[1:]), theirs


@comparison(
    "cm_schedule",
    "consistency",
    "CT's number of levels and decay of the target network, at seven updates",
    "mu_0^(s_0 / N) has levels as N, as in the paper; the code has N - 1",
)
def cm_schedule(golden: Golden) -> Pair:
    grid = GridPairs(count=1, last=200, updates=800_000, spacing="karras")
    objective = Consistency(teach="data", grid=grid, target_decay=0.95)
    updates = golden["update"].tolist()
    levels = torch.tensor([grid.intervals(k) + 1.0 for k in updates], dtype=F64)
    decay = torch.tensor([objective.decay(k) for k in updates], dtype=F64) ** (levels / (levels - 1))
    return join(levels, decay), join(golden["levels"].double(), golden["ema"])


# --- ECT

ECT = Consistency(teach="data", shrinking=ShrinkingPairs(period=10), weight="gap", huber=0.0)


@comparison("ect_loss", "consistency", "ECT's loss and its parameter gradient, in stage 3", "latents of std 1 instead of 0.5")
def ect_loss(golden: Golden) -> Pair:
    return compared(golden, ECT, networks_of("student"), update=35)


@comparison("ect_levels", "consistency", "ECT's t and r for 25 quantiles and four stages", "ours draws flow levels")
def ect_levels(golden: Golden) -> Pair:
    pairs = ShrinkingPairs(period=1)
    cond = torch.zeros(len(golden["u"]), 4, dtype=F64)
    batch = given_batch({"pair": golden["u"], "x": cond}, cond)
    drawn = [pairs(batch, int(stage)) for stage in golden["stages"]]
    t, s = (pairs.sigma_data * level / (1 - level) for level in (drawn[0][0], torch.stack([s for _, s in drawn])))
    return join(t, s), join(golden["t"], golden["r"])
