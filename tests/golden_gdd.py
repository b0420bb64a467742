"""gdd beside the authors' code: the gradients of its three losses."""

from typing import Any

import torch
from golden_rows import Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from torch import Tensor, nn

from fastgen.networks import Networks
from fastgen.objectives.gdd import GDD
from fastgen.rollout import RolloutPolicy


class Heads(nn.Module):
    """Two heads on the mean over positions of GoldenNetwork's features."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.network = GoldenNetwork().requires_grad_(False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        features = self.network.hidden(x, torch.zeros(len(x), dtype=torch.float64), cond)
        return features.tanh().mean((2, 3)) @ self.weight


class OnSamples(GDD):
    """GDD whose discriminator sees given samples as they are."""

    def generated(self, networks: Networks, batch: Any, grad: bool) -> Tensor:
        return batch.given["fake"]

    def seen(self, networks: Networks, batch: Any, x0: Tensor, name: str) -> Tensor:
        return x0

    def logits_of(self, networks: Networks, batch: Any, seen: Tensor, name: str) -> Tensor:
        return networks["discriminator"](seen, batch.cond["embedding"])


def gradients(golden: Golden, **settings: Any) -> tuple[Tensor, Tensor]:
    """Those of the sample and of the heads, and of the heads by R1 alone, as one vector."""
    fake = golden["fake"].clone().requires_grad_()
    batch = given_batch({"fake": fake}, golden["cond"], latents=golden["x"])
    modules = {"student": GoldenDenoiser(GoldenNetwork()), "discriminator": Heads(golden["head"])}
    networks, objective = Networks(modules, RolloutPolicy((1.0,))), OnSamples(r1_weight=1e-2, **settings)
    (student,) = torch.autograd.grad(objective.student_loss(networks, batch).total, fake)
    weight: Any = modules["discriminator"].weight
    without, both = (
        torch.autograd.grad(objective.discriminator_loss(networks, batch, r1).total, weight)[0] for r1 in (False, True)
    )
    theirs = [golden[name].flatten() for name in ("student", "discriminator", "r1")]
    return torch.cat([part.flatten() for part in (student, without, both - without)]), torch.cat(theirs)


QUANTITY = "gradients of the student's loss in the sample, of the discriminator's and of R1's, 16 times, in the heads"


@comparison("gdd_ns", "gdd", QUANTITY)
def softplus(golden: Golden) -> tuple[Tensor, Tensor]:
    return gradients(golden)


@comparison("gdd_hinge", "gdd", f"{QUANTITY}, with loss_type: hinge")
def hinge(golden: Golden) -> tuple[Tensor, Tensor]:
    return gradients(golden, loss_type="hinge")
