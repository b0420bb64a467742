"""Comparisons of consistency: CM, iCT, ECT, LCM and PCM."""

from dataclasses import replace
from typing import Any

import torch
from golden_rows import WIDTH, Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from golden_scm import Pair, TappedDenoiser, gradient, join
from torch import Tensor, nn

from fastgen.flow.time_pairs import GridPairs, ShrinkingPairs
from fastgen.modules.heads import TokenHeads
from fastgen.networks import Networks
from fastgen.objectives.consistency import Consistency, ConsistencyTurn
from fastgen.objectives.ladd import Ladd
from fastgen.objectives.truncation import Truncation
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler, VPSchedule

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
    "cm_levels",
    "consistency",
    "CM's 40 levels as sigmas",
    "our ends are levels 0 and 1, which stand for theirs in weights",
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


@comparison(
    "ect_loss", "consistency", "ECT's loss and its parameter gradient, in stage 3", "latents of std 1 instead of 0.5"
)
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


# --- TCM


@comparison(
    "fastgen_tcm",
    "consistency",
    "TCM's second stage: its loss and parameter gradient at levels of its law, a quarter at the boundary, in stage 3",
    "latents of std 1 instead of 0.5; the boundary is at t' instead of t' + 1e-8",
)
def fastgen_tcm(golden: Golden) -> Pair:
    """The offset makes the samples 0 and 5, and no others, those at the boundary."""
    objective = replace(ECT, truncation=Truncation(begin=1))
    networks, state = networks_of("student", "first"), {"stored": torch.ones((), dtype=torch.int64)}
    boundary = torch.tensor(int(0.05 * (1 << 20)))
    batch = given_batch(golden.tensors | {"boundary": boundary}, golden["cond"], None, golden["latents"])
    turn = ConsistencyTurn("student", ("student",), update=35, truncated=True)
    loss: Any = objective.loss(turn, networks, batch, state)
    return join(gradient(networks, loss.total), loss.total), join(golden["gradient"], golden["loss"])


# --- iCT

ICT = GridPairs(count=10, last=1280, growth="doubling", updates=8000, spacing="karras")


@comparison(
    "ict_loss",
    "consistency",
    "iCT's loss and its parameter gradient, on 40 intervals",
    "elementwise_huber with c = 0.00054 sqrt(D), as in this code (the paper's distance is huber); latents of std 1 "
    "instead of 0.5, so that c is doubled; without the two outer intervals",
)
def ict_loss(golden: Golden) -> Pair:
    c = 2 * 0.00054 * golden["latents"][0].numel() ** 0.5
    objective = Consistency(teach="data", grid=ICT, weight="gap", distance="elementwise_huber", huber=c)
    pair = (golden["index"].double() + 0.5) / 40
    return compared(golden, objective, networks_of("student"), update=2500, pair=pair)


@comparison(
    "ict_schedule",
    "consistency",
    "numbers of levels of iCT and of CT, and CT's decay of the target network, at six updates",
)
def ict_schedule(golden: Golden) -> Pair:
    updates = [int(k) for k in golden["update"]]
    first = GridPairs(count=1, last=150, updates=8000, spacing="karras")
    objective = Consistency(teach="data", grid=first, target_decay=0.9)
    values = [[grid.intervals(k) + 1.0 for k in updates] for grid in (ICT, first)]
    ours = torch.tensor([*values, [objective.decay(k) for k in updates]], dtype=F64)
    return ours, torch.stack([golden[name] for name in ("improved", "first", "decay")])


# --- LCM

LCM = Consistency(grid=GridPairs(count=50), guidance_range=(6, 16), target_decay=0.95, huber=1e-3)


@comparison(
    "lcm_loss",
    "consistency",
    "LCM's two losses and their parameter gradients, guided by a drawn scale, with a target network",
    "the scale is w + 1; LCM's c_skip and c_out are not exactly 0 and 1",
)
def lcm_loss(golden: Golden) -> Pair:
    schedule, pairs = VPSchedule(golden["alphas_cumprod"]), list[Pair]()
    roles = ("student", "target", "teacher")
    for kind, distance in (("huber", "elementwise_huber"), ("l2", "square")):
        modules: dict[str, nn.Module] = {
            role: GoldenDenoiser(GoldenNetwork(i + 1), "epsilon", schedule) for i, role in enumerate(roles)
        }
        objective = replace(LCM, distance=distance)
        theirs = Golden(golden.tensors | {name: golden[f"{kind}_{name}"] for name in ("gradient", "loss")}, "")
        pair = (golden["index"].double() + 0.5) / 50
        pairs.append(compared(theirs, objective, Networks(modules, FOUR), pair=pair))
    return join(*(ours for ours, _ in pairs)), join(*(theirs for _, theirs in pairs))


# --- PCM

PCM = Consistency(
    grid=GridPairs(count=8),
    guidance_scale=4.0,
    distance="elementwise_huber",
    huber=1e-3,
    gan=Ladd(weight=0.1, time=TimeSampler(low=0.0, high=1.0), generator="hinge"),
)


def pcm(golden: Golden, end: str = "") -> tuple[Networks, Any]:
    """Networks and batch of tools/golden/phased_consistency_model.py, in one phase. end: of the tensors' names."""
    given = {name.removesuffix(end): value for name, value in golden.tensors.items() if name.endswith(end)}
    torch.manual_seed(5)
    heads = TokenHeads(WIDTH, 1, hidden=8).double()
    modules: dict[str, nn.Module] = {"student": GoldenDenoiser(GoldenNetwork(1)), "discriminator": heads}
    modules["teacher"] = TappedDenoiser(GoldenNetwork(2)).requires_grad_(False)
    level = given["adversarial_index"].double() / 8
    times = {f"gan{kind}_time": level for kind in ("", "_fake", "_real")}
    given |= times | {"pair": (given["index"].double() + 0.5) / 8, "gan_fake_noise": given["gan_noise"]}
    return Networks(modules, FOUR), given_batch(given, given["cond"], given["uncond"], given["latents"])


@comparison(
    "pcm_loss",
    "consistency",
    "PCM's Huber loss and its parameter gradient, guided, in two phases",
    "the scale is w + 1",
)
def pcm_loss(golden: Golden) -> Pair:
    pair = (golden["index"].double() + 0.5) / 8
    return compared(golden, replace(PCM, phases=(2,), gan=None), networks_of("student", "teacher"), pair=pair)


@comparison(
    "pcm_ratio",
    "consistency",
    "gradient of PCM's adversarial term, times 0.1, over that of its Huber loss, as norms, for samples of 16 and of "
    "128 elements",
    "with distance: elementwise_huber",
)
def pcm_ratio(golden: Golden) -> Pair:
    ours = []
    for end in "01":
        networks, batch = pcm(golden, end)
        turn = ConsistencyTurn("student", ("student",))
        losses: list[Any] = [objective.loss(turn, networks, batch, {}) for objective in (replace(PCM, gan=None), PCM)]
        alone, both = (gradient(networks, loss.total) for loss in losses)
        ours.append((both - alone).norm() / alone.norm())
    return torch.stack(ours), golden["ratio"]


@comparison("pcm_discriminator", "consistency", "gradient of PCM's hinge loss with respect to the heads")
def pcm_discriminator(golden: Golden) -> Pair:
    networks, batch = pcm(golden)
    total = PCM.loss(ConsistencyTurn("discriminator", ("discriminator",)), networks, batch, {}).total
    total.backward()
    heads = torch.cat([p.grad.flatten() for p in networks["discriminator"].parameters()])  # type: ignore[union-attr]
    return join(heads, total), join(golden["gradient"], golden["loss"])
