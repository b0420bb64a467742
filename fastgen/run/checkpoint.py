"""Checkpoints that are either complete or absent: what a folder holds, and how it is read. `saving` writes them, under
another name that is changed at last. All tensors are stored as safetensors.

    step_00000200/
        student.safetensors  fake_score.safetensors  ...  ema.safetensors      every role except the frozen teacher
        student.optimizer.safetensors  ...                                     AdamW's moments, by parameter name
        objective.safetensors                                                  the objective's state
        counters.json                                                          step, data position, files' hashes

Of sharded networks every process writes its parts: student.00001-of-00008.safetensors holds those of the first of
eight. They are read back slice by slice, by any number of processes; so are checkpoints of earlier versions, whose
files are all whole.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastgen.data.files import is_sealed
from fastgen.modules.inputs import carried_names
from fastgen.modules.sharding import local, slices
from fastgen.modules.stored import Stored
from fastgen.modules.tensor_file import DTYPES

PREFIX = "step_"
NAME = re.compile(r"step_\d{8,}")
GOING = ".going.partial"  # ends the name of a checkpoint that is being removed
COUNTERS = "counters.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message says what to do."""


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint if it exists. It is renamed first, so that a kill in between leaves nothing that looks like
    a complete checkpoint but is not. What cannot be removed, such as a file that is open on NFS, is left there, and
    ends nothing."""
    for left in checkpoint.parent.glob(f"{checkpoint.name}*{GOING}"):  # by an earlier kill
        shutil.rmtree(left, ignore_errors=True)
    if checkpoint.exists():
        going = checkpoint.with_name(f"{checkpoint.name}.{uuid4().hex[:8]}{GOING}")
        checkpoint.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first. These are the folders named step_<number> and nothing else:
    a step_00000030_backup beside them is neither continued from nor removed."""
    if not folder.is_dir():
        return []
    found = [f for f in folder.iterdir() if NAME.fullmatch(f.name) and f.is_dir()]
    return sorted(found, key=lambda f: int(f.name.removeprefix(PREFIX)))


def counters_of(path: Path) -> dict[str, Any]:
    """The counters of a checkpoint. Raises CheckpointError if any of its files is missing or truncated, or if the
    counters are not those that were written. Those of version 0.1 have no hash."""
    try:
        counters = json.loads((path / COUNTERS).read_text())
        first_version = "sha256" not in counters and all(isinstance(n, int) for n in counters["files"].values())
        intact = first_version or is_sealed(counters)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no readable {COUNTERS}. "
            "Remove it to continue from an earlier one"
        ) from None
    if not intact:
        raise CheckpointError(
            f"{path} is damaged: the contents of {COUNTERS} are not those that were written. Remove this checkpoint "
            "to continue from an earlier one"
        )
    for name, entry in counters["files"].items():
        size = entry["bytes"] if isinstance(entry, dict) else entry  # version 0.1 wrote the size alone
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != size:
            what = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise CheckpointError(
                f"{path} is damaged: {name} {what}. Remove this checkpoint to continue from an earlier one"
            )
    return counters


def verify(path: Path, only: str | None = None, share: tuple[int, int] = (0, 1)) -> None:
    """Compares every file of a checkpoint, or those of the role that is named, with the hash in its manifest. share:
    (i, n): every n-th file from number i on. Raises CheckpointError, naming the file, if one differs. A checkpoint of
    version 0.1 has no hashes, and passes."""
    entries = counters_of(path)["files"]
    for name in (list(entries) if only is None else files_of(entries, only))[share[0] :: share[1]]:
        if not isinstance(entries[name], dict):
            continue
        with (path / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entries[name]["sha256"]:
            raise CheckpointError(
                f"{path} is damaged: the contents of {name} are not those that were written. Remove this checkpoint "
                "to continue from an earlier one"
            )


def files_of(manifest: Iterable[str], role: str) -> list[str]:
    """The files of a role in a manifest: one, or the parts that processes have written."""
    name = re.compile(rf"{re.escape(role)}(\.\d+-of-\d+)?\.safetensors")
    return [file for file in manifest if name.fullmatch(file)]


def holds(path: Path, role: str) -> bool:
    return bool(files_of(counters_of(path)["files"], role))


def stored(path: Path, role: str) -> Stored:
    """The tensors of a role in a checkpoint; also "<role>.optimizer" and "objective". Raises CheckpointError if there
    are none, or if they cannot be read."""
    files = files_of(counters_of(path)["files"], role)
    if not files:
        raise CheckpointError(f"{path} has no {role}, which this recipe needs")
    try:
        return Stored(path / file for file in files)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path / f'{role}.safetensors'}: {error}") from None


@torch.no_grad()
def load(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    state: dict[str, Tensor],
    device: torch.device,
    verified: bool = False,
) -> dict[str, Any]:
    """Restores in place everything that `save` wrote, and returns the counters. verified: whether the files have been
    compared with their hashes already. Raises CheckpointError if a tensor is missing or has another shape."""
    counters = counters_of(path)
    if not verified:
        verify(path)
    for role, module in modules.items():
        check_dtypes(path, role, module.state_dict())
        read_into(path, role, module.state_dict())
    for role, optimizer in optimizers.items():
        restore_moments(path, role, optimizer, modules[role])
    found = stored(path, "objective")
    state.clear()
    state.update({name: found.whole(name).to(device) for name in found.shapes})
    return counters


def check_dtypes(path: Path, role: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a stored tensor has another dtype than the network: a continued run would differ."""
    dtypes = stored(path, role).dtypes
    for name in set(dtypes) & set(tensors):
        if dtypes[name] != (needed := DTYPES[tensors[name].dtype]):
            raise CheckpointError(f"{path} stores {name} of {role} as {dtypes[name]}, but this recipe needs {needed}")


def read_into(path: Path, role: str, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors in place with those that a checkpoint has of a role; a sharded tensor takes its own slice. Raises
    CheckpointError unless these have exactly the same names and shapes."""
    found = stored(path, role)
    check_names(path, role, found.shapes, tensors)
    for name, tensor in tensors.items():
        local(tensor).copy_(read_slice(found, name, tensor))


def stored_tensors(path: Path, role: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a checkpoint has of a role, one at a time, whole, on the CPU and as they are stored. Raises
    CheckpointError unless these have exactly the names and shapes of `tensors`, whose values are not read."""
    found = stored(path, role)
    check_names(path, role, found.shapes, tensors)
    for name, tensor in tensors.items():
        check_shape(name, found.shapes[name], tensor)
        yield name, found.whole(name)


def read_student(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills a student's tensors from the average in a checkpoint of another run. That one may lack added inputs that
    this student has; their tensors stay as they are. Raises CheckpointError if anything else differs."""
    found = stored(path, "ema")
    try:
        names = carried_names(tensors, found.shapes)
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit this recipe's student: {error}") from None
    for name, other in names.items():
        local(tensors[name]).copy_(read_slice(found, other, tensors[name]))


def moments(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors, named "<parameter>.<state>"; without the tables of 8-bit moments, which are always the
    same."""
    named: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    return {
        f"{named[p]}.{key}": torch.as_tensor(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if not key.startswith("qmap")
    }


def restore_moments(path: Path, role: str, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Sets the optimizer's state. A scalar (`step`) stays on the CPU, where AdamW keeps it, unless it is fused."""
    parameters, fused = dict(module.named_parameters()), optimizer.defaults.get("fused")
    found = stored(path, f"{role}.optimizer")
    optimizer.state.clear()
    for full, shape in found.shapes.items():
        name, _, key = full.rpartition(".")
        if name not in parameters:
            raise CheckpointError(f"{path} has moments of {name}, which this recipe's network does not have")
        p = parameters[name]
        if hasattr(optimizer, "init_state"):
            restore_8bit(optimizer, p, key, found.whole(full))
        elif not shape and p.dim():
            value = found.whole(full)
            optimizer.state[p][key] = value.to(p.device) if fused else value
        else:
            moment = torch.zeros_like(p)
            local(moment).copy_(read_slice(found, full, p))
            optimizer.state[p][key] = moment


def restore_8bit(optimizer: Any, p: Tensor, key: str, stored: Tensor) -> None:
    """Sets one of a parameter's moments in an optimizer of bitsandbytes, whose own `init_state` makes them all, those
    in paged memory included. The optimizer of a role has one group."""
    if not optimizer.state[p]:
        (group,) = optimizer.param_groups
        index = next(i for i, other in enumerate(group["params"]) if other is p)
        optimizer.init_state(group, p, 0, index)
    state = optimizer.state[p]
    if key == "step":
        state[key] = int(stored)
    else:
        check_shape(key, stored.shape, state[key])
        state[key].copy_(stored)


def read_slice(found: Stored, name: str, like: Tensor) -> Tensor:
    """This process's slice of a stored tensor. Raises CheckpointError if the shapes differ."""
    check_shape(name, found.shapes[name], like)
    return found.box(name, slices(like))


def check_names(path: Path, role: str, found: Iterable[str], tensors: Iterable[str]) -> None:
    if differing := sorted(set(found) ^ set(tensors)):
        raise CheckpointError(
            f"{role} in {path} does not fit this recipe's network; only one of the two has {', '.join(differing[:4])}"
        )


def check_shape(name: str, stored: Sequence[int], like: Tensor) -> None:
    if list(stored) != list(like.shape):
        raise CheckpointError(
            f"{name} is stored with shape {list(stored)}, but this recipe needs shape {list(like.shape)}"
        )
