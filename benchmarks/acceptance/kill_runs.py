"""Kills a training with SIGKILL again and again, and compares what comes out with an uninterrupted run, to the bit.

    python benchmarks/acceptance/kill_runs.py --kills 10 --kills-while-saving 3

The cases are the digits and a mixture, each trained in full and by LoRA. A kill comes at a random moment between the
first checkpoint and the end; those that count as "while saving" come when a checkpoint is half written
(die_while_saving.py). Every case is one row of kills.jsonl, and the program fails if any row there is not identical to
the bit, or if a kill of it did not happen."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safetensors.torch import load_file

from benchmarks.rows import append_row, read_rows, sort_rows

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "fastgen/train.py"
DIE_WHILE_SAVING = Path(__file__).resolve().with_name("die_while_saving.py")
ROWS = Path(__file__).resolve().with_name("kills.jsonl")
LORA = "lora={student: {rank: 4}, fake_score: {rank: 4}}"
QUIET = ["train.sample_every=0", "train.eval_every=0", "eval.quick_num_samples=20", "eval.teacher_steps=[2]"]
CASES = {  # name -> recipe and overrides
    "mixture": (
        "recipes/mixture_dmd2_4step.yaml",
        ["train.steps=600", "train.checkpoint_every=10", "train.batch_size=32", "backbone.fit_steps=200"],
    ),
    "digits": (
        "recipes/digits_dmd2_4step.yaml",
        [
            "train.steps=60",
            "train.checkpoint_every=2",
            "train.batch_size=4",
            "train.num_samples=4",
            "health.num_samples=4",
            "eval.metrics=[throughput]",
        ],
    ),
}


def start(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """Starts or continues a training as a process of its own. What it prints is added to a log beside the folder.
    command: the program, the recipe and its overrides."""
    log = (folder.parent / f"{folder.name}.log").open("ab")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, *command, f"output_dir={folder}"]
    return subprocess.Popen(whole, cwd=ROOT, stdout=log, stderr=log, env=environment)


def steps_done(folder: Path) -> int:
    """The step of the newest complete checkpoint, or 0 if there is none."""
    found = [f.name for f in (folder / "checkpoints").glob("step_*") if not f.name.endswith(".partial")]
    return max((int(name.removeprefix("step_")) for name in found), default=0)


def half_written(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step_????????.partial"))


def kill_between(folder: Path, run: list[str], moment: int, last: int) -> bool:
    """Starts or continues the run, and kills it within half a second after the checkpoint of step `moment`, or at that
    of step `last` if it is faster. Returns False if the run came to its end first."""
    process = start(folder, str(TRAIN), *run)
    delay, since = random.uniform(0, 0.5), None
    while process.poll() is None:
        done, now = steps_done(folder), time.monotonic()
        since = now if since is None and done >= moment else since
        if since is not None and (now - since >= delay or done >= last):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return process.returncode == -signal.SIGKILL
        time.sleep(0.0005)
    return False


def kill_while_saving(folder: Path, run: list[str], moment: int) -> bool:
    """Starts or continues the run, which kills itself while it writes the first checkpoint after step `moment`.
    Returns whether it did, and has left that checkpoint half written."""
    process = start(folder, str(DIE_WHILE_SAVING), str(moment), str(random.randrange(2**31)), *run)
    return process.wait() == -signal.SIGKILL and half_written(folder)


def same_bits(one: Path, other: Path) -> bool:
    """Whether the last checkpoints and the exports of two runs hold the same tensors."""
    last = max((one / "checkpoints").glob("step_????????")).name
    folders = [(f / "checkpoints" / last, f / "export") for f in (one, other)]
    files = sorted(p.relative_to(d) for d in folders[0] for p in d.rglob("*.safetensors"))
    again = sorted(p.relative_to(d) for d in folders[1] for p in d.rglob("*.safetensors"))
    if files != again:
        return False
    for mine, theirs in zip(folders[0], folders[1], strict=True):
        for path in mine.rglob("*.safetensors"):
            a, b = load_file(path), load_file(theirs / path.relative_to(mine))
            if a.keys() != b.keys() or not all(a[k].equal(b[k]) for k in a):
                return False
    return True


def run_case(name: str, recipe: str, overrides: list[str], kills: int, saving: int, folder: Path) -> dict[str, object]:
    """Runs a case once without a kill and once with all of them. Returns its row, without the name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole, killed = folder / "whole", folder / "killed"
    run = [recipe, *overrides]
    if start(whole, str(TRAIN), *run).wait():
        raise SystemExit(f"{name}: the uninterrupted run failed; see {folder / 'whole.log'}")
    total = steps_done(whole)
    every = next(int(o.split("=")[1]) for o in overrides if o.startswith("train.checkpoint_every"))
    last = total - 3 * every  # a run that is killed there still has checkpoints to write
    moments = sorted(random.randrange(every, last, every) for _ in range(kills))
    chosen = set(random.sample(range(kills), saving))
    done = []
    for i, drawn in enumerate(moments):
        moment = max(drawn, steps_done(killed))
        saving_now = i in chosen
        happened = kill_while_saving(killed, run, moment) if saving_now else kill_between(killed, run, moment, last)
        done.append({"after_step": steps_done(killed), "while_saving": saving_now, "killed": happened})
    if start(killed, str(TRAIN), *run).wait():
        raise SystemExit(f"{name}: continuing failed; see {folder / 'killed.log'}")
    row = {"kills": done, "bit_identical": same_bits(whole, killed), "steps": total}
    print(name, json.dumps(row))
    return row


def holds(row: Mapping[str, Any]) -> bool:
    return row["bit_identical"] and all(kill["killed"] for kill in row["kills"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="for each case")
    parser.add_argument("--kills-while-saving", type=int, default=3, help="how many of them come while saving")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments of the kills")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/kills", help="where the runs are kept")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the table that gets the rows")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    kills, saving = arguments.kills, arguments.kills_while_saving
    for case, (recipe, overrides) in CASES.items():
        for suffix, extra in (("", []), ("_lora", [LORA])):
            name = case + suffix
            if arguments.only not in name:
                continue
            folder, chosen = arguments.folder / name, [*QUIET, *overrides, *extra]
            append_row(arguments.rows, {"name": name, **run_case(name, recipe, chosen, kills, saving, folder)})
    sort_rows(arguments.rows)
    return 0 if all(map(holds, read_rows(arguments.rows).values())) else 1


if __name__ == "__main__":
    sys.exit(main())
