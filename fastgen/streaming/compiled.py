"""Compiled blocks of a causal Wan transformer, for streaming on a GPU."""

from typing import Any

import torch

from fastgen.streaming.causal_wan import CausalAttention, make_causal


class OpaqueAttention(CausalAttention):
    """The attention over the past runs as it is, so that the code around it compiles once for all blocks and chunks:
    how much past there is changes until the window is full."""

    attend = torch.compiler.disable(CausalAttention.attend)


def compile_blocks(network: Any, **options: Any) -> None:
    """Compiles the blocks of a WanTransformer3DModel in place. options: those of torch.compile.

    Numbers change within the rounding of the compiled kernels."""
    make_causal(network)
    for block in network.blocks:
        stock = block.attn1.processor
        block.attn1.set_processor(OpaqueAttention(stock.stock, stock.layer))
        block.compile(**options)
