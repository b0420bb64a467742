"""The optimizers of a run: AdamW of torch, or with 8-bit moments of bitsandbytes, which is an extra.

8-bit moments (arXiv 2110.02861): each block of 256 numbers of a tensor is stored as indices into a table of 256 values
and one float32 scale. Tensors of fewer than 4096 numbers keep float32 moments."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastgen.recipe import OptimizerConfig

BLOCK, SMALLEST = 256, 4096  # of bitsandbytes: numbers that share a scale, and of the smallest tensor in 8 bits
PAGED = 100_000  # numbers from which on its paged moments lie in memory that host and GPU share


def adamw(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> Any:
    """The optimizer of one role, a torch.optim.Optimizer."""
    options = (config.lr, config.betas, config.eps, config.weight_decay)
    if not config.is_8bit:
        return torch.optim.AdamW(parameters, *options, fused=True if config.kind == "adamw_fused" else None)
    from bitsandbytes import optim  # looks for the libraries of a GPU

    kinds = {"adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}
    return kinds[config.kind](parameters, *options)
