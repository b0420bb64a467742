"""Checkpoints that are either complete or absent. Each is written under another name, flushed to disk, then renamed.
All tensors are stored as safetensors.

    step_00000200/
        student.safetensors  fake_score.safetensors  ...  ema.safetensors      every role except the frozen teacher
        student.optimizer.safetensors  ...                                     AdamW's moments, by parameter name
        objective.safetensors                                                  the objective's state
        counters.json                                                          step, data position, files' hashes

Sharded tensors are gathered, written and dropped one at a time, and read back slice by slice. So the files do not
depend on the number of processes that wrote them.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastgen.data.files import is_sealed, sealed
from fastgen.modules.inputs import carried_names
from fastgen.modules.sharding import local, slices, whole
from fastgen.modules.tensor_file import DTYPES, Spec, TensorFile, head, raw

PREFIX = "step_"
NAME = re.compile(r"step_\d{8,}")
GOING = ".going.partial"  # ends the name of a checkpoint that is being removed
COUNTERS = "counters.json"

Entry = dict[str, Any]  # of a file in the manifest: {"bytes": its size, "sha256": its hash}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message says what to do."""


def save(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    state: Mapping[str, Tensor],
    counters: Mapping[str, Any],
    keep: int,
    writer: bool = True,
) -> Path:
    """Writes folder/step_<counters["step"]>, then removes old complete checkpoints. The newest `keep` stay, and so
    does that of step counters["last_good"]. Every process calls this; only the `writer` writes.

    Raises CheckpointError if writing fails, for example because the disk is full. Earlier checkpoints are then
    intact."""
    target = folder / f"{PREFIX}{counters['step']:08d}"
    partial = target.with_name(target.name + ".partial")
    files: dict[str, Mapping[str, Tensor]] = {role: module.state_dict() for role, module in modules.items()}
    files |= {f"{role}.optimizer": moments(optimizers[role], modules[role]) for role in optimizers}
    files["objective"] = state
    try:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        written = {
            f"{name}.safetensors": write_tensors(partial / f"{name}.safetensors", tensors, writer)
            for name, tensors in files.items()
        }
        if writer:
            manifest = {name: entry for name, entry in sorted(written.items()) if entry is not None}
            write_durably(partial / COUNTERS, [json.dumps(sealed(dict(counters) | {"files": manifest})).encode()])
            discard(target)
            partial.rename(target)
            sync_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        earlier = complete(folder)
        kept = f"the last checkpoint, {earlier[-1].name}, is intact" if earlier else "there is no earlier checkpoint"
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
    """Removes a checkpoint if it exists. It is renamed first, so that a kill in between leaves nothing that looks like
    a complete checkpoint but is not."""
    for left in checkpoint.parent.glob(f"{checkpoint.name}*{GOING}"):  # by an earlier kill
        shutil.rmtree(left, ignore_errors=True)
    if checkpoint.exists():
        going = checkpoint.with_name(f"{checkpoint.name}.{uuid4().hex[:8]}{GOING}")
        checkpoint.rename(going)
        shutil.rmtree(going)


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], writer: bool) -> Entry | None:
    """Writes a safetensors file with one whole tensor in memory at a time (https://huggingface.co/docs/safetensors,
    "Format"), and returns its entry in the manifest. Every process must call this, because sharded tensors are
    gathered; only the `writer` writes."""
    start, _ = head({name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    chunks = (raw(whole(tensor)) for tensor in tensors.values())
    try:
        if writer:
            return write_durably(path, itertools.chain([start], chunks))
        return None
    finally:
        for _ in chunks:  # gathering needs every process, even one that does not write or whose write failed
            pass


def write_durably(path: Path, parts: Iterable[bytes | memoryview]) -> Entry:
    """Writes a file and flushes it to disk. Returns its size and sha256."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some network file systems do not support this
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


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


def verify(path: Path, only: str | None = None) -> None:
    """Compares every file of a checkpoint, or the one that is named, with the hash in its manifest. Raises
    CheckpointError, naming the file, if one differs. A checkpoint of version 0.1 has no hashes, and passes."""
    for name, entry in counters_of(path)["files"].items():
        if not isinstance(entry, dict) or only not in (None, name):
            continue
        with (path / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry["sha256"]:
            raise CheckpointError(
                f"{path} is damaged: the contents of {name} are not those that were written. Remove this checkpoint "
                "to continue from an earlier one"
            )


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
        check_dtypes(path / f"{role}.safetensors", module.state_dict())
        read_into(path / f"{role}.safetensors", dict(module.state_dict()))
    for role, optimizer in optimizers.items():
        restore_moments(path / f"{role}.optimizer.safetensors", optimizer, modules[role])
    state.clear()
    with open_tensors(path / "objective.safetensors") as file:
        state.update({name: file.get_tensor(name).to(device) for name in file.keys()})  # noqa: SIM118
    return counters


def check_dtypes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a stored tensor has another dtype than the network: a continued run would differ."""
    with open_tensors(path) as file:
        for name in set(file.keys()) & set(tensors):
            stored, needed = file.get_slice(name).get_dtype(), DTYPES[tensors[name].dtype]
            if stored != needed:
                raise CheckpointError(f"{path} stores {name} as {stored}, but this recipe needs {needed}")


def read_into(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors in place from a file; a sharded tensor takes its own slice. Raises CheckpointError unless the file
    has exactly these names and shapes."""
    with open_tensors(path) as file:
        check_names(path, file.keys(), tensors)
        for name, tensor in tensors.items():
            local(tensor).copy_(read_slice(file, name, tensor))


def stored_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, one at a time, whole, on the CPU and as they are stored. Raises CheckpointError unless
    the file has exactly the names and shapes of `tensors`, whose values are not read."""
    with open_tensors(path) as checked:
        check_names(path, checked.keys(), tensors)
    file = TensorFile(path)
    for name, tensor in tensors.items():
        check_shape(name, file.specs[name].shape, tensor)
        yield name, file.read(name)


def read_student(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills a student's tensors from the file of another student. That one may lack added inputs that this student
    has; their tensors stay as they are. Raises CheckpointError if anything else differs."""
    with open_tensors(path) as file:
        try:
            names = carried_names(tensors, file.keys())
        except ValueError as error:
            raise CheckpointError(f"{path} does not fit this recipe's student: {error}") from None
        for name, stored in names.items():
            local(tensors[name]).copy_(read_slice(file, stored, tensors[name]))


def restore_moments(path: Path, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Sets the optimizer's state. A scalar (`step`) stays on the CPU, where AdamW keeps it, unless it is fused."""
    parameters, fused = dict(module.named_parameters()), optimizer.defaults.get("fused")
    optimizer.state.clear()
    with open_tensors(path) as file:
        for full in file.keys():  # noqa: SIM118
            name, _, key = full.rpartition(".")
            if name not in parameters:
                raise CheckpointError(f"{path} has moments of {name}, which this recipe's network does not have")
            p = parameters[name]
            if hasattr(optimizer, "init_state"):
                restore_8bit(optimizer, p, key, file.get_tensor(full))
            elif not file.get_slice(full).get_shape() and p.dim():
                value = file.get_tensor(full)
                optimizer.state[p][key] = value.to(p.device) if fused else value
            else:
                moment = torch.zeros_like(p)
                local(moment).copy_(read_slice(file, full, p))
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


def read_slice(file: Any, name: str, like: Tensor) -> Tensor:
    """This process's slice of a stored tensor. Raises CheckpointError if the shapes differ."""
    stored = file.get_slice(name)
    check_shape(name, stored.get_shape(), like)
    return stored[slices(like)] if like.dim() else file.get_tensor(name)


def check_names(path: Path, stored: Iterable[str], tensors: Iterable[str]) -> None:
    if differing := sorted(set(stored) ^ set(tensors)):
        raise CheckpointError(
            f"{path} does not fit this recipe's network; only one of the two has {', '.join(differing[:4])}"
        )


def check_shape(name: str, stored: Sequence[int], like: Tensor) -> None:
    if list(stored) != list(like.shape):
        raise CheckpointError(
            f"{name} is stored with shape {list(stored)}, but this recipe needs shape {list(like.shape)}"
        )


def open_tensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
