"""Checkpoints: complete or not there, readable by anyone, and named when they are damaged."""

import importlib.util
import json
import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import draws, mutated
from safetensors.torch import load_file, save_file
from torch import nn
from variants import slow

from fastgen import cli
from fastgen.config import load_recipe
from fastgen.run import checkpoint
from fastgen.run.build import build, resume
from fastgen.run.checkpoint import CheckpointError
from fastgen.run.distributed import start
from fastgen.run.saving import Checkpoints
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


def save(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, torch.Tensor],
    counters: dict[str, Any],
    keep: int,
) -> Path:
    """Writes a checkpoint whose one role is called a."""
    with Checkpoints(folder, keep) as checkpoints:
        checkpoints.save({"a": module}, {"a": optimizer}, state, counters)
    return folder / f"step_{counters['step']:08d}"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """Also scalars, integers, bools and half precision; the files are ordinary safetensors, and nothing is pickled."""
    module, optimizer = trained()
    state = {"count": torch.tensor(3), "flags": torch.tensor([True, False]), "half": torch.ones(3).bfloat16()}
    path = save(tmp_path, module, optimizer, state, {"step": 7}, keep=1)
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
        save(tmp_path, module, optimizer, {}, counters, keep=2)
    assert [c.name for c in checkpoint.complete(tmp_path)] == ["step_00000002", "step_00000004", "step_00000005"]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("damage", ["cut", slow("gone"), slow("no counters")])
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
    path = save(tmp_path, module, optimizer, {}, {"step": 1}, keep=1)
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.load(path, {"a": nn.Linear(3, 4).double()}, {}, {}, torch.device("cpu"))
    save_file({k: v[:1].clone() for k, v in load_file(path / "a.safetensors").items() if v.dim()}, path / "b")
    assert json.loads((path / "counters.json").read_text())["files"]["a.safetensors"]["bytes"] > 0


@pytest.mark.parametrize(("old", "new"), [('"step": 2', '"step": 3'), ('"sha256": "', '"sha256": "0'), ("{", "[")])
def test_changed_counters_are_found(old: str, new: str, tmp_path: Path) -> None:
    """Also where they are counters still: nothing but their hash can tell."""
    module, optimizer = trained()
    path = save(tmp_path, module, optimizer, {}, {"step": 2, "watch": {}}, keep=1)
    text = (path / "counters.json").read_text()
    (path / "counters.json").write_text(text.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=r"step_00000002 .*counters\.json"):
        checkpoint.counters_of(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four updates, with two checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return train(load_recipe(RING, [*TINY, "train.steps=4", f"output_dir={folder}"]))


def test_a_damaged_checkpoint_is_not_exported(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    path = folder / "checkpoints/step_00000004/ema.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr("sys.argv", ["fastgen", "export", str(folder), "--output", str(tmp_path / "student")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.startswith("stopped: ") and error.count("\n") == 1
    assert "the contents of ema.safetensors are not those that were written" in error
    assert not (tmp_path / "student").exists()


def test_a_damaged_export_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut, of another shape, and gone: one line each, from a command that reads it."""
    folder = Path(shutil.copytree(finished / "export", tmp_path / "export"))
    path = folder / "model.safetensors"
    rows = {name: tensor[:1].clone() for name, tensor in load_file(path).items()}
    command = ["fastgen", "sample", str(folder), "--output", str(tmp_path / "samples")]
    for damage in (
        lambda: path.write_bytes(path.read_bytes()[:100]),
        lambda: save_file(rows, path),
        path.unlink,
    ):
        damage()
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as end:
            cli.main()
        error = capsys.readouterr().err
        assert end.value.code in (1, 2) and "model.safetensors" in error and "Traceback" not in error


def damaged(draw: random.Random, folder: Path, other: Path) -> str:
    """Damages one file of a checkpoint, and returns its name. other: an earlier checkpoint of the same run."""
    name = draw.choice(sorted(path.name for path in folder.iterdir()))
    path, kind = folder / name, draw.random()
    if kind < 0.05:
        path.unlink()
    elif kind < 0.1:
        shutil.copy(other / name, path)
    elif kind < 0.15:
        shutil.copy(draw.choice(sorted(folder.iterdir())), tmp := folder.parent / "copy")
        tmp.replace(path)
    else:
        path.write_bytes(mutated(draw, path.read_bytes()))
    return name


@pytest.mark.slow
def test_fuzzed_checkpoints_resume_alike_or_are_refused_by_name(finished: Path, tmp_path: Path) -> None:
    """Weights, moments and counters of the run are those that were saved, or the damaged file is named."""
    recipe = load_recipe(RING, [*TINY, "train.steps=4", f"output_dir={tmp_path / 'run'}"])
    run, counts = build(recipe, start(recipe)), Counter[str]()
    earlier, whole = checkpoint.complete(finished / "checkpoints")

    def resumed(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        counters = resume(run, path)
        tensors = {f"{role}.{k}": v.clone() for role, m in run.saved.items() for k, v in m.state_dict().items()}
        for role, optimizer in run.optimizers.items():
            tensors |= {
                f"{role}.moments.{k}": v.clone() for k, v in checkpoint.moments(optimizer, run.saved[role]).items()
            }
        return counters, tensors

    counters, tensors = resumed(whole)
    for draw in draws():
        folder = Path(shutil.copytree(whole, tmp_path / whole.name))
        name = damaged(draw, folder, earlier)
        try:
            found, values = resumed(folder)
        except CheckpointError as error:
            # with the counters of another checkpoint, which are whole, the files are the ones that differ
            assert name in str(error) or (name == checkpoint.COUNTERS and folder.name in str(error)), error
            counts["refused"] += 1
        else:
            assert found == counters and values.keys() == tensors.keys()
            assert all(torch.equal(value, tensors[key]) for key, value in values.items())
            counts["the same"] += 1
        shutil.rmtree(folder)
    print(f"{counts['the same']} read the same, {counts['refused']} refused")
    assert min(counts["the same"], counts["refused"]) > 10


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
