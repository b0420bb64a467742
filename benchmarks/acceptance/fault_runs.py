"""Puts faults on a training at seeded moments, and compares what comes out with an uninterrupted run, to the bit.

    python benchmarks/acceptance/fault_runs.py --faults 5

Every kind of fault (faults.py) has a run of its own. The same command is started again and again, each time with one
fault. After each, the newest checkpoint must be whole, and the program must not have ended in a traceback. When all
faults have come, the command is run to its end: its last checkpoint and its export must be those of the uninterrupted
run, and its folder must hold the same files. A run that ends before its fault comes is compared and begun again.

Every kind is one row of faults.jsonl, with the counts of how the program ended. File systems are mounted in a
namespace of this program (`unshare -rm`). Where the machine forbids that, their kinds are left out, and that is said.
Every start is a process of its own, forked from this one, which has imported the libraries once."""

import argparse
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.acceptance.faults import DISK, KINDS, MOUNTED, Fault, Operations, Scale, mount
from benchmarks.acceptance.kill_runs import same_bits
from benchmarks.rows import append_row, read_rows, sort_rows
from fastgen.run import checkpoint
from fastgen.train import main as train

ROOT = Path(__file__).resolve().parents[2]
ROWS = Path(__file__).resolve().with_name("faults.jsonl")
COMMAND = [
    str(ROOT / "recipes/mixture_dmd2_4step.yaml"),
    "backbone.fit_steps=0",
    "backbone.width=16",
    "train.device=cpu",
    "train.batch_size=32",
    "train.log_every=5",
    "train.sample_every=10",
    "train.checkpoint_every=3",
    "health.every=10",
    "eval.num_samples=400",
    "eval.quick_num_samples=400",
    "eval.teacher_steps=[2]",
]
NAMESPACE = ["unshare", "-rm"]  # begins a command that may mount


@dataclass(frozen=True)
class Ended:
    """How a process ended. code: negative for a signal. came: whether the fault came before the end."""

    code: int
    text: str
    came: bool
    operations: int

    @property
    def outcome(self) -> str:
        if "Traceback" in self.text:
            return "traceback"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        return {0: "finished", 1: "stopped in words", 2: "refused in words"}.get(self.code, "ended as asked to")


def start(arguments: list[str], fault: Fault) -> Ended:
    """Trains in a process of its own, with a fault."""
    fault.before()
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)  # holds all that a run prints
    pid = os.fork()
    if pid == 0:
        run_child(arguments, fault, writer)
    os.close(writer)
    began, waiting, ended, status = time.monotonic(), list(fault.moments), 0, 0
    while not ended:
        while waiting and time.monotonic() - began >= waiting[0][0]:
            waiting.pop(0)[1](pid)
        time.sleep(0.002)
        ended, status = os.waitpid(pid, os.WNOHANG)
    with os.fdopen(reader, errors="replace") as output:
        text = output.read()
    fault.after()
    counted = re.search(r"^(\d+) file operations$", text, re.MULTILINE)
    operations = int(counted[1]) if counted else 0
    came = len(waiting) < len(fault.moments) if fault.moments else not counted or operations > fault.operation
    return Ended(os.waitstatus_to_exitcode(status), text, came, operations)


def run_child(arguments: list[str], fault: Fault, writer: int) -> None:
    """Trains in this process, which is a fork, and ends it."""
    code = 1
    try:
        os.setsid()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        operations = Operations(fault.operation, fault.act)
        fault.inside()
        code = train(arguments)
        print(f"\n{operations.seen} file operations")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def check_folder(folder: Path) -> list[str]:
    """What is wrong with a run folder after a fault."""
    wrong = []
    if found := checkpoint.complete(folder / "checkpoints"):
        try:
            checkpoint.verify(found[-1])
        except checkpoint.CheckpointError as error:
            wrong.append(str(error))
    if (folder / "export").is_dir() and not (folder / "export/fastgen.json").is_file():
        wrong.append("the export is not complete")
    return wrong


def names(folder: Path) -> set[str]:
    """The files of a run that do not depend on when it was started and asked to end. Those that do are TensorBoard's,
    one per start, and the checkpoints before the last."""
    earlier = {f"checkpoints/{path.name}" for path in checkpoint.complete(folder / "checkpoints")[:-1]}
    files = {p.relative_to(folder) for p in folder.rglob("*") if not p.is_dir()}
    return {str(file) for file in files if file.parts[0] != "tensorboard" and str(file.parent) not in earlier}


def compare(whole: Path, folder: Path) -> list[str]:
    """What differs between the uninterrupted run and one with faults."""
    wrong = [] if same_bits(whole, folder) else ["the weights differ"]
    if differing := sorted(names(whole) ^ names(folder)):
        wrong.append(f"only one of the two runs has {', '.join(differing[:6])}")
    return wrong


def measure(arguments: list[str], folder: Path) -> Scale:
    """Makes the uninterrupted run. Returns its size."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    ended = start(arguments, Fault())
    if ended.code:
        raise SystemExit(f"the uninterrupted run failed:\n{ended.text}")
    largest = max(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return Scale(time.monotonic() - began, ended.operations, largest)


def run_kind(kind: str, steps: int, faults: int, seed: int, whole: Path, scale: Scale, folder: Path) -> dict[str, Any]:
    """A run with this many faults of one kind. Returns its row, without the name."""
    arguments = command(steps, folder / "run")
    draw, outcomes, wrong, compared = random.Random(f"{seed} {kind}"), Counter[str](), list[str](), 0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if kind in MOUNTED:
        mount(folder, f"size={DISK}")
    while outcomes.total() < faults:
        ended = start(arguments, KINDS[kind](draw, scale, folder))
        wrong += check_folder(folder / "run")
        if ended.outcome == "traceback":
            wrong.append(ended.text[ended.text.rindex("Traceback") :])
        if ended.came or ended.outcome != "finished":
            outcomes[ended.outcome] += 1
        if not ended.came and ended.outcome != "finished":
            wrong.append(f"before any fault: {ended.text[-500:]}")
        if ended.outcome == "finished":
            wrong += compare(whole, folder / "run")
            shutil.rmtree(folder / "run")
            compared += 1
    ended = start(arguments, Fault())
    wrong += [ended.text] if ended.code else compare(whole, folder / "run")
    return {"outcomes": dict(sorted(outcomes.items())), "runs_compared": compared + 1, "wrong": wrong}


def command(steps: int, folder: Path) -> list[str]:
    return [*COMMAND, f"train.steps={steps}", f"output_dir={folder}"]


def may_mount() -> bool:
    return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=5, help="of each kind")
    parser.add_argument("--steps", type=int, default=30, help="updates of a run")
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments of the faults")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/faults", help="where the runs are kept")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the table that gets the rows")
    parser.add_argument("--in-namespace", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    mounting = chosen.in_namespace
    whole = chosen.folder / "whole"
    scale = measure(command(chosen.steps, whole), whole)
    print(f"an uninterrupted run takes {scale.seconds:.1f} s and {scale.operations} file operations")
    for kind in [kind for kind in KINDS if chosen.only in kind]:
        if kind in MOUNTED and not mounting:
            print(f"{kind}: left out, because this machine does not let a user mount a file system (unshare -rm)")
            continue
        row = run_kind(kind, chosen.steps, chosen.faults, chosen.seed, whole, scale, chosen.folder / kind)
        print(kind, json.dumps(row), flush=True)
        append_row(chosen.rows, {"name": kind, **row})
    sort_rows(chosen.rows)
    return 1 if any(row["wrong"] for row in read_rows(chosen.rows).values()) else 0


if __name__ == "__main__":
    if "--in-namespace" not in sys.argv and may_mount():
        os.execvp(NAMESPACE[0], [*NAMESPACE, sys.executable, *sys.argv, "--in-namespace"])
    sys.exit(main())
