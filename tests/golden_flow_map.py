"""flow_map beside the authors' code of flow map self-distillation and AnyFlow."""

import dataclasses
from typing import Any

import torch
from golden_mean_flow import both, diagonal_first
from golden_mean_flow import gradient as mean_flow_gradient
from golden_rows import Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.flow.time_pairs import TimePairs
from fastgen.networks import Networks
from fastgen.objectives import FlowMap, MeanFlow
from fastgen.objectives.flow_map import OnPolicy
from fastgen.rollout import RolloutPolicy, sample
from fastgen.schedule import TimeSampler

POLICY = RolloutPolicy((1.0,), "ode", two_time=True)
CLOCK = "time runs from noise to data there, and the average velocity is -u; their learned weight is 1"


def gradient(objective: FlowMap, batch: Any, policy: RolloutPolicy = POLICY, **modules: Any) -> tuple[Tensor, Tensor]:
    """The loss of the student's turn, and its gradient for the parameters of GoldenNetwork(0)."""
    student = GoldenDenoiser(GoldenNetwork())
    networks = Networks({"student": student, **modules}, policy)
    total = objective.loss(objective.turns(0, {})[-1], networks, batch, {}).total  # type: ignore[union-attr]
    total.backward()
    return total, student.network.flat()  # type: ignore[operator]


def self_distilled(golden: Golden, **settings: Any) -> tuple[Tensor, Tensor]:
    """The loss and gradient from data alone, with the default law of levels."""
    given = {"noise": golden["noise"], "pair_t": golden["first"], "pair_s": golden["second"]}
    given["middle"] = golden["middle"]
    batch = given_batch(given, torch.zeros(len(golden["x"]), 4, dtype=torch.float64), latents=golden["x"])
    found = gradient(FlowMap(teach="self", **settings), diagonal_first(batch, 0.75))
    return both(*found), both(golden["loss"], golden["gradient"])


@comparison("flow_map_lsd", "flow_map", "loss and gradient of form: lagrangian from data, and its levels", CLOCK)
def lsd(golden: Golden) -> tuple[Tensor, Tensor]:
    return self_distilled(golden, form="lagrangian")


@comparison(
    "flow_map_esd", "flow_map", "loss and gradient of form: eulerian from data, their convex stop-gradient", CLOCK
)
def esd(golden: Golden) -> tuple[Tensor, Tensor]:
    return self_distilled(golden, form="eulerian")


@comparison("flow_map_psd", "flow_map", "loss and gradient of form: progressive from data", CLOCK)
def psd(golden: Golden) -> tuple[Tensor, Tensor]:
    return self_distilled(golden, form="progressive")


@comparison("flow_map_psd_half", "flow_map", "loss and gradient of form: progressive, middle: half", CLOCK)
def psd_half(golden: Golden) -> tuple[Tensor, Tensor]:
    return self_distilled(golden, form="progressive", middle="half")


# --- AnyFlow. Latents are [B, 4, F, H, W] here and there, frames first inside of their networks.

GRID = RolloutPolicy((1.0, 5 / 6), "ode", two_time=True)  # two steps of a grid with shift 5
UNIFORM = TimeSampler(low=0.0, high=1.0, shift=5.0)
UNITS = (
    "their losses are means over elements and ours sums: theirs times their number d; "
    "their weight 1 is 2 (no half), their guidance 3 is 4 (added to cond)"
)


def any_flow_batch(golden: Golden, **draws: Tensor) -> Any:
    cond = golden["cond"]
    latents = golden.tensors.get("x", golden.tensors.get("initial"))
    return given_batch(draws, cond, golden.tensors.get("uncond", cond[:1]).expand_as(cond), latents)


@comparison("any_flow_step", "flow_map", "gradient of both terms of an on-policy update", UNITS)
def any_flow_step(golden: Golden) -> tuple[Tensor, Tensor]:
    pairs = TimePairs(UNIFORM, diagonal=1.0)
    given = {name: golden[name] for name in ("noise", "initial", "renoise", "renoise_time")}
    given |= {"pair_t": golden["first"], "pair_s": golden["second"], "pair_kind": torch.tensor(0)}
    on_policy = OnPolicy()
    given |= {"grid": torch.tensor(on_policy.steps.index(4)), "jump": torch.tensor(1)}
    objective = FlowMap(teach="self", pairs=pairs, on_policy=on_policy)
    modules = {"teacher": GoldenDenoiser(GoldenNetwork(1)), "fake_score": GoldenDenoiser(GoldenNetwork(2))}
    grad = gradient(objective, any_flow_batch(golden, **given), GRID, **modules)[1]
    return grad / golden["x"][0].numel(), golden["gradient"]


@comparison("any_flow_fake", "flow_map", "loss and gradient of the fake score")
def any_flow_fake(golden: Golden) -> tuple[Tensor, Tensor]:
    on_policy, fake = OnPolicy(), GoldenDenoiser(GoldenNetwork(2))
    given = {name: golden[name] for name in ("initial", "fake_noise", "fake_time")}
    given |= {"grid": torch.tensor(on_policy.steps.index(4)), "jump": torch.tensor(1)}
    networks = Networks({r: GoldenDenoiser(GoldenNetwork(i)) for i, r in enumerate(("student", "teacher"))}, GRID)
    networks.modules["fake_score"] = fake
    total = FlowMap().fake_loss(networks, any_flow_batch(golden, **given), on_policy).total
    total.backward()
    return both(total, fake.network.flat()), both(golden["loss"], golden["gradient"])


ORDER = "the samples are in another order"
WEIGHT = (
    "a jump's weight there is the diagonal's mean loss / (its own + 1e-5), which is power 1 times that mean; "
    "their losses are means over elements and ours sums"
)


@comparison("any_flow_pairs", "flow_map", "levels: half on the diagonal, a quarter to 0, shift 5", ORDER)
def any_flow_pairs(golden: Golden) -> tuple[Tensor, Tensor]:
    cond = torch.zeros(len(golden["first"]), 4, dtype=torch.float64)
    batch = given_batch({"pair_t": golden["first"], "pair_s": golden["second"]}, cond, latents=cond)
    pairs = TimePairs(UNIFORM, diagonal=0.5, to_zero=0.25)
    return torch.cat(pairs(diagonal_first(batch, 0.5, 0.25))), torch.cat([golden["t"], golden["r"]])


@comparison("any_flow_map", "mean_flow", "gradient of AnyFlow's first stage, by differences over 5e-3", WEIGHT)
def any_flow_map(golden: Golden) -> tuple[Tensor, Tensor]:
    given = {"noise": golden["noise"], "pair_t": golden["first"], "pair_s": golden["second"]}
    given["drop"] = torch.ones_like(golden["first"])
    batch: Any = diagonal_first(any_flow_batch(golden, **given), 0.5, 0.25)
    count, elements = len(batch.ids), golden["x"][0].numel()
    pairs = TimePairs(UNIFORM, diagonal=0.5, to_zero=0.25)
    found, on_diagonal = torch.zeros_like(golden["gradient"]), 0.0
    for part, power in ((slice(0, count // 2), 0.0), (slice(count // 2, count), 1.0)):
        objective = MeanFlow(teach="data", pairs=pairs, derivative="difference", power=power, floor=1e-5 * elements)
        loss, grad = mean_flow_gradient(objective, rows(batch, part))
        if power == 0:
            on_diagonal, grad = float(loss.detach()) / elements, grad / elements
        else:
            grad = grad * on_diagonal
        found = found + grad / 2
    return found, golden["gradient"]


def rows(batch: Any, part: slice) -> Any:
    """Some rows of a batch and of its draws."""
    given = {name: value if value.dim() == 0 else value[part] for name, value in batch.given.items()}
    cond, uncond = batch.cond.select(part), batch.uncond.select(part)
    fields = {"cond": cond, "uncond": uncond, "latents": batch.latents[part], "given": given}
    return dataclasses.replace(batch, ids=batch.ids[part], **fields)


@comparison("any_flow_sampler", "rollout", "samples of eight steps on a grid with shift 5")
def any_flow_sampler(golden: Golden) -> tuple[Tensor, Tensor]:
    policy, student = GRID.with_steps(8), GoldenDenoiser(GoldenNetwork())
    with torch.no_grad():
        found = sample(student, policy, Conditioning({"embedding": golden["cond"]}), lambda name: golden[name])
    return found, golden["video"]
