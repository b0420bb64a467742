"""MeanFlow from a teacher, and knowledge distillation, by FastGen: python tools/golden/fastgen_mean_flow.py CHECKOUT

CHECKOUT: NVlabs/FastGen at 34f30e8ff1a563555fc0c7d59f1c1409dacd8af2. Their package has the name of ours, so the
methods of MeanFlowModel and KDModel are compiled from the checkout's files; networks, levels and noise are given."""

import contextlib
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from authors import functions, given_draws, normals
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor

COMMIT = "34f30e8ff1a563555fc0c7d59f1c1409dacd8af2"
METHODS = (
    "_get_velocity", "_jvp", "_estimate_jvp_finite_difference", "_compute_weight", "_mf_pred_to_loss",
    "_compute_mf_loss",
)  # fmt: skip


def expand_like(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


class Net:
    """GoldenNetwork with their arguments. A teacher has no second time."""

    noise_scheduler = SimpleNamespace(
        min_t=0.0,
        max_t=0.999,
        forward_process=lambda x, z, t: (1 - expand_like(t, x)) * x + expand_like(t, x) * z,
        flow_to_x0=lambda x_t, v, t: x_t - expand_like(t, x_t) * v,
    )

    def __init__(self, network: GoldenNetwork):
        self.network = network

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor, fwd_pred_type: str, r: Tensor | None = None) -> Tensor:
        return self.network(x, t, condition, r)


def main() -> None:
    methods = Path(sys.argv[1]) / "fastgen/methods"
    known = {
        "torch": torch, "F": F, "expand_like": expand_like, "temp_disable_efficient_attn": contextlib.nullcontext,
    }  # fmt: skip
    code = functions(methods / "consistency_model/mean_flow.py", METHODS, known, owner="MeanFlowModel")
    normal, count = normals(9), 8
    x, noise, cond, uncond = normal(count, 4, 3, 3), normal(count, 4, 3, 3), normal(count, 4), normal(1, 4)
    t, r = normal(count), normal(count)
    pair = torch.sigmoid(torch.stack([t, r]) - 0.4)
    high, low = pair.amax(0), pair.amin(0)
    low = torch.where(torch.arange(count) < count // 2, high, low)
    tensors = {"x": x, "noise": noise, "t": t, "r": r, "cond": cond, "uncond": uncond}

    for name, difference in (("teacher", False), ("difference", True)):
        student = GoldenNetwork()
        loss_config = SimpleNamespace(
            use_cd=True, loss_type="l2", norm_method="poly_1.0", norm_const=0.01, tangent_warmup_steps=2000,
            use_jvp_finite_diff=difference, jvp_finite_diff_eps=5e-3,
        )  # fmt: skip
        config = SimpleNamespace(guidance_scale=3.0, guidance_t_start=0.1, guidance_t_end=0.6, loss_config=loss_config)
        model = SimpleNamespace(
            net=Net(student), teacher=Net(GoldenNetwork(1)), config=config, loss_config=loss_config,
            precision_amp_jvp=None, device=torch.device("cpu"),
        )  # fmt: skip
        for method in METHODS[:-1]:
            setattr(model, method, partial(getattr(code, method), model))
        with given_draws(torch, randn_like=[noise]):
            found = code._compute_mf_loss(model, x, high, low, 501, cond, uncond.expand(count, -1))
        loss = found[0].mean()
        loss.backward()
        function = "fastgen/methods/consistency_model/mean_flow.py, MeanFlowModel._compute_mf_loss"
        result = {"loss": loss, "gradient": student.flat()}
        save_golden(f"mean_flow_{name}", tensors | result, "NVlabs/FastGen", COMMIT, function)
    distillation(methods, known)


def distillation(methods: Path, known: dict[str, Any]) -> None:
    """Knowledge distillation of images in four steps, from stored states of a path: here those on a line."""
    code = functions(methods / "knowledge_distillation/KD.py", ("single_train_step",), known, owner="KDModel")
    normal, count, levels = normals(10), 8, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64)
    x, noise, cond, index = normal(count, 4, 3, 3), normal(count, 4, 3, 3), normal(count, 4), torch.arange(count) % 4
    path = torch.stack([(1 - t) * x + t * noise for t in levels[:-1]], dim=1)
    student = GoldenNetwork()
    scheduler = SimpleNamespace(sample_from_t_list=lambda *args, **named: (levels[index], index))
    model = SimpleNamespace(
        config=SimpleNamespace(student_sample_steps=4, sample_t_cfg=SimpleNamespace(t_list=levels)),
        net=SimpleNamespace(noise_scheduler=scheduler),
        device=torch.device("cpu"),
        gen_data_from_net=lambda x_t, t, condition: x_t - expand_like(t, x_t) * student(x_t, t, condition),
        _get_outputs=lambda *args, **named: {},
    )
    loss = code.single_train_step(model, {"real": x, "path": path, "condition": cond}, 1)[0]["total_loss"]
    loss.backward()
    tensors = {"x": x, "noise": noise, "cond": cond, "index": index, "loss": loss, "gradient": student.flat()}
    function = "fastgen/methods/knowledge_distillation/KD.py, KDModel.single_train_step"
    save_golden("ode_regression_kd", tensors, "NVlabs/FastGen", COMMIT, function)


if __name__ == "__main__":
    main()
