"""Streaming samples through metrics: a batch at a time, with progress, continued where it was interrupted."""

import json
import os
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
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from fastgen.metrics import Metric
from fastgen.sampling.video import stills

KEPT = {2: 2000, 4: 64, 5: 8}  # by their dimensions, the points, images or videos an evaluation returns for the report
SAVE_SECONDS = 20.0  # between two writes of what has been gathered

Draw = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Partial:
    """What an unfinished evaluation has gathered, in one safetensors file beside its results. identity: everything the
    numbers depend on; a file of another evaluation is refused, not repaired."""

    path: Path
    identity: Mapping[str, Any]

    def read(self, metrics: Sequence[Metric], prompts: Sequence[str]) -> int:
        """How many samples have been measured, 0 without a file; restores the metrics. Raises ValueError if the file
        is another evaluation's, or damaged."""
        if not self.path.is_file():
            return 0
        try:
            with safe_open(self.path, "pt") as file:
                about = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            count, there = int(about["count"]), about["identity"]
        except Exception:
            raise ValueError(f"{self.path} cannot be read; remove it to start anew") from None
        here = json.loads(json.dumps(self.identity))
        if different := [key for key in dict.fromkeys([*here, *there]) if here.get(key) != there.get(key)]:
            raise ValueError(
                f"{self.path} is of another evaluation, which differs in {', '.join(different)}; remove "
                "it to start anew, or choose another output"
            )
        for metric in metrics:
            own = f"{metric.name}/"
            state = {n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)}
            metric.restore(state, prompts[:count])
        return count

    def write(self, metrics: Sequence[Metric], count: int) -> None:
        """Atomically."""
        tensors = {f"{m.name}/{name}": t.contiguous() for m in metrics for name, t in m.state().items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        about = {"count": json.dumps(count), "identity": json.dumps(self.identity)}
        save_file(tensors, temporary, about)
        os.replace(temporary, self.path)


def measure(
    draw: Draw,
    prompts: Sequence[str],
    metrics: Sequence[Metric],
    batch_size: int,
    progress: bool,
    partial: Partial | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Streams draw(start, stop) through the metrics, one sample a prompt. Returns their values and the first samples,
    for a report.

    With `partial`, what has been gathered is written now and then, and after the batch in which an interrupt comes; a
    later call continues there, with the same batches and to the same bits. Raises KeyboardInterrupt after an
    interrupt, and ValueError for samples that are not finite."""
    count = len(prompts)
    done = partial.read(metrics, prompts) if partial else 0
    kept, limit = list[Tensor](), 1
    timed = [(metric, metric.state()) for metric in metrics if done and metric.output == "any"]
    for start, stop in batches(0, done, batch_size):  # pictures for the report are made again
        if start >= limit:
            break
        kept.append(stills(samples) if (samples := draw(start, stop)).dim() == 5 else samples)
        limit = KEPT[samples.dim()]
    for metric, state in timed:  # making them again is no part of the time
        metric.restore(state, prompts[:done])
    written = time.monotonic()
    with (
        tqdm(total=count, initial=done, desc="evaluating", unit="sample", disable=not progress) as bar,
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
    first = torch.cat(kept)
    values = {key: value for metric in metrics for key, value in metric.compute().items()}
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
    """While inside, the first SIGINT or SIGTERM is only noted, so that a batch ends whole; the second one acts as
    always. Yields whether there was one. Not in a thread, where signals cannot be caught."""
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
