"""Checkpoints of networks that processes share: each writes its parts, none gathers, and all learn of a failure."""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import in_processes
from safetensors.torch import load_file, save_file
from test_checkpoint import largest_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen.config import load_recipe
from fastgen.modules.sharding import whole
from fastgen.modules.stored import Stored, offsets_entry
from fastgen.run import checkpoint, saving
from fastgen.run.checkpoint import CheckpointError
from fastgen.run.saving import Checkpoints
from fastgen.train import train

CPU = torch.device("cpu")


def network() -> nn.Module:
    """Rows that two processes cannot share evenly, one row that only one can have, a buffer and a scalar."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(400, 301), nn.BatchNorm1d(301), nn.Linear(301, 1)).double()
    module.register_parameter("scale", nn.Parameter(torch.tensor([2.0], dtype=torch.float64)))
    return module


def trained(module: nn.Module) -> torch.optim.AdamW:
    """Its optimizer, after a step whose gradients are made up."""
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    for p in module.parameters():
        p.grad = p.detach() * 0.1
    optimizer.step()
    return optimizer


def shared(*shape: int) -> nn.Module:
    """The network, sharded over the processes of a new group."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    names = ("copies", "shards")[-len(shape) :]
    return fully_shard(network(), mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))


def write(folder: Path, module: nn.Module, step: int, background: bool = True, sharded: bool = True) -> None:
    optimizer = trained(module)
    with Checkpoints(folder, 2, sharded, background) as checkpoints:
        state = {"count": torch.tensor(step)}
        checkpoints.save({"a": module}, {"a": optimizer}, state, {"step": step})


def contents(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole."""
    roles = sorted({name.split(".safetensors")[0].split(".0")[0] for name in os.listdir(path)} - {"counters.json"})
    found = {role: checkpoint.stored(path, role) for role in roles}
    return {f"{role}/{name}": stored.whole(name) for role, stored in found.items() for name in stored.shapes}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation of this thread takes or returns; of a sharded one, of its part."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        found = (t for t in tree_leaves((out, args)) if isinstance(t, Tensor) and not isinstance(t, DTensor))
        self.bytes = max([self.bytes, *(t.nbytes for t in found)])
        return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes of the network."""
    folder = tmp_path_factory.mktemp("alone")
    write(folder, network(), 1)
    return folder / "step_00000001"


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes write of it."""
    folder = tmp_path_factory.mktemp("halves")
    in_processes(folder, 2, lambda: write(folder, shared(2), 1))
    return folder / "step_00000001"


def test_parts_are_of_the_same_bits_as_whole_tensors(alone: Path, halves: Path) -> None:
    """Each process has written its half, and both have all files in their manifest."""
    assert same(contents(alone), contents(halves))
    sizes = [(halves / f"a.0000{n}-of-00002.safetensors").stat().st_size for n in (1, 2)]
    whole_size = (alone / "a.safetensors").stat().st_size
    print(f"{sizes} bytes by process, {whole_size} by one")
    assert max(sizes) < 0.52 * whole_size and sum(sizes) < whole_size + 2000
    assert set(checkpoint.counters_of(halves)["files"]) == set(os.listdir(halves)) - {"counters.json"}
    checkpoint.verify(halves)


def test_torch_reads_the_parts(halves: Path, tmp_path: Path) -> None:
    for path in halves.glob("a.0*"):
        shutil.copy(path, tmp_path / path.name)
    found = {name: torch.zeros_like(value) for name, value in network().state_dict().items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    stored = checkpoint.stored(halves, "a")
    assert same(found, {name: stored.whole(name) for name in stored.shapes})


@pytest.mark.parametrize("written", ["alone", "halves"])
@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_processes_reads_them(
    written: str, count: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A checkpoint of one process is also one of an earlier version, on any number."""
    path = request.getfixturevalue(written)
    expected = contents(path)

    def read() -> None:
        module = network() if count == 1 else shared(count)
        optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
        state = dict[str, Tensor]()
        checkpoint.load(path, {"a": module}, {"a": optimizer}, state, CPU)
        found = {f"a/{name}": whole(t) for name, t in module.state_dict().items()}
        found |= {f"a.optimizer/{name}": whole(t) for name, t in checkpoint.moments(optimizer, module).items()}
        assert same(expected, found | {f"objective/{name}": t for name, t in state.items()})

    if count == 1:
        read()
    else:
        in_processes(tmp_path, count, read)


def test_no_process_gathers_a_whole_tensor(tmp_path: Path) -> None:
    """The largest tensor of any operation is a part, unless one is gathered on purpose."""

    def counted() -> None:
        module = shared(2)
        largest = max(p.nbytes for p in network().parameters())
        with Largest() as seen:
            write(tmp_path, module, 1, background=False)
        assert 0.4 * largest < seen.bytes < 0.51 * largest, (seen.bytes, largest)
        with Largest() as seen:
            whole(module.get_parameter("0.weight"))
        assert seen.bytes >= largest

    in_processes(tmp_path, 2, counted)


@pytest.mark.slow
def test_copies_of_a_network_are_written_once(alone: Path, tmp_path: Path) -> None:
    in_processes(tmp_path, 4, lambda: write(tmp_path, shared(2, 2), 1))
    path = tmp_path / "step_00000001"
    assert same(contents(alone), contents(path))
    sizes = [(path / f"a.optimizer.0000{n}-of-00004.safetensors").stat().st_size for n in range(1, 5)]
    print(f"{sizes} bytes by process, {(alone / 'a.optimizer.safetensors').stat().st_size} by one")
    assert sum(sizes) < (alone / "a.optimizer.safetensors").stat().st_size + 4000


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No file is written before this event."""
    go, write_durably = threading.Event(), saving.write_durably

    def later(*arguments: Any) -> Any:
        go.wait(60)
        return write_durably(*arguments)

    monkeypatch.setattr(saving, "write_durably", later)
    return go


def test_training_goes_on_while_its_state_is_written(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`save` returns before a byte is written, and what changes afterwards is not in the checkpoint."""
    go = held_back(monkeypatch)
    module = network()
    optimizer, state = trained(module), {"count": torch.tensor(1)}
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save({"a": module}, {"a": optimizer}, state, {"step": 1})
        for tensor in (*module.state_dict().values(), *checkpoint.moments(optimizer, module).values(), state["count"]):
            tensor.add_(1)
        assert not checkpoint.complete(tmp_path)
        checkpoints.check()
        go.set()
    assert same(contents(alone), contents(tmp_path / "step_00000001"))


def test_without_a_copy_it_is_complete_at_once(alone: Path, tmp_path: Path) -> None:
    module = network()
    with Checkpoints(tmp_path, 2, background=False) as checkpoints:
        checkpoints.save({"a": module}, {"a": trained(module)}, {"count": torch.tensor(1)}, {"step": 1})
        assert same(contents(alone), contents(tmp_path / "step_00000001"))


def test_the_next_one_waits_for_the_one_before(tmp_path: Path) -> None:
    module = network()
    optimizer = trained(module)
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step in range(1, 5):
            checkpoints.save({"a": module}, {"a": optimizer}, {}, {"step": step})
            assert [c.name for c in checkpoint.complete(tmp_path)][-1:] >= [f"step_{step - 1:08d}"][: step - 1]
    assert [c.name for c in checkpoint.complete(tmp_path)] == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("background", [True, False])
def test_every_process_learns_that_one_could_not_write(background: bool, tmp_path: Path) -> None:
    """The earlier checkpoint stays, and nothing of the other one."""

    def fails() -> None:
        module = shared(2)
        write(tmp_path, module, 1)
        words = r"cannot write .*step_00000002: .*step_00000001, is intact"
        limit = 1000 if dist.get_rank() else 1 << 40
        with largest_file(limit), pytest.raises(CheckpointError, match=words):
            write(tmp_path, module, 2, background)
        dist.barrier()
        assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]

    in_processes(tmp_path, 2, fails)


def test_an_error_of_the_training_is_not_hidden_by_one_of_the_writing(tmp_path: Path) -> None:
    module = network()
    with largest_file(1000), pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save({"a": module}, {}, {}, {"step": 1})
        raise ZeroDivisionError


def killed(write_parts: Callable[..., Any]) -> Callable[..., Any]:
    def killing(path: Path, *arguments: Any, **named: Any) -> Any:
        entry = write_parts(path, *arguments, **named)
        if "optimizer" in path.name and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return entry

    return killing


def test_a_process_that_is_killed_leaves_the_last_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has written one of its two files."""

    def dies() -> None:
        module = shared(2)
        write(tmp_path, module, 1)
        monkeypatch.setattr(saving, "write_parts", killed(saving.write_parts))
        write(tmp_path, module, 2)

    with pytest.raises(AssertionError, match="exit codes"):
        in_processes(tmp_path, 2, dies)
    (left,) = checkpoint.complete(tmp_path)
    assert left.name == "step_00000001" and (tmp_path / "step_00000002.partial").is_dir()
    checkpoint.verify(left)


def test_a_missing_part_is_seen(tmp_path: Path) -> None:
    """Between two others, where the shape does not tell."""
    for start in (0, 4):
        save_file({"w": torch.ones(2, 3)}, tmp_path / f"{start}", offsets_entry({"w": (start, 0)}))
    with pytest.raises(OSError, match="parts of w are missing"):
        Stored([tmp_path / "0", tmp_path / "4"])
    save_file({"w": torch.ones(2, 3)}, tmp_path / "2", offsets_entry({"w": (2, 0)}))
    stored = Stored(tmp_path / name for name in "024")
    assert stored.shapes == {"w": (6, 3)} and torch.equal(
        stored.box("w", (slice(1, 5), slice(0, 2))), torch.ones(4, 2)
    )


def test_the_files_of_one_process_are_plain(alone: Path) -> None:
    assert load_file(alone / "a.safetensors").keys() == network().state_dict().keys()


@pytest.mark.slow
def test_a_sharded_run_continues_to_the_same_bits(mixture_recipe: Path, tmp_path: Path) -> None:
    """On two processes to the bit, and on one, which adds in another order, to rounding."""
    small = ("train.dtype=float64", "train.sample_every=0", "train.eval_every=0", "train.checkpoint_every=2")
    sizes = ("health.num_samples=4", "eval.quick_num_samples=20", "eval.metrics=[throughput]", "train.device=cpu")
    fit = ("backbone.fit_steps=2", "objective.fake_updates=1", "eval.teacher_steps=[2]", "train.keep_checkpoints=9")
    steady = ("optimizers.student.decay=constant", "optimizers.fake_score.decay=constant")

    def run(folder: Path, processes: int, steps: int) -> None:
        options = [f"train.steps={steps}", f"output_dir={folder}", f"train.batch_size={4 // processes}"]
        if processes > 1:
            options.append("train.strategy=fsdp")
        recipe = load_recipe(mixture_recipe, [*small, *sizes, *fit, *steady, *options])
        in_processes(tmp_path, processes, train, recipe)

    run(tmp_path / "whole", 2, 4)
    run(tmp_path / "parts", 2, 2)
    shutil.copytree(tmp_path / "parts", tmp_path / "alone")
    run(tmp_path / "parts", 2, 4)
    run(tmp_path / "alone", 1, 4)
    expected, again, one = (contents(tmp_path / f / "checkpoints/step_00000004") for f in ("whole", "parts", "alone"))
    assert same(expected, again) and expected.keys() == one.keys()
    error = max(float((expected[k].double() - one[k].double()).abs().max()) for k in expected)
    print(f"largest difference of one process {error:.2g}")
    assert error < 1e-12
