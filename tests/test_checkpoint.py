"""Checkpoints: complete or not there, readable by anyone, and named when they are damaged."""

import importlib.util
import json
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastgen.config import load_recipe
from fastgen.run import checkpoint
from fastgen.run.checkpoint import CheckpointError
from fastgen.train import main, train

ROOT = Path(__file__).parents[1]
RING = ROOT / "recipes/mixture_dmd2_4step.yaml"
TINY = [
    "backbone.fit_steps=10",
    "backbone.width=16",
    "train.batch_size=8",
    "train.sample_every=0",
    "train.eval_every=0",
    "train.checkpoint_every=2",
    "train.keep_checkpoints=9",
    "eval.num_samples=32",
    "eval.quick_num_samples=32",
    "eval.teacher_steps=[2]",
    "health.every=0",
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def trained() -> tuple[nn.Module, torch.optim.AdamW]:
    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    module(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    return module, optimizer


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """Also scalars, integers, bools and half precision; the files are ordinary safetensors, and nothing is pickled."""
    module, optimizer = trained()
    state = {"count": torch.tensor(3), "flags": torch.tensor([True, False]), "half": torch.ones(3).bfloat16()}
    path = checkpoint.save(tmp_path, {"a": module}, {"a": optimizer}, state, {"step": 7}, keep=1)
    assert {f.suffix for f in path.iterdir()} == {".safetensors", ".json"}
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in load_file(path / "a.safetensors").items())
    other = network()
    fresh = torch.optim.AdamW(other.parameters(), 1e-2)
    found = dict[str, torch.Tensor]()
    assert checkpoint.load(path, {"a": other}, {"a": fresh}, found, torch.device("cpu"))["step"] == 7
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in module.state_dict().items())
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in state.items())
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        ours, theirs = optimizer.state[p], fresh.state[q]
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_rotation_keeps_the_newest_and_the_last_good_one(tmp_path: Path) -> None:
    module, optimizer = trained()
    for step in range(1, 6):
        counters = {"step": step, "last_good": 2}
        checkpoint.save(tmp_path, {"a": module}, {"a": optimizer}, {}, counters, keep=2)
    assert [c.name for c in checkpoint.complete(tmp_path)] == ["step_00000002", "step_00000004", "step_00000005"]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("damage", ["cut", "gone", "no counters"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Never step 0 instead, and never silently an earlier one."""
    folder = train(load_recipe(RING, [*TINY, "train.steps=4", f"output_dir={tmp_path / 'run'}"]))
    last = checkpoint.complete(folder / "checkpoints")[-1]
    victim = last / "student.optimizer.safetensors"
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-10])
    elif damage == "gone":
        victim.unlink()
    else:
        (last / "counters.json").unlink()
    again = [str(RING), *TINY, "train.steps=6", f"output_dir={folder}"]
    assert main(again) == 1
    error = capsys.readouterr().err
    assert "stopped: " in error and "step_00000004" in error
    shutil.rmtree(last)
    assert main(again) == 0


def test_resuming_from_a_named_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing one is refused; the later ones are set aside, not lost; the run ends with the same bits."""
    folder = train(load_recipe(RING, [*TINY, "train.steps=6", f"output_dir={tmp_path / 'run'}"]))
    expected = load_file(folder / "checkpoints/step_00000006/student.safetensors")
    again = [str(RING), *TINY, "train.steps=6", f"output_dir={folder}"]
    assert main([*again, "train.resume_from=step_00000005"]) == 2
    error = capsys.readouterr().err
    assert "train.resume_from" in error and "step_00000002, step_00000004, step_00000006" in error
    assert main([*again, "train.resume_from=step_00000002"]) == 0
    assert sorted(c.name for c in (folder / "set_aside").iterdir()) == ["step_00000004", "step_00000006"]
    again_last = load_file(folder / "checkpoints/step_00000006/student.safetensors")
    assert all(torch.equal(v, expected[k]) for k, v in again_last.items())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses this process every file above a size, as a full disk would any."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_stops_with_words_and_the_last_checkpoint_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small checkpoints pass, a larger one fails."""
    run = [str(RING), *TINY, f"output_dir={tmp_path / 'run'}", "objective.fake_updates=1"]
    assert main([*run, "train.steps=2"]) == 0
    limit = max(f.stat().st_size for f in (tmp_path / "run/checkpoints/step_00000002").iterdir()) - 1
    with largest_file(limit):
        assert main([*run, "train.steps=4"]) == 1
    error = capsys.readouterr().err
    print(error[-400:])
    assert "Traceback" not in error and "cannot write" in error and "step_00000002, is intact" in error
    assert [c.name for c in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000002"]
    assert main([*run, "train.steps=4"]) == 0


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    module, optimizer = trained()
    path = checkpoint.save(tmp_path, {"a": module}, {"a": optimizer}, {}, {"step": 1}, keep=1)
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.load(path, {"a": nn.Linear(3, 4).double()}, {}, {}, torch.device("cpu"))
    save_file({k: v[:1].clone() for k, v in load_file(path / "a.safetensors").items() if v.dim()}, path / "b")
    assert json.loads((path / "counters.json").read_text())["files"]["a.safetensors"]["bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["lora={student: {rank: 4}, fake_score: {rank: 4}}"]], ids=["full", "lora"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, extra: list[str]) -> None:
    """SIGKILL three times, once while a checkpoint is being written. benchmarks/acceptance/kill_runs.py is the whole
    program."""
    specification = importlib.util.spec_from_file_location("kill_runs", ROOT / "benchmarks/acceptance/kill_runs.py")
    assert specification is not None and specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    overrides = [*TINY, "train.steps=300", "train.checkpoint_every=10", "train.keep_checkpoints=2", *extra]
    row = tool.run_case("ring", str(RING), overrides, 3, 1, tmp_path)
    assert row["bit_identical"] and all(kill["killed"] for kill in row["kills"])
