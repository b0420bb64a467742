"""mean_flow beside the authors' code of MeanFlow, iMF, alpha-Flow and FastGen."""

import dataclasses
from typing import Any

import torch
from golden_rows import Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from torch import Tensor

from fastgen.batch import Batch
from fastgen.flow.time_pairs import GOLDEN as STEP
from fastgen.flow.time_pairs import TimePairs
from fastgen.networks import Networks
from fastgen.objectives import MeanFlow
from fastgen.objectives.mean_flow import AlphaSchedule, MeanFlowTurn
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler

POLICY = RolloutPolicy((1.0,), "ode", two_time=True)
PLACE = "the samples with s = t are the first of the batch there, and chosen by sample number here"


def diagonal_first(batch: Any, diagonal: float, to_zero: float = 0.0) -> Batch:
    """The batch with sample numbers for which exactly these shares are on the diagonal and jump to 0.

    The rows on the diagonal come first, then those that jump to 0, then the others."""
    count = len(batch.ids)
    first, last = round(diagonal * count), round(to_zero * count)
    for kind in range(0, 1 << 20, 1 << 12):
        place = (torch.arange(count).double() * STEP + kind / (1 << 20)) % 1
        if int((place < diagonal).sum()) == first and int((place >= 1 - to_zero).sum()) == last:
            order = place.argsort()
            order = torch.cat([order[:first], order[count - last :], order[first : count - last]])
            return dataclasses.replace(batch, ids=order, given=batch.given | {"pair_kind": torch.tensor(kind)})
    raise AssertionError("no such sample numbers")


def pair_batch(golden: Golden, share: float, **draws: Tensor) -> Batch:
    """The draws of a file whose levels come from the normal numbers t and r. draws: more of them, by name."""
    cond, kept = golden["cond"], torch.ones(len(golden["x"]), dtype=torch.float64)
    given = {"noise": golden["noise"], "pair_t": phi(golden["t"]), "pair_s": phi(golden["r"]), "drop": kept} | draws
    batch = given_batch(given, cond, golden["uncond"].expand_as(cond), golden["x"])
    return diagonal_first(batch, share)


def phi(normal: Tensor) -> Tensor:
    """The uniform numbers of normal ones."""
    return torch.special.ndtr(normal)


def gradient(objective: MeanFlow, batch: Batch, turn: Any = None, **modules: Any) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient for the parameters of GoldenNetwork(0)."""
    student = GoldenDenoiser(GoldenNetwork())
    networks = Networks({"student": student, **modules}, POLICY)
    total = objective.loss(turn or objective.turns(0, {})[0], networks, batch, {}).total  # type: ignore[union-attr]
    total.backward()
    return total, student.network.flat()  # type: ignore[operator]


def both(loss: Tensor, grad: Tensor) -> Tensor:
    return torch.cat([loss.detach().reshape(1), grad])


def guided(golden: Golden, **settings: Any) -> tuple[Tensor, Tensor]:
    """The loss and gradient with the paper's law of levels and weight, which are the defaults."""
    batch = pair_batch(golden, 0.75, drop=torch.linspace(0, 1, len(golden["x"]), dtype=torch.float64))
    objective = MeanFlow(teach="data", drop=0.3, **settings)
    return both(*gradient(objective, batch)), both(golden["loss"], golden["gradient"])


@comparison("mean_flow_xl", "mean_flow", "loss and gradient with omega 0.2, kappa 0.92, interval [0, 0.75]", PLACE)
def xl(golden: Golden) -> tuple[Tensor, Tensor]:
    return guided(golden, omega=0.2, kappa=0.92, guidance_interval=(0.0, 0.75))


@comparison("mean_flow_plain", "mean_flow", "loss and gradient with omega 3, kappa 0", PLACE)
def plain(golden: Golden) -> tuple[Tensor, Tensor]:
    return guided(golden, omega=3.0)


@comparison("mean_flow_cifar10", "mean_flow", "loss and gradient with p 0.75, c 1e-3, logits N(-2, 2^2)", PLACE)
def cifar10(golden: Golden) -> tuple[Tensor, Tensor]:
    pairs = TimePairs(TimeSampler("logit_normal", 0.0, 1.0, mean=-2.0, std=2.0), diagonal=0.25)
    objective = MeanFlow(teach="data", pairs=pairs, power=0.75, floor=1e-3)
    return both(*gradient(objective, pair_batch(golden, 0.25))), both(golden["loss"], golden["gradient"])


@comparison("mean_flow_improved", "mean_flow", "gradient of form: improved, guidance scale 4", PLACE)
def improved(golden: Golden) -> tuple[Tensor, Tensor]:
    pairs = TimePairs(TimeSampler("logit_normal", 0.0, 1.0, mean=-0.4, std=1.0), diagonal=0.5)
    batch = pair_batch(golden, 0.5, drop=torch.linspace(0, 1, len(golden["x"]), dtype=torch.float64))
    objective = MeanFlow(teach="data", form="improved", pairs=pairs, guidance_scale=4.0, drop=0.3)
    return gradient(objective, batch)[1], golden["gradient"]


@comparison("mean_flow_scales", "mean_flow", "guidance scales drawn with beta 1 and 2, in float32")
def scales(golden: Golden) -> tuple[Tensor, Tensor]:
    policy, u = RolloutPolicy((1.0,), "ode", two_time=True, embedded_guidance=2.0), golden["u"].double()
    batch = given_batch({"guidance": u}, torch.zeros(len(u), 4), latents=torch.zeros(len(u), 4))
    found = [MeanFlow(scale_power=beta).guidance_input(policy, batch).guidance for beta in (1.0, 2.0)]
    return torch.cat(found), torch.cat([golden["beta1"], golden["beta2"]])  # type: ignore[arg-type]


MEANS = "their eps is added to the mean over a sample's d elements and ours to the sum: floor is d eps"


@comparison(
    "mean_flow_alpha", "mean_flow", "loss and gradient at alpha 0.4, with guidance and a clipped target", MEANS
)
def alpha_flow(golden: Golden) -> tuple[Tensor, Tensor]:
    pairs = TimePairs(TimeSampler("logit_normal", 0.0, 1.0, mean=-0.4, std=1.0), diagonal=0.5)
    guidance: Any = {"omega": 0.2, "kappa": 0.92, "guidance_interval": (0.0, 0.75)}
    elements = golden["x"][0].numel()
    objective = MeanFlow(teach="data", pairs=pairs, clip=1.0, floor=1e-3 * elements, **guidance)
    turn = MeanFlowTurn("student", ("student",), alpha=0.4)
    return both(*gradient(objective, pair_batch(golden, 0.5), turn)), both(golden["loss"], golden["gradient"])


@comparison("mean_flow_alphas", "mean_flow", "alpha-Flow's alpha over the run of XL/2")
def alphas(golden: Golden) -> tuple[Tensor, Tensor]:
    schedule = AlphaSchedule(600_000, 1_000_000)
    found = [schedule(int(k)) for k in golden["updates"]]
    return torch.tensor(found, dtype=torch.float64), golden["alphas"]


def from_teacher(golden: Golden, derivative: Any) -> tuple[Tensor, Tensor]:
    pairs = TimePairs(TimeSampler("logit_normal", 0.0, 1.0, mean=-0.4, std=1.0), diagonal=0.5)
    guidance: Any = {"guidance_scale": 3.0, "guidance_interval": (0.1, 0.6)}
    objective = MeanFlow(pairs=pairs, warmup=2000, derivative=derivative, **guidance)
    batch, teacher = pair_batch(golden, 0.5), GoldenDenoiser(GoldenNetwork(1))
    found = gradient(objective, batch, objective.turns(500, {})[0], teacher=teacher)
    return both(*found), both(golden["loss"], golden["gradient"])


@comparison("mean_flow_teacher", "mean_flow", "loss and gradient from a teacher, guidance 3, warming up", PLACE)
def teacher(golden: Golden) -> tuple[Tensor, Tensor]:
    return from_teacher(golden, "jvp")


@comparison("mean_flow_difference", "mean_flow", "loss and gradient from a teacher, by differences over 5e-3", PLACE)
def difference(golden: Golden) -> tuple[Tensor, Tensor]:
    return from_teacher(golden, "difference")
