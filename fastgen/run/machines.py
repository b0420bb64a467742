"""What has to be the same on all machines of a run, and would otherwise be found by its results: the recipe, the data,
the folder that is written into, and what is there already."""

import socket
import time
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from fastgen.registry import RecipeError

PATIENCE = 60.0  # seconds; ours. A network file system may show a new file to other machines only after a while


def check_alike(accelerator: Accelerator, values: Mapping[str, str]) -> None:
    """values: name in words -> text. Raises RecipeError on all processes, naming machines, if a text of any process
    differs from that of the first. All processes call this together."""
    if accelerator.num_processes == 1:
        return
    told = gather_object([(socket.gethostname(), dict(values))])
    for name in values:
        others = {f"process {i} on {host}" for i, (host, its) in enumerate(told) if its[name] != told[0][1][name]}
        if others:
            raise RecipeError(
                f"{name} of {', '.join(sorted(others))} is not that of the first process, on {told[0][0]}; give all "
                "machines the same files, and start them with the same command"
            )


def check_shared(accelerator: Accelerator, path: Path, key: str) -> None:
    """Checks that a file which the first process has just written is seen by all processes, which call this together.
    Raises RecipeError on all of them, naming the machines that see another folder. key: what messages call it."""
    if accelerator.num_processes == 1:
        return
    wanted = gather_object([content(path)])[0]
    end = time.monotonic() + PATIENCE
    while not (seen := content(path) == wanted) and time.monotonic() < end:
        time.sleep(0.5)
    told = gather_object([(socket.gethostname(), seen)])
    if others := sorted({host for host, sees in told if not sees}):
        raise RecipeError(
            f"{key}: {path.parent} on {', '.join(others)} is not the folder that the first process, on {told[0][0]}, "
            "writes into; choose a folder on a file system that all machines share"
        )


def content(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
