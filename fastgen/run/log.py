"""What a run logs: log.jsonl, TensorBoard events, warnings.log, and the few numbers of the progress bar."""

import json
import resource
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastgen.data.files import replace_file


class RunLog:
    """Averages the terms of every turn between two writes. A run that continues from `step` first drops the rows that
    were logged after that step, and rows that a kill or a full disk has torn, so that the file has one consistent
    history. Disabled on all processes but the first."""

    def __init__(self, folder: Path, step: int, enabled: bool):
        self.enabled = enabled
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._path = folder / "log.jsonl"
        self._start, self._last_step = time.perf_counter(), step
        if enabled:
            rows = self._path.read_text(errors="replace").splitlines() if self._path.is_file() else []
            kept = [row for row in rows if 0 <= step_of(row) <= step]
            if kept != rows:
                replace_file(self._path, "".join(row + "\n" for row in kept))
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, turn: str, terms: Mapping[str, Tensor]) -> None:
        """Adds the terms of one update. They stay on their device until they are written."""
        for name, value in terms.items():
            self._sums[f"{turn}/{name}"].append(value.detach())

    def means(self) -> dict[str, float]:
        """The mean terms since the last row."""
        return {name: torch.stack(values).mean().item() for name, values in self._sums.items()}

    def warn(self, step: int, message: str) -> None:
        """Appends a warning to warnings.log."""
        if self.enabled:
            with (self._path.parent / "warnings.log").open("a") as file:
                file.write(f"step {step}: {message}\n")

    def write(self, step: int, optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, str]:
        """Writes one row: mean terms, learning rates, seconds per step, memory, and the network evaluations per
        sample, summed over all updates since the last row. Returns what the progress bar shows."""
        row = self.means()
        row["evaluations"] = sum(float(sum(v)) for name, v in self._sums.items() if name.endswith("/evaluations"))
        self._sums.clear()
        row |= {f"lr/{role}": optimizer.param_groups[0]["lr"] for role, optimizer in optimizers.items()}
        now = time.perf_counter()
        row["seconds_per_step"] = (now - self._start) / max(step - self._last_step, 1)
        row["memory_mb"] = memory_mb()
        self._start, self._last_step = now, step
        self.record(step, row)
        return {name: f"{row[name]:.3g}" for name in row if name.endswith(("/loss", "/fake_lag"))}

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a row as given to log.jsonl and TensorBoard."""
        if not self.enabled:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | dict(values)) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.enabled:
            self._board.close()


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
