"""Checkpoints that are complete or not there: written beside, made durable, then renamed. All tensors are safetensors.

    step_00000200/
        student.safetensors  fake_score.safetensors  ...  ema.safetensors      every role but the frozen teacher
        student.optimizer.safetensors  ...                                     AdamW's moments, by parameter name
        objective.safetensors                                                  what the objective remembers
        counters.json                                                          steps, positions, and every file's size

A divided tensor is gathered, written and dropped, one at a time, and read slice by slice: the files do not depend on
the number of processes that wrote them.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastgen.modules.inputs import carried_names
from fastgen.modules.sharding import local, slices, whole

PREFIX = "step_"
COUNTERS = "counters.json"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says what to do."""


def save(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    state: Mapping[str, Tensor],
    counters: Mapping[str, Any],
    keep: int,
    writer: bool = True,
) -> Path:
    """Writes folder/step_<counters["step"]> and removes all but the newest `keep` complete ones, and never the one of
    step counters["last_good"]. Every process calls it; only the `writer` writes.

    Raises CheckpointError when the disk is full; what was there before is still there."""
    target = folder / f"{PREFIX}{counters['step']:08d}"
    partial = target.with_name(target.name + ".partial")
    files: dict[str, Mapping[str, Tensor]] = {role: module.state_dict() for role, module in modules.items()}
    files |= {f"{role}.optimizer": moments(optimizers[role], modules[role]) for role in optimizers}
    files["objective"] = state
    try:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        for name, tensors in files.items():
            write_tensors(partial / f"{name}.safetensors", tensors, writer)
        if writer:
            sizes = {f.name: f.stat().st_size for f in sorted(partial.iterdir())}
            write_durably(partial / COUNTERS, [json.dumps(dict(counters) | {"files": sizes}).encode()])
            discard(target)
            partial.rename(target)
            sync_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        held = complete(folder)
        kept = f"the last checkpoint, {held[-1].name}, is intact" if held else "there is no earlier checkpoint"
        raise CheckpointError(
            f"cannot write {target}: {error.strerror}; {kept}. Free some space and start the run again to continue"
        ) from None
    if writer:
        good = f"{PREFIX}{counters.get('last_good', -1):08d}"
        for old in complete(folder)[:-keep]:
            if old.name != good:
                discard(old)
    return target


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint, if it is there, so that a kill leaves none that looks complete and is not."""
    if checkpoint.exists():
        going = checkpoint.with_name(checkpoint.name + ".going.partial")
        checkpoint.rename(going)
        shutil.rmtree(going)


def moments(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors, as "<parameter>.<name>"."""
    named: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    return {f"{named[p]}.{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], writer: bool) -> None:
    """A safetensors file, one tensor in memory at a time (https://huggingface.co/docs/safetensors, "Format")."""
    header, offset = dict[str, Any](), 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    chunks = (whole(tensor).detach().cpu().contiguous() for tensor in tensors.values())
    try:
        if writer:
            parts = (chunk.reshape(-1).view(torch.uint8).numpy().data for chunk in chunks)
            write_durably(path, itertools.chain([len(text).to_bytes(8, "little") + text], parts))
    finally:
        for _ in chunks:  # gathering needs every process, also one that does not write or no longer can
            pass


def write_durably(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some network file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.name.startswith(PREFIX) and not f.name.endswith(".partial"))


def counters_of(path: Path) -> dict[str, Any]:
    """What is counted in a checkpoint. Raises CheckpointError if it, or a file of it, is missing or cut short."""
    try:
        counters = json.loads((path / COUNTERS).read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no readable {COUNTERS}") from None
    for name, size in counters["files"].items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(
                f"{path} is damaged: {name} {what}. Remove this checkpoint to continue from an earlier one"
            )
    return counters


@torch.no_grad()
def load(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    state: dict[str, Tensor],
    device: torch.device,
) -> dict[str, Any]:
    """Restores everything `save` wrote, in place; returns the counters. Raises CheckpointError on a missing tensor."""
    counters = counters_of(path)
    for role, module in modules.items():
        read_into(path / f"{role}.safetensors", dict(module.state_dict()))
    for role, optimizer in optimizers.items():
        restore_moments(path / f"{role}.optimizer.safetensors", optimizer, modules[role])
    state.clear()
    with open_tensors(path / "objective.safetensors") as file:
        state.update({name: file.get_tensor(name).to(device) for name in file.keys()})  # noqa: SIM118
    return counters


def read_into(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors from a file that holds exactly their names; a divided one takes its slice."""
    with open_tensors(path) as file:
        if differing := sorted(set(file.keys()) ^ set(tensors)):
            raise CheckpointError(f"{path} does not fit this recipe's network: {', '.join(differing[:4])}")
        for name, tensor in tensors.items():
            local(tensor).copy_(read_slice(file, name, tensor))


def read_student(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills a student's tensors from another's file, which may lack its further inputs: these stay as they are."""
    with open_tensors(path) as file:
        try:
            names = carried_names(tensors, file.keys())
        except ValueError as error:
            raise CheckpointError(f"{path} does not fit this recipe's student: {error}") from None
        for name, stored in names.items():
            local(tensors[name]).copy_(read_slice(file, stored, tensors[name]))


def restore_moments(path: Path, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Sets the optimizer's state; a scalar (`step`) stays on the CPU, as AdamW has it."""
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    with open_tensors(path) as file:
        for full in file.keys():  # noqa: SIM118
            name, _, key = full.rpartition(".")
            if name not in parameters:
                raise CheckpointError(f"{path} has moments of {name}, which this recipe's network does not have")
            p = parameters[name]
            if not file.get_slice(full).get_shape() and p.dim():
                optimizer.state[p][key] = file.get_tensor(full)
            else:
                moment = torch.zeros_like(p)
                local(moment).copy_(read_slice(file, full, p))
                optimizer.state[p][key] = moment


def read_slice(file: Any, name: str, like: Tensor) -> Tensor:
    """This process's part of a stored tensor. Raises CheckpointError if the shapes differ."""
    stored = file.get_slice(name)
    if list(stored.get_shape()) != list(like.shape):
        raise CheckpointError(f"{name} is stored as {stored.get_shape()} and needed as {list(like.shape)}")
    return stored[slices(like)] if like.dim() else file.get_tensor(name)


def open_tensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
