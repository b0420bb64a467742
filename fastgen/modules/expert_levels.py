"""Noise levels at which all samples of an update need one and the same expert."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.batch import Batch
from fastgen.denoiser import Denoiser

HALVINGS = 26  # of the interval of uniform draws, which float32 divides into 2^24
SHARES = 1 << 24


def draw_levels(
    batch: Batch,
    name: str,
    law: Callable[[Tensor], Tensor],
    network: Denoiser,
    by_group: bool = False,
    offset: float = 0.0,
) -> Tensor:
    """t [B]: law(u) at this name's uniform draws u, one per sample or, with by_group, per prompt group.

    law: elementwise and nondecreasing, from (0, 1) to noise levels. offset: the network is called at t - offset.
    If the network has several experts, one draw v, shared by all names, samples, micro-batches and processes of the
    update, chooses the expert, and the samples keep draws of their own within its range: where q is the share of draws
    below the boundary, u is mapped into (0, q) if v < q and into (q, 1) otherwise. Every sample still has the law of
    law(u), and the gradient its mean (derived). All samples have the same expert wherever q is the same for all."""
    u = batch.uniform(name, by_group)
    if not network.boundaries:
        return law(u)
    chosen = (batch.integer("expert", SHARES) + 0.5) / SHARES
    low, high = torch.zeros_like(u), torch.ones_like(u)
    for boundary in network.boundaries:
        below, above = split(lambda v: law(v) - offset, boundary, u)
        upper = chosen >= above
        low = torch.where(upper, torch.maximum(low, above), low)
        high = torch.where(upper, high, torch.minimum(high, below))
    return law(low + (high - low) * u)


def split(law: Callable[[Tensor], Tensor], boundary: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """(below, above), each like `like`: neighbouring numbers in [0, 1] with law(below) < boundary <= law(above), where
    there are such. By bisection, in the arithmetic that the levels are drawn with, so that rounding moves no level
    across the boundary."""
    below, above = torch.zeros_like(like), torch.ones_like(like)
    for _ in range(HALVINGS):
        middle = (below + above) / 2
        upper = law(middle) >= boundary
        below, above = torch.where(upper, below, middle), torch.where(upper, middle, above)
    return below, above
