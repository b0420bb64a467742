"""Streams samples through metrics in batches, shows progress, and continues an interrupted evaluation."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fastgen.data.files import replace_file
from fastgen.metrics import Metric
from fastgen.run.terminal import progress_bar
from fastgen.sampling.video import stills

KEPT = {2: 2000, 4: 64, 5: 8}  # by tensor rank: how many points, images or videos are kept for the report
SAVE_SECONDS = 20.0  # between two writes of an unfinished evaluation

Draw = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Partial:
    """What an unfinished evaluation has gathered, in one safetensors file next to its results. identity: everything
    that the numbers depend on. A file with another identity is refused."""

    path: Path
    identity: Mapping[str, Any]

    def read(self, metrics: Sequence[Metric], prompts: Sequence[str]) -> int:
        """Restores the metrics and returns how many samples have been measured, 0 without a file. Raises ValueError if
        the file belongs to another evaluation or is damaged."""
        if not self.path.is_file():
            return 0
        try:
            with safe_open(self.path, "pt") as file:
                about = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            count, stored = int(about["count"]), about["identity"]
        except Exception:
            raise ValueError(f"{self.path} cannot be read; remove it to start again") from None
        current = json.loads(json.dumps(self.identity))
        if different := [k for k in dict.fromkeys([*current, *stored]) if current.get(k) != stored.get(k)]:
            raise ValueError(
                f"{self.path} belongs to another evaluation, which differs in {', '.join(different)}; "
                "remove it to start again, or choose another output"
            )
        for metric in metrics:
            prefix = f"{metric.name}/"
            state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            metric.restore(state, prompts[:count])
        return count

    def write(self, metrics: Sequence[Metric], count: int) -> None:
        """Writes the file atomically."""
        tensors = {f"{m.name}/{name}": t.contiguous() for m in metrics for name, t in m.state().items()}
        about = {"count": json.dumps(count), "identity": json.dumps(self.identity)}
        replace_file(self.path, save(tensors, about))


def measure(
    draw: Draw,
    prompts: Sequence[str],
    metrics: Sequence[Metric],
    batch_size: int,
    progress: bool,
    partial: Partial | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Streams draw(start, stop) through the metrics, one sample per prompt. Returns the metrics' values, and the first
    samples for a report.

    With `partial`, what has been gathered is written every SAVE_SECONDS, and after the batch during which an interrupt
    arrives. A later call continues from there, with the same batches and results that are the same to the bit. Raises
    KeyboardInterrupt after an interrupt, and ValueError for samples that are not finite."""
    count = len(prompts)
    done = partial.read(metrics, prompts) if partial else 0
    kept, limit = list[Tensor](), 1
    timed = [(metric, metric.state()) for metric in metrics if done and metric.output == "any"]
    for start, stop in batches(0, done, batch_size):  # the samples for the report are drawn again
        if start >= limit:
            break
        kept.append(stills(samples) if (samples := draw(start, stop)).dim() == 5 else samples)
        limit = KEPT[samples.dim()]
    for metric, state in timed:  # the time of drawing them again does not count
        metric.restore(state, prompts[:done])
    written = time.monotonic()
    with (
        progress_bar(count, "sampling", "sample", initial=done, enabled=progress) as bar,
        stopping() if partial else nullcontext(lambda: False) as asked,
    ):
        for start, stop in batches(done, count, batch_size):
            samples = finite(draw(start, stop), start)
            for metric in metrics:
                metric.update(samples, prompts[start:stop])
            if start < KEPT[samples.dim()]:
                kept.append(stills(samples) if samples.dim() == 5 else samples)
            bar.update(stop - start)
            if partial and stop < count and (asked() or time.monotonic() - written > SAVE_SECONDS):
                partial.write(metrics, stop)
                written = time.monotonic()
            if asked() and stop < count:
                raise KeyboardInterrupt
    first, values = torch.cat(kept), dict[str, float]()
    with progress_bar(len(metrics), "measuring", "metric", enabled=progress) as bar:
        for metric in metrics:
            bar.set_postfix_str(metric.name)
            values |= metric.compute()
            bar.update()
    return values, first[: KEPT[first.dim()]]


def batches(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def finite(samples: Tensor, start: int) -> Tensor:
    if not bool(samples.isfinite().all()):
        raise ValueError(
            f"samples {start} to {start + len(samples) - 1} are not all finite: the weights have diverged"
        )
    return samples


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Inside this context, the first SIGINT or SIGTERM is only noted, so that the batch can finish. A second one acts
    as usual. Yields a function that returns whether a signal was noted. In a thread other than the main one, signals
    cannot be caught, and the function always returns False."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        for s, handler in before.items():
            signal.signal(s, handler)

    for s in before:
        signal.signal(s, note)
    try:
        yield lambda: bool(seen)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
