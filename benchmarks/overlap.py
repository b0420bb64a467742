"""What averaging gradients while the backward pass still runs would save: two gloo processes.

    torchrun --nproc_per_node=2 benchmarks/overlap.py --micro-batches 1

fastgen averages the gradients of whole networks once an update: in buckets while the last backward pass runs
(`run.averaging.Overlap`), or after it (`average_gradients`), as all of it was before. Both train the network of the
digits teacher here, with the same micro-batches, in turns, beside torch's DistributedDataParallel and a way that
averages nothing, which is the most that overlap could come to. A row of overlap.jsonl has the medians of the wall
seconds of an update (forwards, backwards, averaging) and the share that overlap saved, from the ratios of neighbours.
"""

import argparse
import contextlib
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.refusal_seconds import machine
from benchmarks.rows import append_row, sort_rows
from fastgen.backbones.sd3 import SD3Config
from fastgen.batch import Conditioning
from fastgen.run.averaging import Overlap, average_gradients

ROOT = Path(__file__).resolve().parents[1]
Step = Callable[[list[tuple[Tensor, Tensor]]], None]


class Loss(nn.Module):
    """A mean squared prediction of the network, so that a wrapper sees one forward."""

    def __init__(self, network: nn.Module, cond: Conditioning):
        super().__init__()
        self.network, self.cond = network, cond

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t, self.cond).square().mean()


def after(loss: nn.Module, accelerator: Accelerator | None) -> Step:
    """Averages after the last backward pass, or with None not at all."""

    def step(batches: list[tuple[Tensor, Tensor]]) -> None:
        for x, t in batches:
            loss(x, t).backward()
        if accelerator is not None:
            average_gradients(loss.parameters(), accelerator)

    return step


def overlapped(loss: nn.Module, accelerator: Accelerator) -> Step:
    """As fastgen does."""

    def step(batches: list[tuple[Tensor, Tensor]]) -> None:
        overlap = Overlap(loss.parameters())
        for i, (x, t) in enumerate(batches, 1):
            with overlap if i == len(batches) else contextlib.nullcontext():
                loss(x, t).backward()
        overlap.finish(accelerator)

    return step


def by_torch(loss: nn.Module) -> Step:
    """By DistributedDataParallel, around a network of its own: its hooks stay on the parameters."""
    wrapped = DistributedDataParallel(loss)

    def step(batches: list[tuple[Tensor, Tensor]]) -> None:
        wrapped.zero_grad()
        for i, (x, t) in enumerate(batches, 1):
            with contextlib.nullcontext() if i == len(batches) else wrapped.no_sync():
                wrapped(x, t).backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(dist.get_rank())
    path = str(ROOT / "assets/teachers/digits")
    backbone = SD3Config(path=path).build(torch.device("cpu"), torch.float32, 0)
    cond = backbone.encode_prompts(["a seven"] * arguments.batch_size)
    loss = Loss(backbone.load("student"), cond)
    steps = {
        "after": after(loss, accelerator),
        "overlapped": overlapped(loss, accelerator),
        "torch": by_torch(copy.deepcopy(loss)),
        "none": after(loss, None),
    }
    seconds = {name: list[float]() for name in steps}
    for _ in range(arguments.repeats + 2):
        shape = (arguments.batch_size, *backbone.latent_shape)
        batches = [(torch.randn(shape), torch.rand(len(cond["pooled"]))) for _ in range(arguments.micro_batches)]
        for name, step in steps.items():
            loss.zero_grad()
            dist.barrier()
            began = time.perf_counter()
            step(batches)
            dist.barrier()
            seconds[name].append(time.perf_counter() - began)
    if os.environ["RANK"] != "0":
        return
    kept = {name: found[2:] for name, found in seconds.items()}
    ratios = {n: [a / b for a, b in zip(kept[n], kept["after"], strict=True)] for n in ("overlapped", "none")}
    row = {
        "name": f"digits, {arguments.micro_batches} micro-batches of {arguments.batch_size}",
        **{f"seconds_{name}": round(statistics.median(found), 4) for name, found in kept.items()},
        "saved_by_overlap": round(1 - statistics.median(ratios["overlapped"]), 3),
        "share_of_averaging": round(1 - statistics.median(ratios["none"]), 3),
        "gradient_bytes": sum(p.nbytes for p in loss.parameters()),
        "processes": dist.get_world_size(),
        "repeats": arguments.repeats,
        **machine(),
    }
    print(row)
    append_row(Path(__file__).with_suffix(".jsonl"), row)
    sort_rows(Path(__file__).with_suffix(".jsonl"))


if __name__ == "__main__":
    main()
