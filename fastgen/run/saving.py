"""Writes checkpoints, every process its own parts, while training goes on. `checkpoint` says what a folder holds.

torch.distributed.checkpoint decides who writes what (of tensors that several processes hold, one of them), copies
tensors to the host, and tells all processes what went wrong on any. It does so through a writer of our own, because
its FileSystemWriter pickles its index, and its HuggingFaceStorageWriter, whose format of parts this is,

- makes the bytes of a whole file before it writes it, twice the file's size (measured: 1.9 times, torch 2.14);
- has one file for all networks of a process, whose tensors have the same names;
- has no hashes and no manifest, so that a missing or damaged file is not noticed."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from fastgen.data.files import sealed
from fastgen.modules.stored import offsets_entry
from fastgen.modules.tensor_file import Spec, head, raw
from fastgen.run.checkpoint import COUNTERS, PREFIX, CheckpointError, complete, discard, moments
from fastgen.run.distributed import LONGEST

Entry = dict[str, Any]  # of a file in the manifest: {"bytes": its size, "sha256": its hash}


class Checkpoints:
    """The checkpoints that a run writes, one at a time, for a `with` block; at its end the last one is complete.

    In the background, `save` copies this process's tensors to the host, as many bytes as it will write, and a thread
    writes the copy. Otherwise `save` returns when the checkpoint is complete, with one tensor on the host at a time.
    Every method raises CheckpointError if a write has failed, for example because the disk is full. Earlier
    checkpoints are then intact, and what was half written is removed.

    sharded: every process writes its parts. Otherwise the first process alone writes. All processes call all methods
    but `check` together."""

    def __init__(self, folder: Path, keep: int, sharded: bool = False, background: bool = True):
        """keep: how many of the newest checkpoints stay, beside that of step counters["last_good"]."""
        self.folder, self.keep, self.background = folder, keep, background
        self.group: dist.ProcessGroup | None = None
        self.writes = True
        if dist.is_initialized():  # a group of its own, as messages of two threads in one would be confused
            self.writes = sharded or dist.get_rank() == 0
            self.group = dist.new_group(None if sharded else [0], timeout=LONGEST, backend="gloo")  # type: ignore[assignment]
        self.target = folder
        self.pending: Future[Any] | None = None

    def save(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        state: Mapping[str, Tensor],
        counters: Mapping[str, Any],
    ) -> None:
        """Starts to write folder/step_<counters["step"]>, once the one before is complete."""
        self.wait()
        if not self.writes:
            return
        files: dict[str, Mapping[str, Tensor]] = {role: module.state_dict() for role, module in modules.items()}
        files |= {f"{role}.optimizer": moments(optimizers[role], modules[role]) for role in optimizers}
        files["objective"] = state
        tensors = {f"{file}/{name}": t.detach() for file, of_file in files.items() for name, t in of_file.items()}
        self.target = self.folder / f"{PREFIX}{counters['step']:08d}"
        how: dict[str, Any] = {
            "storage_writer": PartsWriter(self.target, list(files), counters, self.keep),
            "planner": dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            "process_group": self.group,
        }
        with said(self.target):
            if self.background:
                self.pending = dcp.async_save(tensors, **how)  # type: ignore[assignment]
            else:
                dcp.save(tensors, **how)

    def check(self) -> None:
        """Raises CheckpointError if a write has failed by now."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete."""
        pending, self.pending = self.pending, None
        if pending is not None:
            with said(self.target):
                pending.result()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(*([CheckpointError] if kind else [])):  # the first error is the one to be read
            self.wait()
        if self.group is not None and self.writes:
            dist.destroy_process_group(self.group)


@contextmanager
def said(target: Path) -> Iterator[None]:
    """What goes wrong in writing a checkpoint is raised in words, or as it was before torch wrapped it."""
    try:
        yield
    except CheckpointException as wrapped:
        error = next(error for error, _ in wrapped.failures.values())
        if not isinstance(error, OSError):
            raise error from None
        shutil.rmtree(partial(target), ignore_errors=True)
        earlier = complete(target.parent)
        kept = f"the last checkpoint, {earlier[-1].name}, is intact" if earlier else "there is no earlier checkpoint"
        raise CheckpointError(
            f"cannot write {target}: {error.strerror}; {kept}. Free some space and start the run again to continue"
        ) from None


def partial(target: Path) -> Path:
    """Where a checkpoint is while it is being written."""
    return target.with_name(target.name + ".partial")


class PartsWriter(dcp.StorageWriter):
    """Writes one checkpoint. Tensors are named "<file>/<name in the file>". Each process writes a file for each name
    in `files` of which it holds something, and the first process even an empty one. The first process then writes the
    manifest, renames the folder, and removes old checkpoints."""

    def __init__(self, target: Path, files: Sequence[str], counters: Mapping[str, Any], keep: int):
        self.target, self.files, self.counters, self.keep = target, files, counters, keep

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # the folder is an argument

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        if is_coordinator:  # all others write after this
            shutil.rmtree(partial(self.target), ignore_errors=True)
            partial(self.target).mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=(number, len(plans))) for number, plan in enumerate(plans, 1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        number, count = plan.storage_data
        items: dict[str, list[WriteItem]] = {file: [] for file in (self.files if number == 1 else ())}
        for item in plan.items:
            items.setdefault(item.index.fqn.partition("/")[0], []).append(item)
        written = []
        for file, of_file in items.items():
            name = f"{file}.{number:05d}-of-{count:05d}.safetensors" if count > 1 else f"{file}.safetensors"
            entry = write_parts(partial(self.target) / name, of_file, planner, whole=count == 1)
            written.append(WriteResult(MetadataIndex(name), entry["bytes"], entry))
        done = torch.futures.Future[list[WriteResult]]()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        manifest = {result.index.fqn: result.storage_data for written in results for result in written}
        content = sealed(dict(self.counters) | {"files": dict(sorted(manifest.items()))})
        write_durably(partial(self.target) / COUNTERS, [json.dumps(content).encode()])
        discard(self.target)
        partial(self.target).rename(self.target)
        sync_folder(self.target.parent)
        good = f"{PREFIX}{self.counters.get('last_good', -1):08d}"
        for old in complete(self.target.parent)[: -self.keep]:
            if old.name != good:
                discard(old)


def write_parts(path: Path, items: Sequence[WriteItem], planner: SavePlanner, whole: bool) -> Entry:
    """Writes a safetensors file with one tensor in memory at a time, beside those it is given."""
    chunks: dict[str, Any] = {item.index.fqn.partition("/")[2]: item.tensor_data for item in items}
    specs = {name: Spec(data.properties.dtype, tuple(data.chunk.sizes)) for name, data in chunks.items()}
    starts = {name: tuple(data.chunk.offsets) for name, data in chunks.items()}
    start, _ = head(specs, None if whole else offsets_entry(starts))
    return write_durably(path, itertools.chain([start], (raw(resolved(planner, item)) for item in items)))


def resolved(planner: SavePlanner, item: WriteItem) -> Tensor:
    value = planner.resolve_data(item)
    assert isinstance(value, Tensor)  # bytes are what torch pickles, and there are none
    return value


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
