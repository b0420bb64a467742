"""Velocity matching and velocity distillation by MDT-dist: python tools/golden/mdt.py CHECKOUT

CHECKOUT: Zanue/MDT-dist at 10faf36ef0df7846fcff01e0a86d0a4b1f21e1b5. The methods are compiled from the checkout's
file, because the module imports TRELLIS. Networks and draws are given, and sigma_min is 0."""

from typing import Any

import numpy as np
import torch
from checkout import checkout_of
from draws import Float64, GivenDraws, Random
from golden_rows import GoldenNetwork
from torch import Tensor, nn

CHECKOUT = checkout_of("Zanue/MDT-dist", "10faf36ef0df7846fcff01e0a86d0a4b1f21e1b5")
FILE, CLASS = "src/trellis/trainers/flow_matching/flow_matching_mdt.py", "FlowMDTTrainer"
METHODS = ("diffuse", "get_v", "euler_step", "get_cond", "sample_t", "get_v_pred_tgt", "training_losses")
LAW = {"name": "logitNormal", "args": {"mean": 1.0, "std": 1.0}}


class Thousandfold(nn.Module):
    """A network that is given 1000 t."""

    def __init__(self, network: GoldenNetwork):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.network(x, t / 1000, cond)


class Stand:
    """The attributes of the trainer that its losses read, with guidance 2 and 4 in (1 + w) cond - w uncond."""

    def __init__(self, uncond: Tensor, **settings: Any):
        self.training_models = {"denoiser": Thousandfold(GoldenNetwork())}
        self.teacher_model = Thousandfold(GoldenNetwork(1))
        self.get_inference_cond = lambda cond: {"cond": cond, "neg_cond": uncond.expand_as(cond)}
        self.t_schedule, self.sigma_min, self.interval = LAW, 0.0, 0.01
        self.cfg_teacher_vm, self.cfg_teacher_vd = 2.0, 4.0
        vars(self).update(settings)


def main() -> None:
    normal, count = Random(31).normal, 4
    x, noise, initial = normal(count, 4, 3, 3), normal(count, 4, 3, 3), normal(count, 4, 3, 3)
    time, cond, uncond = normal(count), normal(count, 4), normal(1, 4)
    known = {"torch": torch, "np": np, "edict": dict}
    rows: dict[str, dict[str, Any]] = {
        "mdt_matching": {"distill_type": "discrete", "lambda_vm": 1.0, "lambda_vd": 0.0, "d_norm": True},
        "mdt_distillation": {"distill_type": "discrete", "lambda_vm": 1.0, "lambda_vd": 1.0, "d_norm": True},
        "mdt_continuous": {"distill_type": "continuous", "lambda_vm": 1.0, "lambda_vd": 1.0, "d_norm": False},
    }
    for name, settings in rows.items():
        own = Stand(uncond, **settings)
        CHECKOUT.bind(own, FILE, CLASS, METHODS, known)
        draws = [noise, time, initial] if settings["lambda_vd"] else [noise, time]
        with Float64(), GivenDraws(normal=draws):
            loss = own.training_losses(x, cond)[0]["loss"]  # type: ignore[attr-defined]
        gradient = own.training_models["denoiser"].network.gradient(loss)
        given = {"x": x, "noise": noise, "initial": initial, "time": time, "cond": cond, "uncond": uncond}
        tensors = given | {"loss": loss, "gradient": gradient}
        CHECKOUT.save(name, tensors, f"{FILE}, {CLASS}.training_losses")


if __name__ == "__main__":
    main()
