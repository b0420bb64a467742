"""Two processes that say they are on different machines: what they must share, and what only one of them writes."""

import json
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from processes import in_processes
from safetensors.torch import load_file

from fastgen.config import load_recipe
from fastgen.registry import RecipeError
from fastgen.run import checkpoint, machines
from fastgen.run.distributed import start
from fastgen.run.interruption import Interruption
from fastgen.run.lock import locked
from fastgen.run.machines import check_alike
from fastgen.train import train

SMALL = [
    *("backbone.fit_steps=0", "backbone.width=16", "train.batch_size=8", "train.log_every=1", "train.device=cpu"),
    *("train.checkpoint_every=1", "health.every=0", "eval.num_samples=400", "eval.quick_num_samples=400"),
    *("eval.teacher_steps=[2]", "train.sample_every=1"),
]


def on_two_machines(folder: Path, function: Callable[[int], None]) -> None:
    """Calls function(rank) in two processes, each the only one of its machine."""

    def alone() -> None:
        rank = int(os.environ["RANK"])
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)}
        function(rank)

    in_processes(folder, 2, alone)


def test_each_process_is_told_what_differs_between_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is not shared, another recipe or other data are refused on all processes, in words."""
    monkeypatch.setattr(machines, "PATIENCE", 0.5)

    def refused(rank: int) -> None:
        accelerator = Accelerator(cpu=True)
        own = tmp_path / f"machine {rank}"
        own.mkdir()
        alone = r"output_dir: .* choose a folder on a file system that all"
        with pytest.raises(RecipeError, match=alone), locked(own, accelerator):
            raise AssertionError("a folder that is not shared was taken")
        with locked(tmp_path / "shared", accelerator):
            check_alike(accelerator, {"the recipe": "seed: 0"})
        with pytest.raises(RecipeError, match=r"the data of process 1 on .* is not that of the first process"):
            check_alike(accelerator, {"the recipe": "seed: 0", "the data": f"a cat {rank}"})

    on_two_machines(tmp_path, refused)
    assert not list(tmp_path.rglob(".lock"))


@pytest.mark.slow
def test_two_machines_write_one_run(mixture_recipe: Path, tmp_path: Path) -> None:
    """The same as two processes of one machine, also when continued; every row of the log is written once."""
    folder = tmp_path / "run"

    def run(steps: int, rank: int) -> None:
        train(load_recipe(mixture_recipe, [*SMALL, f"train.steps={steps}", f"output_dir={folder}"]))

    on_two_machines(tmp_path, lambda rank: run(1, rank))
    on_two_machines(tmp_path, lambda rank: run(2, rank))
    changed = checkpoint.complete(folder / "checkpoints")[-1] / "ema.safetensors"
    intact = changed.read_bytes()
    changed.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))

    def damaged(rank: int) -> None:
        with pytest.raises(checkpoint.CheckpointError, match=r"the contents of ema\.safetensors"):
            run(2, rank)

    on_two_machines(tmp_path, damaged)  # though one process alone reads this file
    changed.write_bytes(intact)
    other = tmp_path / "one machine"
    recipe = load_recipe(mixture_recipe, [*SMALL, "train.steps=2", f"output_dir={other}"])
    in_processes(tmp_path, 2, train, recipe)
    for file in ("student", "fake_score", "ema"):
        a, b = (load_file(checkpoint.complete(f / "checkpoints")[-1] / f"{file}.safetensors") for f in (folder, other))
        assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows.count(2) == len([r for r in (other / "log.jsonl").read_text().splitlines() if '"step": 2' in r])
    assert (folder / "export/fastgen.json").is_file() and not (folder / ".lock").exists()


def test_processes_wait_long_for_what_one_of_them_does_alone(mixture_recipe: Path, tmp_path: Path) -> None:
    """Exports, evaluations and checkpoints take the first process longer than torch's own ten minutes."""

    def waits(rank: int) -> None:
        accelerator = start(load_recipe(mixture_recipe, [*SMALL, f"output_dir={tmp_path / 'run'}"]))
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
        assert backend.options._timeout == timedelta(hours=2)
        accelerator.wait_for_everyone()  # the first process keeps the store of the others

    on_two_machines(tmp_path, waits)


def test_a_signal_that_the_launcher_passes_on_is_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm signals torchrun and its processes, and torchrun passes the signal on to them."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Interruption(says=False) as interruption:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.received == signal.SIGTERM
