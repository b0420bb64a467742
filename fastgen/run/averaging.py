"""Gradients of whole networks, averaged over processes; where it can be, while the last backward pass still runs."""

from collections.abc import Iterable
from types import TracebackType

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET_BYTES = 25 << 20  # of gradients, averaged by one all-reduce


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Replaces gradients by their mean over processes, in buckets. Gradients of sharded networks are averaged already
    and are left as they are. A gradient that a process lacks (of an expert that it did not call) counts as zero there.

    This is done by hand rather than by a DDP wrapper, because one module is called several times per update, by
    several players."""
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    used = torch.tensor([p.grad is not None for p in whole], dtype=torch.uint8, device=accelerator.device)
    if not len(used):
        return
    dist.all_reduce(used, dist.ReduceOp.MAX)
    bucket: list[Tensor] = []
    for p, somewhere in zip(whole, used.tolist(), strict=True):
        if not somewhere:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if bucket and (sum(g.nbytes for g in bucket) > BUCKET_BYTES or bucket[0].dtype != p.grad.dtype):
            average(bucket, accelerator.num_processes)
            bucket = []
        bucket.append(p.grad)
    if bucket:
        average(bucket, accelerator.num_processes)


def average(gradients: list[Tensor], num_processes: int) -> None:
    """Averages several gradients over processes in place, with one all-reduce."""
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    parts = (flat / num_processes).split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def buckets_of(parameters: Iterable[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """The parameters from last to first, as the backward pass reaches them, in parts of one dtype and of about `most`
    bytes."""
    found: list[list[nn.Parameter]] = []
    for p in reversed(list(parameters)):
        if not found or found[-1][0].dtype != p.dtype or sum(q.nbytes for q in found[-1]) > most:
            found.append([])
        found[-1].append(p)
    return found


class Overlap:
    """A context for one backward pass, which starts to average a bucket of gradients as soon as it is complete and the
    buckets before it were started. `finish`, after it, starts the others and waits. So every process averages every
    bucket, in the same order, whatever gradients it has; a gradient that it lacks counts as zero, and one that all
    processes lack stays None.

    Every gradient has to be complete in this one pass: raises RuntimeError for one that changes after it was sent."""

    def __init__(self, parameters: Iterable[nn.Parameter], most: int = BUCKET_BYTES):
        """most: bytes of a bucket; at most an eighth of all, so that small networks overlap, too."""
        whole = [p for p in parameters if not isinstance(p, DTensor)]
        self.buckets = buckets_of(whole, min(most, sum(p.nbytes for p in whole) // 8))
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.missing = [len(bucket) for bucket in self.buckets]
        self.started: list[tuple[Tensor, dist.Work]] = []

    def __enter__(self) -> "Overlap":
        self.hooks = [p.register_post_accumulate_grad_hook(self.arrived) for p in self.bucket_of]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self.hooks:
            hook.remove()

    def arrived(self, parameter: Tensor) -> None:
        number = self.bucket_of[parameter]  # type: ignore[index]
        self.missing[number] -= 1
        if self.missing[number] < 0:
            raise RuntimeError("a gradient was accumulated twice in one backward pass, after it was averaged")
        while len(self.started) < len(self.buckets) and self.missing[len(self.started)] == 0:
            self.start(self.buckets[len(self.started)])

    def start(self, bucket: list[nn.Parameter]) -> None:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self.started.append((flat, work))

    def finish(self, accelerator: Accelerator) -> None:
        for bucket in self.buckets[len(self.started) :]:
            self.start(bucket)
        used = torch.tensor([p.grad is not None for p in self.bucket_of], dtype=torch.uint8, device=accelerator.device)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        for p, somewhere in zip(self.bucket_of, used.tolist(), strict=True):
            if somewhere and p.grad is None:
                p.grad = torch.zeros_like(p)
        for (flat, work), bucket in zip(self.started, self.buckets, strict=True):
            work.wait()
            parts = (flat / accelerator.num_processes).split([p.numel() for p in bucket])
            for p, part in zip(bucket, parts, strict=True):
                if p.grad is not None:
                    p.grad.copy_(part.view_as(p))
