"""Trains every objective on the ring and on the digits under one budget, and writes the tables and plots of report.md.

    python benchmarks/leaderboard/leaderboard.py --plan      # what is left to run, and the CPU hours it should take
    python benchmarks/leaderboard/leaderboard.py             # all of it; started again, it goes on where it was
    python benchmarks/leaderboard/leaderboard.py --only dmd2 --task ring
    python benchmarks/leaderboard/leaderboard.py --jobs 14 --device cuda --deadline 3000
    python benchmarks/leaderboard/leaderboard.py --report    # the tables and plots again, from the rows that are there

--only takes the runs whose name contains it, and the runs they start from. Every run is a process of one thread. It
trains a recipe as `fastgen train` does, from its last checkpoint if there is one, measures it as `fastgen eval` does,
and adds one row to rows.jsonl. A row that is there is not run again. The option --updates and `key=value` overrides
are for trials, whose rows belong in a table of their own (--rows FILE); their page is written beside that table."""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.leaderboard.entries import BUDGETS, STEPS, TASKS, Run, make_runs
from benchmarks.rows import append_row, read_rows, sort_rows

ROOT = Path(__file__).resolve().parents[2]
ROWS = Path(__file__).resolve().with_name("rows.jsonl")
TEACHER_STEPS = (50, 4, 2, 1)
GRACE = 20.0  # the seconds a run has to end when it is asked to


# --- one run, in its own process


def perform(run: Run, runs: Path, rows: Path, device: str, jobs: int) -> None:
    """Trains (or continues) a run, measures it, and adds its row to the table `rows`."""
    from fastgen.config import load_recipe
    from fastgen.train import train

    recipe = load_recipe(ROOT / run.recipe, launched(run, runs, device))
    folder = runs / run.name
    if not (folder / "export").is_dir():
        train(recipe)
    results = {str(steps): measure(folder, steps, recipe, device) for steps in run.measured}
    record = {
        "name": run.name,
        "entry": run.entry.name,
        "task": run.task,
        "steps": run.steps,
        "seed": run.seed,
        "start": run.start,
        "recipe": run.recipe,
        "overrides": list(run.overrides),
        "results": results,
        **costs(folder, recipe, run, device),
        "cpu_seconds": cpu_seconds(),
        "jobs": jobs,
        **machine(device),
    }
    append_row(rows, record)


def launched(run: Run, runs: Path, device: str) -> list[str]:
    """The overrides that `fastgen train` gets."""
    start = [f"init_from={runs / run.start}"] if run.start else []
    return [*run.overrides, *start, f"train.device={device}", f"output_dir={runs / run.name}"]


def measure(folder: Path, steps: int, recipe: Any, device: str) -> dict[str, float]:
    """What `fastgen eval` gives for a run at this number of steps, and the reward of its first samples on the ring.

    A student of any number of steps is measured with other time levels than it was exported with."""
    from fastgen.evaluation.evaluate import evaluate_with_samples
    from fastgen.sampling.sampler import load_sampler

    sampler = load_sampler(folder, device=device)
    sampler.policy = dataclasses.replace(sampler.policy, timesteps=STEPS[steps])
    row, samples = evaluate_with_samples(sampler, recipe.eval, progress=False)
    return row["metrics"] | point_reward(samples) | {"network_evaluations": sampler.network_evaluations}


def point_reward(samples: Any) -> dict[str, float]:
    """The ring's reward, which is half of x, of the samples that an evaluation returns. Pictures have none."""
    return {"linear": float(samples[:, 0].mean()) / 2} if samples.dim() == 2 else {}


def costs(folder: Path, recipe: Any, run: Run, device: str) -> dict[str, float]:
    """What the training cost according to its log: seconds of wall time for each student update, all evaluations of
    networks, and the peak of memory."""
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    logged = [row for row in logged if "seconds_per_step" in row]
    steps = [b - a for a, b in zip([0, *(r["step"] for r in logged)], [r["step"] for r in logged], strict=False)]
    updates = run_updates(recipe)
    seconds = sum(row["seconds_per_step"] * n for row, n in zip(logged, steps, strict=True))
    samples = sum(row["evaluations"] for row in logged) + pair_evaluations(recipe, recipe.train.steps)
    found = {"updates": updates, "seconds_per_update": seconds / updates}
    found["evaluations"] = round(samples * recipe.train.batch_size)
    if device == "cuda":
        return found | {"peak_mb": logged[-1]["memory_mb"]}
    return found | ({"peak_mb": peak_memory(run) / 1e6} if run.seed == 0 else {})


def run_updates(recipe: Any) -> int:
    """The updates of the student. Those in which DisBack degrades its teacher do not count."""
    return recipe.train.steps - getattr(recipe.objective, "degradation", 0)


def pair_evaluations(recipe: Any, updates: int) -> float:
    """The teacher's evaluations for ODE pairs, divided by the batch size. The ring's pairs are made for every batch,
    those of the digits once."""
    if "pairs" not in recipe.objective.needs:
        return 0.0
    if recipe.data.name == "mixture":
        turns = recipe.objective.turns(0, recipe.objective.init_state())
        return recipe.data.pair_steps * updates * sum(turn.updates for turn in turns)
    return recipe.data.pairs.count * recipe.data.pairs.steps / recipe.train.batch_size


def peak_memory(run: Run) -> int:
    """The bytes of live tensors at the peak of an update, in the turn where it is largest (see peak_memory.py)."""
    from benchmarks.peak_memory import measure as peaks
    from fastgen.config import load_recipe

    quick = ["backbone.fit_steps=0"] if run.task == "ring" else []
    pairs = ["data.pairs={count: 64, steps: 1}"] if any("data.pairs" in o for o in run.overrides) else []
    recipe = load_recipe(ROOT / run.recipe, [*run.overrides, *quick, *pairs, "output_dir=unused"])
    return max(peaks(recipe)[0].values())


def perform_teacher(task: str, rows: Path, device: str) -> None:
    """Measures the teacher without guidance, under the same evaluation as the students."""
    import torch

    from fastgen.config import load_recipe
    from fastgen.evaluation.evaluate import evaluate_with_samples
    from fastgen.sampling.sampler import teacher_sampler

    run = next(run for run in make_runs().values() if run.task == task)
    recipe = load_recipe(ROOT / run.recipe, [*run.overrides, "output_dir=unused"])
    backbone = recipe.backbone.build(torch.device(device), torch.float32, 0)
    results = {}
    for steps in TEACHER_STEPS:
        sampler = teacher_sampler(backbone, steps, 1.0)
        row, samples = evaluate_with_samples(sampler, recipe.eval, progress=False)
        results[str(steps)] = row["metrics"] | point_reward(samples)
    append_row(rows, {"name": f"{task}_teacher", "task": task, "results": results, **machine(device)})


def cpu_seconds() -> float:
    """What this process used. Of a run that was killed and continued, only the last part is counted."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def machine(device: str) -> dict[str, str]:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {"device": name, "commit": commit.stdout.strip()}


def follow() -> None:
    """Ends this process when the one that started it is gone, so that nothing trains on when that is started again."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- what is left to do


def needed(runs: Mapping[str, Run], only: str, tasks: Sequence[str], rows: Path, folder: Path) -> list[str]:
    """The names of what is left to do: teachers and runs without a row, and runs whose row is there but whose folder
    is gone, if another run starts from them. Raises ValueError for a row that was made with other values."""
    found = read_rows(rows)
    names = [f"{task}_teacher" for task in tasks if only in f"{task}_teacher" and f"{task}_teacher" not in found]
    for run in reversed(list(runs.values())):  # what others start from comes after them
        if run.task not in tasks:
            continue
        row = found.get(run.name)
        if row is not None and row["overrides"] != list(run.overrides):
            raise ValueError(
                f"the row {run.name} in {rows} was made with other values than now; delete its line, and the folder "
                f"{folder / run.name}"
            )
        asked = only in run.name and row is None
        started_from = any(runs[name].start == run.name for name in names if name in runs)
        if asked or (started_from and not (folder / run.name / "export").is_dir()):
            names.append(run.name)
    return names


# --- many runs


@dataclasses.dataclass
class Pool:
    """Runs as processes of one thread, at most `jobs` at a time. Without a GPU they are forked from a process that has
    done the imports.

    work: what a process does with the name of a run. It can be pickled, and sets the exit code by sys.exit."""

    jobs: int
    logs: Path
    work: Callable[[str], None]
    method: str = "forkserver"
    running: dict[str, BaseProcess] = dataclasses.field(default_factory=dict)

    def start(self, name: str) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context(self.method)
        context.set_forkserver_preload(["fastgen.train", "fastgen.evaluation.evaluate"])
        self.running[name] = context.Process(target=logged, args=(self.logs / f"{name}.log", self.work, name))  # type: ignore[attr-defined]
        self.running[name].start()

    def ended(self) -> dict[str, int]:
        """The names of the runs that have ended, and their exit codes."""
        codes = {name: process.exitcode for name, process in self.running.items()}
        found = {name: code for name, code in codes.items() if code is not None}
        for name in found:
            del self.running[name]
        return found

    def stop(self) -> None:
        """Asks all runs to end, and kills those that do not. A checkpoint that is there is complete all the same."""
        for process in self.running.values():
            process.terminate()
        limit = time.monotonic() + GRACE
        for process in self.running.values():
            process.join(max(0.0, limit - time.monotonic()))
            process.kill()
            process.join()
        self.running.clear()


def logged(log: Path, work: Callable[[str], None], name: str) -> None:
    """What a run's process does: what it prints goes to a file, and it ends when the process that started it is
    gone."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    follow()
    work(name)


def perform_named(name: str, given: argparse.Namespace) -> None:
    """Does a run, or measures a teacher where the name is `<task>_teacher`."""
    runs = make_runs(given.updates, given.overrides)
    if name in runs:
        perform(runs[name], given.runs.absolute(), given.rows.absolute(), given.device, given.jobs)
    else:
        perform_teacher(name.removesuffix("_teacher"), given.rows.absolute(), given.device)


def run_all(names: list[str], runs: Mapping[str, Run], pool: Pool, deadline: float) -> bool:
    """Does all runs, the longest first, but each after the run it starts from. Returns False if a run failed or if
    time was up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    left = sorted(names, key=lambda n: -runs[n].seconds if n in runs else 0.0)
    failed, end = list[str](), time.monotonic() + deadline
    try:
        while left or pool.running:
            if time.monotonic() >= end:
                print(f"time is up: {len(pool.running)} runs ended early, {len(left)} not begun")
                return False
            for name, code in pool.ended().items():
                print(f"{name}: {'done' if code == 0 else f'failed, see {pool.logs / name}.log'}", flush=True)
                failed += [name] * (code != 0)
            left = [name for name in left if not lost(name, runs, failed)]
            waiting = {*left, *pool.running}
            ready = [n for n in left if n not in runs or runs[n].start not in waiting]
            for name in ready[: pool.jobs - len(pool.running)]:
                left.remove(name)
                pool.start(name)
            time.sleep(0.2)
    finally:
        pool.stop()
    return not failed


def lost(name: str, runs: Mapping[str, Run], failed: list[str]) -> bool:
    """Whether a run cannot begin because the run it starts from has failed. It then counts as failed, too."""
    if name in runs and runs[name].start in failed:
        failed.append(name)
        print(f"{name}: not begun, as {runs[name].start} failed")
        return True
    return False


def print_plan(names: Sequence[str], runs: Mapping[str, Run]) -> None:
    """Prints what is left to do, and how long it should take on one core."""
    for task in TASKS:
        chosen = [runs[n] for n in names if n in runs and runs[n].task == task]
        hours = sum(run.seconds for run in chosen) / 3600
        each = f" of {chosen[0].updates} updates of {BUDGETS[task].batch} samples" if chosen else ""
        print(f"{task}: {len(chosen)} runs{each}, {hours:.2f} CPU hours")
    print(f"all: {sum(runs[n].seconds for n in names if n in runs) / 3600:.2f} CPU hours")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value, for trials; comes after a run's own")
    parser.add_argument("--only", default="", help="runs whose name contains this, and their starts")
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--plan", action="store_true", help="say what is left to do, and stop")
    parser.add_argument("--report", action="store_true", help="write the table and plots, and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/leaderboard", help="where the runs are kept")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the table; the page is written beside it")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds, after which all runs are ended")
    parser.add_argument("--updates", type=int, help="instead of the budget's, for trials")
    given = parser.parse_args(argv)
    if (given.overrides or given.updates) and given.rows == ROWS:
        parser.error("a trial needs a table of its own for its rows: --rows FILE")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    runs, folder, rows = make_runs(given.updates, given.overrides), given.runs.absolute(), given.rows.absolute()
    try:
        names = needed(runs, given.only, [given.task] if given.task else TASKS, rows, folder)
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    if given.plan:
        print_plan(names, runs)
        return 0
    held = True
    if not given.report:
        search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(search)}  # of what it starts
        method = "spawn" if given.device == "cuda" else "forkserver"
        pool = Pool(given.jobs, folder / "logs", partial(perform_named, given=given), method)
        held = run_all(names, runs, pool, given.deadline)
        sort_rows(rows)
    from benchmarks.leaderboard.report import write_report

    write_report(rows)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
