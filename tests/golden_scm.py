"""Comparisons of scm: SANA-Sprint's sCM with LADD, FastGen's sCM, and rCM."""

import math
from dataclasses import replace
from typing import Any

import torch
from golden_rows import WIDTH, Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.denoiser import Inputs
from fastgen.modules.heads import TokenHeads
from fastgen.networks import Networks
from fastgen.objectives.ladd import Ladd
from fastgen.objectives.rcm import Matching
from fastgen.objectives.scm import SCM, TrustTurn
from fastgen.rollout import RolloutPolicy

FOUR = RolloutPolicy((1.0, 0.75, 0.5, 0.25))
Pair = tuple[Tensor, Tensor]


class Tapped(nn.Module):
    """A GoldenNetwork whose features pass through a module, where `Denoiser.capture` sees them."""

    def __init__(self, network: GoldenNetwork):
        super().__init__()
        self.golden, self.tap = network, nn.Identity()

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.tap(self.golden.hidden(x, t, cond).flatten(2).mT)
        return self.golden(x, t, cond)


class TappedDenoiser(GoldenDenoiser):
    def __init__(self, network: GoldenNetwork):
        super().__init__(Tapped(network))  # type: ignore[arg-type]

    @property
    def feature_modules(self) -> list[nn.Module]:
        return [self.network.tap]  # type: ignore[list-item]

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        return self.network(x_t, t, cond["embedding"])  # type: ignore[no-any-return]


class LinearWeight(nn.Module):
    """A log-weight -(a + b angle) + shift, for the level angle / (pi / 2)."""

    def __init__(self, a: float, b: float, shift: float):
        super().__init__()
        self.a, self.b, self.shift = a, b, shift

    def forward(self, level: Tensor) -> Tensor:
        return self.shift - self.a - self.b * level * math.pi / 2


# --- SANA-Sprint

SPRINT = SCM(
    time={"law": "logit_normal", "low": 0.0, "high": 1.0, "mean": 0.2, "std": 1.6, "sigma_data": 0.5},  # type: ignore[arg-type]
    guidance_scale=4.5,
    gan=Ladd(weight=0.5, mismatched=True),
)
HALF = TrustTurn("student", ("student", "weighting"), trust=0.5)


def sprint(golden: Golden, end: str = "") -> tuple[Networks, Any]:
    """Networks and batch of tools/golden/sana.py. end: of the tensors' names."""
    names = [name for name in golden.tensors if name.endswith(end) and name not in ("gradient", "loss", "ratio")]
    given = {name.removesuffix(end): golden[name] for name in names}
    torch.manual_seed(5)
    heads = TokenHeads(WIDTH, 1, hidden=8).double()
    modules: dict[str, nn.Module] = {"student": GoldenDenoiser(GoldenNetwork(1))}
    modules |= {"teacher": TappedDenoiser(GoldenNetwork(2)).requires_grad_(False), "discriminator": heads}
    modules["weighting"] = LinearWeight(0.3, -0.8, math.log(2))
    batch = given_batch(given, given["cond"], given["uncond"], given["latents"])
    return Networks(modules, FOUR), batch


def sprint_gradients(golden: Golden, objective: SCM = SPRINT, end: str = "") -> dict[str, Tensor]:
    """Of sCM's loss, of the adversarial term, and of their weighted sum, with respect to the student."""
    networks, batch = sprint(golden, end)
    assert objective.gan is not None
    consistency, _ = objective.consistency_loss(networks, objective.noised(networks, batch), HALF.trust)
    adversarial = objective.gan.student_loss(networks, batch, objective.generated(networks, batch))
    total = objective.loss(HALF, networks, batch, {}).total
    losses = {"scm": consistency, "adversarial": adversarial, "total": total}
    return {name: gradient(networks, loss) for name, loss in losses.items()} | {"loss": consistency}


def gradient(networks: Networks, loss: Tensor) -> Tensor:
    network = networks.student.network
    network.zero_grad()
    loss.backward(retain_graph=True)
    return network.flat()  # type: ignore[operator, no-any-return]


@comparison(
    "sana_scm",
    "scm",
    "SANA-Sprint's sCM loss and its parameter gradient, guided, with a learned weight and r = 1/2",
    "latents of std 1 instead of 0.5: c is 0.2 instead of 0.1, and the learned log-weight ln 2 higher, so that the "
    "loss is ln 2 lower",
)
def sana_scm(golden: Golden) -> Pair:
    ours = sprint_gradients(golden)
    return join(ours["scm"], ours["loss"] + math.log(2)), join(golden["gradient"], golden["loss"])


@comparison("sana_adversarial", "scm", "parameter gradients of SANA-Sprint's LADD term, and of its sum with sCM")
def sana_adversarial(golden: Golden) -> Pair:
    ours = sprint_gradients(golden)
    return join(ours["adversarial"], ours["total"]), join(golden["gradient"], golden["total"])


@comparison(
    "sana_ratio",
    "scm",
    "gradient of the LADD term over that of sCM's loss, as norms, for samples of 16 and of 128 elements",
    "with tangent_norm: l2, the default",
)
def sana_ratio(golden: Golden) -> Pair:
    ours = [sprint_gradients(golden, end=str(i)) for i in range(2)]
    return torch.stack([o["adversarial"].norm() / o["scm"].norm() for o in ours]), golden["ratio"]


@comparison(
    "sana_discriminator",
    "scm",
    "gradient of SANA-Sprint's hinge loss with respect to the heads, with mismatched prompts",
    "ours is twice theirs, which halves the sum",
)
def sana_discriminator(golden: Golden) -> Pair:
    networks, batch = sprint(golden)
    # theirs rolls the images under the prompts, ours the prompts over the images: the same pairs, one row on
    rolled = {name: batch.given[name].roll(-1, 0) for name in ("gan_other_noise", "gan_other_time")}
    batch = replace(batch, given=batch.given | rolled)
    total = SPRINT.loss(replace(HALF, name="discriminator"), networks, batch, {}).total
    total.backward()
    heads = torch.cat([p.grad.flatten() for p in networks["discriminator"].parameters()])  # type: ignore[union-attr]
    return join(heads, total) / 2, join(golden["gradient"], golden["loss"])


@comparison(
    "sana_levels",
    "scm",
    "SANA-Sprint's angles of the student and of the discriminator, for 25 quantiles",
    "ours draws the flow level; sigma_data: 0.5 in the law is the unit of their numbers",
)
def sana_levels(golden: Golden) -> Pair:
    assert SPRINT.gan is not None
    levels = torch.stack([law(golden["u"]) for law in (SPRINT.time, SPRINT.gan.time)])
    return torch.atan2(levels, 1 - levels), torch.stack([golden["student"], golden["discriminator"]])


# --- FastGen


@comparison(
    "fastgen_scm",
    "scm",
    "FastGen's sCM loss and its parameter gradient, guided, with a learned weight and r = 1/2",
    "tangent_norm: rms; latents of std 1 instead of 0.5, so that c is 0.2; the learned log-weight is ln 2 - ln D "
    "higher, where theirs divides by 0.5 and by D, and the loss as much lower",
)
def fastgen_scm(golden: Golden) -> Pair:
    shift = math.log(2) - math.log(golden["latents"][0].numel())
    modules: dict[str, nn.Module] = {"student": GoldenDenoiser(GoldenNetwork(1))}
    modules |= {"teacher": GoldenDenoiser(GoldenNetwork(2)), "weighting": LinearWeight(0.3, -0.8, shift)}
    networks = Networks(modules, FOUR)
    batch = given_batch(golden.tensors, golden["cond"], golden["uncond"], golden["latents"])
    objective = SCM(tangent_norm="rms", guidance_scale=3.0)
    loss, _ = objective.consistency_loss(networks, objective.noised(networks, batch), HALF.trust)
    return join(gradient(networks, loss), loss + shift), join(golden["gradient"], golden["loss"])


# --- rCM

RCM = SCM(
    time={"law": "logit_normal", "low": 0.0, "high": 1.0, "mean": 0.7, "std": 1.6},  # type: ignore[arg-type]
    guidance_scale=5.0,
    warmup_form="rcm",
    tangent_norm="l2",
    normaliser=0.1,
    reduction="sum",
    learned_weight=False,
    matching=Matching(guidance_scale=5.0),
    matching_weight=0.01,
)
WARM = TrustTurn("student", ("student",), trust=1.0)


def rcm(golden: Golden, end: str = "") -> tuple[Networks, Any]:
    """Networks and batch of tools/golden/rcm.py, whose simulation has three steps. end: of the tensors' names."""
    given = {name.removesuffix(end): value for name, value in golden.tensors.items() if name.endswith(end)}
    roles = ("student", "teacher", "fake_score")
    modules: dict[str, nn.Module] = {role: GoldenDenoiser(GoldenNetwork(i + 1)) for i, role in enumerate(roles)}
    given["stop"] = torch.tensor(2)
    batch = given_batch(given, given["cond"], given["uncond"], given.get("latents"))
    return Networks(modules, FOUR), batch


@comparison(
    "rcm_tangent",
    "scm",
    "rCM's consistency loss and its parameter gradient, guided, in the middle of its warm-up",
    "times 100, as rCM weighs this term by 100 and the other by 1",
)
def rcm_tangent(golden: Golden) -> Pair:
    networks, batch = rcm(golden)
    loss, _ = RCM.consistency_loss(networks, RCM.noised(networks, batch), HALF.trust)
    return join(gradient(networks, loss), loss) * 100, join(golden["gradient"], golden["loss"])


@comparison(
    "rcm_matching",
    "scm",
    "rCM's distribution matching loss and its parameter gradient, after a simulation at random levels",
    "ours is half a mean over the elements, theirs a sum; scm takes the half out",
)
def rcm_matching(golden: Golden) -> Pair:
    networks, batch = rcm(golden)
    assert RCM.matching is not None
    loss = RCM.matching.student_loss(networks, batch).total * 2 * golden["initial"][0].numel()
    return join(gradient(networks, loss), loss), join(golden["gradient"], golden["loss"])


@comparison(
    "rcm_ratio",
    "scm",
    "gradient of the matching term over that of the consistency loss, as norms, for samples of 16 and of 64 elements",
    "with matching_weight 0.01, tangent_norm: l2 and either reduction",
)
def rcm_ratio(golden: Golden) -> Pair:
    ours = []
    for end, reduction in (("0", "sum"), ("1", "mean")):
        objective = replace(RCM, reduction=reduction)
        networks, batch = rcm(golden, end)
        consistency, _ = objective.consistency_loss(networks, objective.noised(networks, batch), 1.0)
        total = gradient(networks, objective.loss(WARM, networks, batch, {}).total)
        consistency = gradient(networks, consistency)
        ours.append((total - consistency).norm() / consistency.norm())
    return torch.stack(ours), golden["ratio"]


def join(*values: Tensor) -> Tensor:
    return torch.cat([value.flatten() for value in values])
