"""What a run logs: log.jsonl, its trackers, warnings.log, and the few numbers of the progress bar."""

import json
import resource
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.data.files import replace_file
from fastgen.run.trackers import Trackers


class RunLog:
    """Averages the terms of every turn between two writes. A run that continues from `step` first drops the rows that
    were logged after that step, and rows that a kill or a full disk has torn, so that the file has one consistent
    history. Disabled on all processes but the first. trackers: those of `train.trackers`."""

    def __init__(self, folder: Path, step: int, enabled: bool, trackers: Sequence[str] = ("tensorboard",)):
        self.enabled = enabled
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._path = folder / "log.jsonl"
        self._seconds: list[float] = []  # of the updates since the last row
        self._warm = False  # whether the first update, which also warms up, has been left out
        if enabled:
            rows = self._path.read_text(errors="replace").splitlines() if self._path.is_file() else []
            kept = [row for row in rows if 0 <= step_of(row) <= step]
            if kept != rows:
                replace_file(self._path, "".join(row + "\n" for row in kept))
            self._trackers = Trackers(trackers, folder, step)

    def add(self, turn: str, terms: Mapping[str, Tensor]) -> None:
        """Adds the terms of one update. They stay on their device until they are written."""
        for name, value in terms.items():
            self._sums[f"{turn}/{name}"].append(value.detach())

    def took(self, seconds: float) -> None:
        """Adds the wall time of one step: all turns of a student update, without pictures, evaluations and
        checkpoints."""
        self._seconds.append(seconds)

    @property
    def waiting(self) -> bool:
        """Whether there were updates since the last row."""
        return bool(self._seconds)

    def means(self) -> dict[str, float]:
        """The mean terms since the last row, with the fake score's lag (`signals.lag_terms`) where its parts are."""
        means = {name: torch.stack(values).mean().item() for name, values in self._sums.items()}
        turns = [name.removesuffix("/score_gap") for name in means if name.endswith("/score_gap")]
        for turn in turns:
            means[f"{turn}/fake_lag"] = means[f"{turn}/fake_error"] / max(means[f"{turn}/score_gap"], 1e-12)
        return means

    def warn(self, step: int, message: str) -> None:
        """Appends a warning to warnings.log."""
        if self.enabled:
            with (self._path.parent / "warnings.log").open("a") as file:
                file.write(f"step {step}: {message}\n")

    def write(self, step: int, optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, str]:
        """Writes one row: mean terms, learning rates, seconds per step, memory, and the network evaluations per
        sample, summed over all updates since the last row. Returns what the progress bar shows.

        seconds_per_step is the mean of `took`. It leaves out the first update of a program, which also compiles and
        fills caches, unless the row has no other."""
        row = self.means()
        row["evaluations"] = sum(float(sum(v)) for name, v in self._sums.items() if name.endswith("/evaluations"))
        self._sums.clear()
        row |= {f"lr/{role}": optimizer.param_groups[0]["lr"] for role, optimizer in optimizers.items()}
        timed = self._seconds if self._warm else self._seconds[1:] or self._seconds
        row["seconds_per_step"] = sum(timed) / len(timed)
        row["memory_mb"] = memory_mb()
        self._seconds, self._warm = [], True
        self.record(step, row)
        return {name: f"{row[name]:.3g}" for name in row if name.endswith(("/loss", "/fake_lag"))}

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a row as given to log.jsonl and the trackers."""
        if not self.enabled:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | dict(values)) + "\n")
        self._trackers.record(step, values)

    def describe(self, recipe: Mapping[str, Any]) -> None:
        """Tells the trackers what is trained."""
        if self.enabled:
            self._trackers.describe(recipe)

    def picture(self, step: int, name: str, path: Path, prompts: Sequence[str] = ()) -> None:
        """Gives a picture, a PNG file, to the trackers, with the prompts of its parts."""
        if self.enabled:
            self._trackers.picture(step, name, path, prompts)

    def close(self) -> None:
        if self.enabled:
            self._trackers.finish()


@contextmanager
def run_log(folder: Path, step: int, enabled: bool, trackers: Sequence[str]) -> Iterator[RunLog]:
    """A log that is closed, with all its rows in the trackers, however the block ends."""
    log = RunLog(folder, step, enabled, trackers)
    try:
        yield log
    except BaseException:
        with suppress(OSError):  # of a full disk, which is what ended the block
            log.close()
        raise
    log.close()


def step_of(row: str) -> int:
    """The step of a row of log.jsonl; -1 if the row is torn."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def memory_mb() -> float:
    """Peak memory in MB, of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
