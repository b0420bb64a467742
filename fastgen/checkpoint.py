"""Checkpoints that are complete or not there: written beside, then renamed. Weights are safetensors."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "step_"


def save(folder: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer],
         state: Mapping[str, Tensor], counters: Mapping[str, int], keep: int) -> Path:  # fmt: skip
    """Writes folder/step_<counters["step"]> and removes all but the newest `keep` complete checkpoints."""
    target = folder / f"{PREFIX}{counters['step']:08d}"
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    for role, module in modules.items():
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, partial / f"{role}.safetensors"
        )
    torch.save({role: o.state_dict() for role, o in optimizers.items()}, partial / "optimizers.pt")
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, partial / "objective.safetensors")
    (partial / "counters.json").write_text(json.dumps(dict(counters)))
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.name.startswith(PREFIX) and not f.name.endswith(".partial"))


def load(path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer],
         state: dict[str, Tensor], device: torch.device) -> dict[str, Any]:  # fmt: skip
    """Restores everything `save` wrote, in place; returns the counters. Raises on any missing tensor."""
    for role, module in modules.items():
        module.load_state_dict(load_file(path / f"{role}.safetensors", device=str(device)))
    saved = torch.load(path / "optimizers.pt", map_location=device, weights_only=True)
    for role, optimizer in optimizers.items():
        optimizer.load_state_dict(saved[role])
    state.clear()
    state.update(load_file(path / "objective.safetensors", device=str(device)))
    return json.loads((path / "counters.json").read_text())
