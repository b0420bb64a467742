"""How fast a video streams: latency of the first pictures, seconds of a chunk, pictures per second, memory."""

import math
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

STAGES = ("commit", "prompt", "denoise", "vae", "file")  # of a chunk, in time; the commit is that of the one before
COUNTED = ("denoise", "commit", "vae", "file")  # in the order in which the report adds them up


class Timer:
    """The moments between stages. On a GPU they are the device's, and nothing waits for them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moments: Sequence[Any]) -> list[float]:
        """The seconds between neighbouring moments."""
        if not self.cuda:
            return [b - a for a, b in pairwise(moments)]
        moments[-1].synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(moments)]


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given, so that a clock that starts now does not count it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Speed:
    """What a stream took. chunks: (number of pictures, seconds by stage) of each."""

    chunks: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def add(self, pictures: int, seconds: Sequence[float]) -> None:
        """A chunk, with the seconds of its STAGES."""
        self.chunks.append((pictures, dict(zip(STAGES, seconds, strict=True))))

    def report(self) -> dict[str, Any]:
        """Of all chunks but the first, which is cold and often smaller: the median and the 95th percentile of the
        seconds of a chunk, the medians by stage, and pictures per second with more and more of the stages counted.
        Changes of the prompt count to the seconds of their chunk alone."""
        steady = self.chunks[1:] or self.chunks
        pictures = sum(count for count, _ in steady)
        totals = [sum(stages[name] for _, stages in steady) for name in COUNTED]
        whole = sorted(sum(stages.values()) for _, stages in steady)
        names = ("denoise", "with_commit", "with_vae", "with_file")
        return {
            "chunks": len(self.chunks),
            "pictures_per_chunk": steady[0][0],
            "chunk_seconds": {"median": statistics.median(whole), "p95": whole[math.ceil(0.95 * len(whole)) - 1]},
            "stage_seconds": {name: statistics.median(stages[name] for _, stages in steady) for name in COUNTED},
            "fps": {name: pictures / max(sum(totals[: i + 1]), 1e-9) for i, name in enumerate(names)},
        }


def peak_memory(device: torch.device) -> dict[str, Any]:
    """The most memory that was in use: of the GPU's allocator, or resident in this process."""
    if device.type == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated(device), "peak_of": "max_memory_allocated"}
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "peak_of": "resident"}


def summary(report: Mapping[str, Any]) -> str:
    """A report of `sampling.stream.stream_video` in words."""
    chunk, fps = report["chunk_seconds"], report["fps"]
    first, text = report["first_picture_seconds"], report["text_seconds"]
    return "\n".join(
        [
            f"first pictures after {first:.3g} s, of which {text:.3g} s for the prompt",
            f"a chunk of {report['pictures_per_chunk']} pictures: {chunk['median']:.3g} s (median), "
            f"{chunk['p95']:.3g} s (95th percentile)",
            f"pictures per second: {fps['denoise']:.3g} denoising, {fps['with_commit']:.3g} with the commit, "
            f"{fps['with_vae']:.3g} with the VAE, {fps['with_file']:.3g} with the file",
            f"peak memory: {report['peak_bytes'] / 1e9:.3g} GB ({report['peak_of']})",
        ]
    )
