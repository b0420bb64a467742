"""The leaderboard has every objective, and its rows are what the single recipes give."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.leaderboard import report
from benchmarks.leaderboard.entries import ABSENT, BUDGETS, ENTRIES, STEPS, TASKS, Run, make_runs
from benchmarks.leaderboard.leaderboard import Pool, main, needed, perform, run_all, run_updates
from benchmarks.rows import append_row, read_rows
from fastgen.config import load_recipe
from fastgen.evaluation.folders import evaluate_path
from fastgen.objectives import OBJECTIVES
from fastgen.recipe import Recipe
from fastgen.run.checkpoint import complete
from fastgen.train import train

ROOT = Path(__file__).parents[1]
RUNS = make_runs()
TINY = [
    "backbone.width=16",
    "backbone.fit_steps=20",
    "backbone.fit_batch_size=32",
    "train.batch_size=16",
    "eval.num_samples=64",
    "eval.batch_size=64",
]


def test_every_objective_has_an_entry_or_a_reason() -> None:
    named = {entry.objective for entry in ENTRIES}
    assert named | ABSENT.keys() == OBJECTIVES.keys()
    assert not named & ABSENT.keys()
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


def check_run(run: Run) -> Recipe:
    recipe = load_recipe(run.recipe, [*run.overrides, "output_dir=unused"])
    assert recipe.objective.name == run.entry.objective, run.name
    assert (run_updates(recipe), recipe.train.batch_size) == (BUDGETS[run.task].updates, BUDGETS[run.task].batch)
    assert (recipe.rollout.timesteps, recipe.seed) == (STEPS[run.steps], run.seed)
    return recipe


def test_runs_are_shipped_recipes_under_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for task in TASKS:
        first = [run for run in RUNS.values() if (run.task, run.seed) == (task, 0)]
        recipes = [check_run(run) for run in first if run.steps == run.entry.most_steps]
        assert len(recipes) == len(ENTRIES)
        own = {"time_frequency": 32.0} if task == "ring" else {}  # slow where a loss holds its derivative
        backbones = [dataclasses.replace(r.backbone, **own) for r in recipes]
        assert all((b, r.eval) == (backbones[0], recipes[0].eval) for b, r in zip(backbones, recipes, strict=True))


@pytest.mark.slow
def test_all_runs_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for run in RUNS.values():
        check_run(run)


def test_four_steps_have_three_seeds_and_fewer_one() -> None:
    for task in TASKS:
        for entry in ENTRIES:
            own = [run for run in RUNS.values() if (run.entry, run.task) == (entry, task)]
            wanted = [(4, 0), (4, 1), (4, 2), *((s, 0) for s in (1, 2) if s >= entry.least_steps)]
            wanted = [(steps, seed) for steps, seed in wanted if steps <= entry.most_steps]
            assert sorted((s, run.seed) for run in own for s in run.measured) == sorted(wanted), entry.name
            assert all(run.start is None or RUNS[run.start].steps == run.steps for run in own)


def test_the_whole_takes_four_cpu_hours() -> None:
    assert sum(run.seconds for run in RUNS.values()) <= 4 * 3600


def test_the_plan_is_that_of_the_updates_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hours = []
    for updates in ("10", "1000"):
        argv = ["--plan", "--task", "ring", "--only", "ring_crd_4step_seed0", "--updates", updates]
        assert main([*argv, "--rows", str(tmp_path / "rows.jsonl"), "--runs", str(tmp_path)]) == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith(f"ring: 2 runs of {updates} updates of 512 samples")  # it, and what it starts from
        hours.append(float(first.split()[-3]))
    assert hours[0] < 0.02 < hours[1]


def test_what_is_needed_is_what_has_no_row_and_what_it_starts_from(tmp_path: Path) -> None:
    runs = make_runs(updates=2)
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "runs"
    assert needed(runs, "teacher", TASKS, rows, folder) == ["ring_teacher", "digits_teacher"]
    crd = ["ring_crd_1step_seed0", "ring_dmd2_1step_seed0"]
    assert needed(runs, "crd_1step", ["ring"], rows, folder) == crd
    append_row(rows, {"name": crd[1], "overrides": list(runs[crd[1]].overrides)})
    assert needed(runs, "crd_1step", ["ring"], rows, folder) == crd  # the row is there, its run is gone
    (folder / crd[1] / "export").mkdir(parents=True)
    assert needed(runs, "crd_1step", ["ring"], rows, folder) == crd[:1]
    append_row(rows, {"name": crd[0], "overrides": list(runs[crd[0]].overrides)})
    assert needed(runs, "crd_1step", ["ring"], rows, folder) == []
    with pytest.raises(ValueError, match="made with other values"):
        needed(make_runs(updates=3), "crd_1step", ["ring"], rows, folder)


def write_name(name: str, path: Path) -> None:
    with path.open("a") as file:
        file.write(f"{name}\n")


def fail(name: str) -> None:
    sys.exit(3)


def wake_late(name: str, path: Path) -> None:
    time.sleep(60)
    write_name(name, path)


@pytest.mark.slow
def test_runs_wait_for_their_start_and_end_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, order = RUNS, tmp_path / "order"
    names = ["ring_crd_1step_seed0", "ring_dmd2_1step_seed0", "ring_teacher"]

    def run(work: Callable[[str], None], deadline: float) -> bool:
        return run_all(list(names), runs, Pool(2, tmp_path / "logs", work, method="fork"), deadline)

    assert run(partial(write_name, path=order), 60)
    done = order.read_text().split()
    assert sorted(done) == names and done.index(names[1]) < done.index(names[0])
    assert not run(fail, 60)
    assert "ring_crd_1step_seed0: not begun" in capsys.readouterr().out
    assert not run(partial(wake_late, path=order), 0.5)  # stops its runs, and does not wait for them
    assert not multiprocessing.active_children() and order.read_text().split() == done


@pytest.mark.slow
def test_a_row_is_what_the_single_recipe_gives(tmp_path: Path) -> None:
    run = make_runs(2, TINY)["ring_dmd2_2step_seed0"]
    perform(run, tmp_path / "runs", tmp_path / "rows.jsonl", "cpu", 1)
    row = read_rows(tmp_path / "rows.jsonl")[run.name]
    train(load_recipe(ROOT / run.recipe, [*row["overrides"], "train.device=cpu", f"output_dir={tmp_path / 'single'}"]))
    single = evaluate_path(tmp_path / "single", device="cpu", progress=False)["metrics"]
    assert single == {name: row["results"]["2"][name] for name in single}
    # four turns of the fake score, one of the student with the teacher; a rollout calls once or twice
    assert 2 * 16 * (4 * 2 + 3) <= row["evaluations"] <= 2 * 16 * (4 * 3 + 4)
    assert row["updates"] == 2 and row["seconds_per_update"] > 0 and 0.01 < row["peak_mb"] < 10


def test_the_table_is_sorted_and_counts_the_start() -> None:
    def record(entry: str, seed: int, energy: float, start: str | None = None) -> dict[str, Any]:
        return {
            "entry": entry,
            "task": "ring",
            "seed": seed,
            "start": start,
            "results": {"4": {"energy_distance": energy, "mode_share_error": 0.01, "linear": 0.2}},
            "evaluations": 1_000_000,
            "seconds_per_update": 0.1,
        }

    found = {f"d{seed}": record("dmd2", seed, 0.002 + 0.001 * seed) for seed in range(3)}
    found["c"] = record("crd", 0, 0.001, "d0")
    lines = report.table(found, "ring", 4)[5:]
    assert lines[0] == "| `crd` | with a reward, from `dmd2` | 0.0010 | 0.0100 | 0.200 | 0.100 |  | 2.00 M |"
    assert lines[1].startswith("| `dmd2` | distribution matching | 0.0030 (0.0020 to 0.0040) |")
    assert report.table(found, "digits", 4) == []


def launch(folder: Path, name: str, only: str) -> subprocess.Popen[bytes]:
    """The whole program in a process of its own; its runs and its table are in folder / name."""
    program, own = ROOT / "benchmarks/leaderboard/leaderboard.py", folder / name
    command = [sys.executable, str(program), "--only", only, "--task", "ring", "--updates", "60"]
    command += ["--runs", str(own), "--rows", str(own / "board/rows.jsonl"), *TINY]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT)


@pytest.mark.slow
def test_a_killed_leaderboard_goes_on_to_the_same_row(tmp_path: Path) -> None:
    """SIGKILL in the middle of a training: nothing trains on, and begun again the rows are those of a whole run."""
    names, only = ("ring_dmd2_1step_seed0", "ring_crd_1step_seed0"), "crd_1step"
    assert launch(tmp_path, "whole", only).wait() == 0
    process, checkpoints = launch(tmp_path, "killed", only), tmp_path / "killed" / names[0] / "checkpoints"
    while not complete(checkpoints):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3)
    there = [c.name for c in complete(checkpoints)]
    time.sleep(1)
    assert [c.name for c in complete(checkpoints)] == there != ["step_00000060"]
    assert launch(tmp_path, "killed", only).wait() == 0
    tables = [tmp_path / run / "board/rows.jsonl" for run in ("whole", "killed")]
    whole, killed = (read_rows(table) for table in tables)
    assert whole.keys() == killed.keys() == set(names)
    for name in names:
        for key in ("results", "evaluations", "updates", "overrides"):
            assert whole[name][key] == killed[name][key], key
    log = (tmp_path / "killed/logs" / f"{names[0]}.log").read_text()
    assert "continuing from" in log
    before = tables[1].stat()
    assert launch(tmp_path, "killed", only).wait() == 0
    assert (tables[1].stat().st_ino, tables[1].stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "`crd`" in (tmp_path / "killed/board/report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("entry", [entry.name for entry in ENTRIES if entry.any_step])
def test_any_number_of_steps_is_one_training(entry: str, tmp_path: Path) -> None:
    """Measured at one step, the run of four is the recipe of one step."""
    run = make_runs(2, TINY)[f"ring_{entry}_4step_seed0"]
    perform(run, tmp_path / "runs", tmp_path / "rows.jsonl", "cpu", 1)
    row = read_rows(tmp_path / "rows.jsonl")[run.name]
    for steps in (2, 1):
        single = tmp_path / f"single{steps}"
        levels = f"rollout.timesteps={list(STEPS[steps])}"
        train(load_recipe(ROOT / run.recipe, [*row["overrides"], levels, "train.device=cpu", f"output_dir={single}"]))
        metrics = evaluate_path(single, device="cpu", progress=False)["metrics"]
        assert metrics == {name: row["results"][str(steps)][name] for name in metrics}


@pytest.mark.slow
@pytest.mark.parametrize("entry", [entry.name for entry in ENTRIES if not entry.any_step])
def test_every_entry_trains_on_the_ring(entry: str, tmp_path: Path) -> None:
    runs = make_runs(4, TINY)
    for steps in STEPS:
        name = f"ring_{entry}_{steps}step_seed0"
        if name in runs:
            chain = [runs[n] for n in (runs[name].start, name) if n]
            for run in chain:
                perform(run, tmp_path / "runs", tmp_path / "rows.jsonl", "cpu", 1)
            assert read_rows(tmp_path / "rows.jsonl")[name]["evaluations"] > 0
