"""Trains like fastgen/train.py, and dies of SIGKILL while it writes a checkpoint.

    python benchmarks/acceptance/die_while_saving.py STEP SEED RECIPE [KEY=VALUE ...]

STEP: the checkpoint that is not finished is the first of a later step.  SEED: decides how far its writing gets, from
the first file to the moment before the folder gets its name. Python says by audit events which files are opened and
renamed, so that the kill comes while the checkpoint is half written however busy the machine is."""

import os
import random
import re
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HALF_WRITTEN = re.compile(r"step_(\d{8})\.partial(?=/|$)")
FILES = 6  # of a checkpoint, at least
LONGEST = 0.005  # seconds from the opening of a file to the kill


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_saving(step: int, draw: random.Random) -> None:
    """Arms the kill: a short time after a drawn file of the checkpoint was opened, or when the folder is renamed."""
    file, wait = draw.randrange(FILES), draw.uniform(0, LONGEST)
    opened = set[str]()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in ("open", "os.rename") or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        found = HALF_WRITTEN.search(str(path))
        if found is None or int(found[1]) <= step:
            return
        if event == "os.rename":
            die()
        opened.add(str(path))
        if len(opened) == file + 1:
            threading.Thread(target=lambda: (time.sleep(wait), die()), daemon=True).start()

    sys.addaudithook(hook)


if __name__ == "__main__":
    step, seed, *arguments = sys.argv[1:]
    die_while_saving(int(step), random.Random(int(seed)))
    sys.argv = [str(ROOT / "fastgen/train.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
