"""Regional compilation: the blocks that a network repeats are compiled by torch.compile, each kind once.

What is compiled is a block's `forward`. The hooks around it, which gather sharded weights and collect features, run as
they are: torch.compile would trace those of the first call and not see that others were registered later
(`torch._dynamo.config.skip_nnmodule_hook_guards`)."""

import functools
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

BACKEND = "inductor"
VARIANTS = (
    64  # of one kind of block: adapters, with and without gradient, dtypes, shapes; ours. torch's own limit is 8
)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compiles these blocks in place, and of blocks that lie inside each other the innermost. It happens when they are
    first called. Names of parameters do not change, and a copy of a network is compiled as well.

    Numbers change within the rounding of the compiled kernels. torch.compile has neither forward-mode derivatives nor
    second derivatives."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for block in innermost(blocks):
        block.forward = MethodType(compiled(type(block).forward, BACKEND), block)  # type: ignore[method-assign]


@functools.cache
def compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """One for all blocks of a kind, which have their weights as inputs."""
    return torch.compile(function, backend=backend)


def innermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Those of the modules that hold no other one."""
    chosen = set(modules)
    return [m for m in modules if not any(inner in chosen for inner in m.modules() if inner is not m)]
