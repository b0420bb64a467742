"""Annealing reflow and flow-guided distillation by SlimFlow: python tools/golden/slimflow.py CHECKOUT

CHECKOUT: yuanzhi-zhu/SlimFlow at 96d8b25315bb9f3aef1d1ddcca57af007db36eb9. The methods are compiled from its
file, because the module imports its own networks. Networks and draws are given, and eps is 0. Time is 1 - t there, and
velocities point to the data."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from checkout import checkout_of
from draws import GivenDraws, Random
from golden_rows import GoldenNetwork
from torch import Tensor

CHECKOUT = checkout_of("yuanzhi-zhu/SlimFlow", "96d8b25315bb9f3aef1d1ddcca57af007db36eb9")
METHODS = ("model_forward_wrapper", "get_data_pair", "get_interpolations", "pred_batch_outputs")
GUIDES = ("teacher_loss", "teacher_loss_new")


def reversed_time(network: GoldenNetwork, cond: Tensor) -> Any:
    """The network as theirs is called: with 999 (1 - t), and for minus our velocity."""
    return lambda x, t: -network(x, 1 - t / 999, cond)


def main() -> None:
    normal, uniform, count = Random(41).normal, Random(42).uniform, 4
    x, noise, fresh, cond = normal(count, 4, 3, 3), normal(count, 4, 3, 3), normal(count, 4, 3, 3), normal(count, 4)
    t, middle = uniform(count), uniform(count)
    given = {"x": x, "noise": noise, "fresh": fresh, "cond": cond, "t": t, "middle": middle}
    for name, beta, guide in (
        ("slim_flow_reflow", 0.6, None),
        ("slim_flow_guide", 0.0, "teacher_loss"),
        ("slim_flow_guide_code", 0.0, "teacher_loss_new"),
    ):
        network = GoldenNetwork()
        settings = {
            "data": SimpleNamespace(reflow_data_root="pairs"),
            "flow": SimpleNamespace(h_flip=False, use_teacher=bool(guide)),
            "training": SimpleNamespace(weight_schedule="uniform"),
        }
        own = SimpleNamespace(
            cfg=SimpleNamespace(**settings), T=1.0, eps=0.0, x0_randomness=beta, model=reversed_time(network, cond),
            model_teacher=reversed_time(GoldenNetwork(1), cond), flow_alpha_t="uniform",
            flow_t_schedule="t0" if guide else "uniform",
        )  # fmt: skip
        known: dict[str, Any] = {"torch": torch, "np": np, "nn": torch.nn, "Tensor": Tensor, "optim": torch.optim}
        CHECKOUT.bind(own, "reflow/reflow.py", "RectifiedFlow", METHODS + GUIDES, known)
        CHECKOUT.define("reflow/losses.py", "get_weightings", known)
        own.loss_fn_teach = loss_fn = CHECKOUT.define("reflow/losses.py", "get_rectified_flow_loss_fn", known)()
        normals, uniforms = ([fresh], [1 - middle]) if guide else ([fresh], [1 - t])
        with GivenDraws(normal=normals, uniform=uniforms):
            own.get_data_pair(torch.stack([x, noise], dim=1))  # type: ignore[attr-defined]
            own.get_interpolations(own.data, own.noise)  # type: ignore[attr-defined]
            loss = loss_fn(own, *own.pred_batch_outputs())  # type: ignore[attr-defined]
            if guide:
                loss = loss + getattr(own, guide)()
        tensors = given | {"loss": loss, "gradient": network.gradient(loss)}
        function = f"RectifiedFlow.{guide or 'pred_batch_outputs'}"
        CHECKOUT.save(name, tensors, f"reflow/reflow.py, {function}")


if __name__ == "__main__":
    main()
