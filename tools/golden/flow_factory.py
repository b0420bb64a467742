"""Numbers of CRD as in Flow-Factory: its loss with the anchor, its schedules of decays, and its advantages.

python tools/golden/flow_factory.py CHECKOUT

The gradient of an update is that of the statements of `CRDTrainer.optimize` from a batch's level to its loss, taken
from the checkout; `_compute_crd_loss` is its own method. The networks are GoldenNetworks, and the reference's guidance
is that of diffusers, as the method's docstring says."""

import contextlib
from collections.abc import Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pieces import checkout_of, in_float64, method, normals, statements
from torch import Tensor

REPOSITORY, COMMIT = "X-GenGroup/Flow-Factory", "a0b2bc5a2b4fbf9125429b3fb70c0c5d7631047c"
ROOT = checkout_of(REPOSITORY, COMMIT) / "src/flow_factory"
TRAINER = "trainers/crd.py"

from golden_rows import GoldenNetwork, save_golden  # noqa: E402

ROWS, LEVEL = 8, 0.6


def save(name: str, tensors: dict[str, Tensor], function: str) -> None:
    save_golden(name, tensors, REPOSITORY, COMMIT, f"src/flow_factory/{function}")


def function(path: str, name: str, **known: Any) -> Any:
    return method(ROOT / path, name, {"torch": torch, "F": F, "np": np, **known})


def update(name: str, **settings: Any) -> None:
    """The gradient of the student for one prompt's samples at one level."""
    normal = normals(0)
    x0, noise, cond, advantage = normal(ROWS, 4, 2, 3), normal(ROWS, 4, 2, 3), normal(1, 4), 3 * normal(ROWS)
    cond = cond.expand(ROWS, 4)
    student, old, teacher = (GoldenNetwork(seed) for seed in range(3))
    active = [student]
    arguments = {"adv_clip_range": (-5.0, 5.0), "crd_beta": 1.0, "crd_loss_type": "mse", "kl_beta": 0.1, "kl_cfg": 4.5}
    arguments |= {"adaptive_logp": True, "weight_temp": -1.0, "reward_adaptive_kl": True, "use_old_for_loss": True}
    arguments |= settings

    @contextlib.contextmanager
    def reference() -> Iterator[None]:
        active.append(teacher)
        yield
        active.pop()

    def output(batch: Any, t: Tensor, x_t: Tensor, guidance_scale: float | None = None) -> dict[str, Tensor]:
        on = active[-1](x_t, t / 1000, cond)
        if guidance_scale is None:
            return {"noise_pred": on}
        off = active[-1](x_t, t / 1000, torch.zeros_like(cond))
        return {"noise_pred": off + guidance_scale * (on - off)}

    accelerator = SimpleNamespace(gather=lambda value: value, device="cpu")
    adapter = SimpleNamespace(use_ref_parameters=reference)
    self = SimpleNamespace(
        **arguments, adapter=adapter, accelerator=accelerator, training_args=SimpleNamespace(**arguments)
    )
    self._compute_crd_loss = MethodType(function(TRAINER, "CRDTrainer._compute_crd_loss"), self)
    self._compute_crd_output = output
    t = torch.full((ROWS,), 1000 * LEVEL).double()
    with torch.no_grad():
        old_velocity = old((1 - LEVEL) * x0 + LEVEL * noise, t / 1000, cond)
    scope = {
        **{"self": self, "torch": torch, "batch": {"advantage": advantage}, "clean_latents": x0, "t_idx": 0},
        **{"all_timesteps": [t], "all_random_noise": [noise], "old_v_pred_list": [old_velocity]},
        "to_broadcast_tensor": function("utils/base.py", "to_broadcast_tensor"),
        "flow_match_sigma": function("utils/noise_schedule.py", "flow_match_sigma", TIMESTEP_MAX=1000.0),
    }
    exec(statements(ROOT / TRAINER, "t_flat = all_timesteps", "loss_info['policy_loss']"), scope)
    scope["loss"].backward()
    tensors = {"x0": x0, "noise": noise, "cond": cond[:1], "advantage": advantage, "loss": scope["loss"]}
    save(name, {**tensors, "grad": student.flat()}, f"{TRAINER}, CRDTrainer.optimize: the loss of its loop")


def decays() -> None:
    decay = function(TRAINER, "compute_decay", _DECAY_PRESETS={})
    steps = torch.tensor([1, 2, 60, 74, 75, 76, 140, 200, 400])
    lists = {
        key: torch.tensor([decay(int(n), text) for n in steps], dtype=torch.float64)
        for key, text in (("reference", "0-0.25-0.005-0.999"), ("sampler", "75-0.0-0.0075-0.999"))
    }
    save("crd_decays", {"steps": steps, **lists}, f"{TRAINER}, compute_decay")


def advantages() -> None:
    path, owner = "advantage/advantage_processor.py", "AdvantageProcessor"
    normal, group = normals(1), torch.arange(24) // 6
    reward = normal(24) + 5 * normal(4)[group]
    for name, aggregate, whole in (("batch", "compute_weighted_sum", True), ("group", "compute_gdpo", False)):
        self = SimpleNamespace(
            **{"global_std": whole, "group_size": 6, "reward_weights": {"r": 1.0}, "group_on_same_rank": False},
            **{
                "collect_group_rewards": lambda *_: ({"r": reward.numpy()}, group.numpy()),
                "_to_local": torch.as_tensor,
            },
            **{"_build_weighted_sum_log_data": lambda *_: {}, "_build_gdpo_log_data": lambda *_: {}},
        )
        self._global_mean_std = MethodType(function(path, f"{owner}._global_mean_std"), self)
        found = function(path, f"{owner}.{aggregate}")(self, [], {}, False)
        save(
            f"crd_advantages_{name}",
            {"reward": reward, "group": group, "advantage": found},
            f"{path}, {owner}.{aggregate}",
        )


if __name__ == "__main__":
    with in_float64():
        update("crd_update")
        update("crd_update_temperature", weight_temp=0.5)
        update("crd_update_bce", crd_loss_type="bce", adaptive_logp=False, reward_adaptive_kl=False, crd_beta=0.5)
    decays()
    advantages()
