"""The losses of GDD: python tools/golden/gdd.py CHECKOUT

CHECKOUT: Zyriix/GDD at e9267e8afde48af83249bab05c245fb917340dfa. The method is compiled from the checkout's file, as
the module imports CUDA operations. The generator's sample is given, and the heads read GoldenNetwork's features."""

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from checkout import checkout_of
from draws import GivenDraws, Random
from golden_rows import GoldenNetwork
from torch import Tensor, nn

CHECKOUT = checkout_of("Zyriix/GDD", "e9267e8afde48af83249bab05c245fb917340dfa")
STAGES = {"DO_GMAIN": 0, "DO_DMAIN": 1, "DO_DR1": 2}
EVERY = 16


class Heads(nn.Module):
    """Two heads on the mean over positions of GoldenNetwork's features."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, features: Tensor, labels: Any = None) -> list[Tensor]:
        return list((features.tanh().mean((2, 3)) @ self.weight).unbind(1))


def main() -> None:
    normal, count = Random(51).normal, 4
    x, fake, cond, head = normal(count, 4, 3, 3), normal(count, 4, 3, 3), normal(count, 4), normal(16, 2)
    zeros = torch.zeros(count, dtype=torch.float64)
    known: dict[str, Any] = {
        "torch": torch, "F": F, **STAGES, "training_stats": SimpleNamespace(report=lambda *_: None),
        "dist_utils": SimpleNamespace(print0=lambda *_: None),
        "conv2d_gradfix": SimpleNamespace(no_weight_gradients=contextlib.nullcontext),
    }  # fmt: skip
    for kind in ("ns", "hinge"):
        sample, heads, network = fake.clone().requires_grad_(), Heads(head.clone()), GoldenNetwork()
        own = SimpleNamespace(
            g=nn.Identity(), d=heads, freeze_layer=[], show_info=False, teacher_only=False, teacher_type="none",
            loss_type=kind, use_gp=True, r1_gamma=1e-2, run_G=lambda *_, sample=sample, **__: sample,
            feature_net=lambda y, network=network: network.hidden(y, zeros, cond),
        )  # fmt: skip
        CHECKOUT.bind(own, "training/loss.py", "GDDLoss", ("run_D", "accumulate_gradients"), known)
        found = {}
        for stage, gain in (("DO_GMAIN", 1), ("DO_DMAIN", 1), ("DO_DR1", EVERY)):
            heads.weight.grad, sample.grad = None, None
            with GivenDraws(normal=[fake]):
                own.accumulate_gradients(x, None, stage=STAGES[stage], gain=gain)  # type: ignore[attr-defined]
            found[stage] = sample.grad if stage == "DO_GMAIN" else heads.weight.grad
        tensors = {"x": x, "fake": fake, "cond": cond, "head": head, "student": found["DO_GMAIN"]}
        tensors |= {"discriminator": found["DO_DMAIN"], "r1": found["DO_DR1"]}
        CHECKOUT.save(f"gdd_{kind}", tensors, "training/loss.py, GDDLoss.accumulate_gradients")


if __name__ == "__main__":
    main()
