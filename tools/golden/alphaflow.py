"""The loss of alpha-Flow and its schedule of alpha, by the authors' code: python tools/golden/alphaflow.py CHECKOUT

CHECKOUT: snap-research/alphaflow at b0fef77d8bf16ac4257080c55542b3f6205a8d82, of which src/training/loss.py is needed.
The methods of AlphaFlowLoss are compiled from that file, because its other imports are not part of the release; the
levels, the noise and GoldenNetwork are given. Their weight adds eps to the mean over a sample's elements."""

import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
from authors import functions, given_draws, normals
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor

COMMIT = "b0fef77d8bf16ac4257080c55542b3f6205a8d82"
ALPHA, CLIP, EPS = 0.4, 1.0, 1e-3
METHODS = ("get_ratio", "_compute_velocity_cfg", "_compute_mean_velocity_c", "_compute_mean_velocity_d", "forward")
KNOWN = {
    "torch": torch, "math": math, "Optional": Optional, "EasyDict": dict, "beartype": lambda function: function,
    "jvp": torch.autograd.functional.jvp, "LossPhase": SimpleNamespace(Gen=None),
    "maybe_augment_videos": lambda x, pipe: (x, None), "misc": SimpleNamespace(filter_nones=lambda losses: losses),
}  # fmt: skip


class Configuration(dict[str, Any]):
    __getattr__ = dict.__getitem__


def main() -> None:
    known = functions(Path(sys.argv[1]) / "src/training/loss.py", METHODS, KNOWN, owner="AlphaFlowLoss")
    normal, count, on_diagonal = normals(8), 8, 4
    x, noise, cond, uncond = normal(count, 4, 3, 3), normal(count, 4, 3, 3), normal(count, 4), normal(1, 4)
    t, r = normal(count), normal(count)
    network = GoldenNetwork()

    def net(x_t: Tensor, sigma_next: Tensor, sigma: Tensor, cond: Tensor | None, **options: Any) -> Any:
        given = uncond.expand(len(x_t), -1) if cond is None else cond
        u = network(x_t[:, 0], sigma, given, sigma_next)[:, None]  # videos of one frame
        return (u, None) if options["return_extra_output"] else u

    def levels(*unused: Any) -> tuple[Tensor, Tensor, Tensor, float]:
        pair = torch.sigmoid(torch.stack([t, r]) - 0.4)
        high, low = pair.amax(0), pair.amin(0)
        low = torch.where(torch.arange(count) < on_diagonal, high, low)
        shape = (count, 1, 1, 1, 1)
        return high.view(shape), low.view(shape), (ALPHA * (high - low)).view(shape), ALPHA

    guidance = SimpleNamespace(omega=0.2, kappa=0.92, t_min=0.0, t_max=0.75)
    weight = {"clamp_utgt": CLIP, "adaptive_loss_weight_eps": EPS}
    cfg = SimpleNamespace(cfg_params=guidance, model=SimpleNamespace(label_dropout=0.0), **weight)
    loss = SimpleNamespace(
        cfg=cfg,
        sample_traj_params=levels,
        _maybe_encode=lambda net, x, cond: x,
        apply_noise=lambda x, scaled, t, net: (1 - t) * x + scaled,
    )
    for name in METHODS[1:4]:
        setattr(loss, name, partial(getattr(known, name), loss))
    with given_draws(torch, randn_like=[noise[:, None]]):
        total = known.forward(loss, net, x[:, None], cond)["total"].mean()
    total.backward()
    tensors = {"x": x, "noise": noise, "t": t, "r": r, "cond": cond, "uncond": uncond, "loss": total}
    source = ("snap-research/alphaflow", COMMIT, "src/training/loss.py, AlphaFlowLoss.forward")
    save_golden("mean_flow_alpha", tensors | {"gradient": network.flat()}, *source)

    schedule = {"scheduler": "sigmoid", "initial_value": 1.0, "end_value": 0, "gamma": 25.0, "clamp_value": 0.005}
    ends = {"change_init_steps": 600_000, "change_end_steps": 1_000_000, "up_clamp_value": None}
    updates = torch.arange(500_000, 1_100_000, 7_000)
    alphas = [known.get_ratio(None, Configuration(**schedule, **ends), int(k)) for k in updates]
    source = ("snap-research/alphaflow", COMMIT, "src/training/loss.py, AlphaFlowLoss.get_ratio")
    save_golden("mean_flow_alphas", {"updates": updates, "alphas": torch.tensor(alphas, dtype=torch.float64)}, *source)


if __name__ == "__main__":
    main()
