"""Sums and rows over all processes of a run; with one process, its own."""

import torch
import torch.distributed as dist
from torch import Tensor


def running() -> bool:
    """Whether this run has several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def summed(value: Tensor) -> Tensor:
    """The sum of every process's value; no gradient."""
    if not running():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def gathered(rows: Tensor) -> Tensor:
    """Every process's rows [B, ...], one after the other, in the order of the processes; no gradient."""
    if not running():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)
