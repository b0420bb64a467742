"""Block-sparse attention by Triton kernels, with gradients. `naive.py` says what it computes."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgen.ops.block_sparse_attention.configs import HEAD_DIMS
from fastgen.ops.block_sparse_attention.launch import (
    INTERPRETED,
    Configs,
    Sources,
    configs_for,
    launch_delta,
    launch_dkv,
    launch_dq,
    launch_forward,
)
from fastgen.ops.block_sparse_attention.layout import BlockLayout
from fastgen.ops.block_sparse_attention.naive import Cache, check_shapes, softmax_scale
from fastgen.ops.block_sparse_attention.result import Result

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    cache: Cache | None = None,
    scale: float | None = None,
    grad_keys: tuple[int, int] | None = None,
    configs: Configs | None = None,
) -> Result:
    """query: [B, Lq, H, D] with D 64 or 128; bfloat16, float16, or float32 (exact and slow, without tensor cores).
    key, value: [B, Lk, H, D].  cache: keys and values before them, read in place. The last dimension must be
    contiguous; the other strides are free. scale: D ** -0.5 by default.
    grad_keys: the rows (first, last + 1), among all keys, that get gradient; both ends must be tile edges. Other rows
    get gradient 0 at no cost. By default, all rows of each of key, value and cache that requires gradient get it; a
    detached cache costs nothing.
    configs: replaces the shipped tile configurations.

    Gradients flow from out and from lse to query, keys and values. There are no second derivatives.
    Raises ValueError for tensors or layouts that do not fit, and RuntimeError if there is neither a CUDA device nor
    the interpreter."""
    check_shapes(query, key, value, layout, cache)
    if query.shape[-1] not in HEAD_DIMS or query.dtype not in DTYPES:
        raise ValueError(
            f"the kernels support head dimensions {HEAD_DIMS} in {DTYPES}, got {query.shape[-1]} in {query.dtype}"
        )
    if not (query.is_cuda or INTERPRETED):
        raise RuntimeError("the kernels need a CUDA device; on a CPU set TRITON_INTERPRET=1 before triton is imported")
    num_cached = 0 if cache is None else cache.key.shape[1]
    current_tile = layout.k_tiles.split_at(num_cached)
    tiles = (0, len(layout.k_tiles))
    if grad_keys is not None:
        tiles = (layout.k_tiles.split_at(grad_keys[0]), layout.k_tiles.split_at(grad_keys[1]))
    cache_key, cache_value = (None, None) if cache is None else cache
    out, lse = _BlockSparseAttention.apply(
        query,
        key,
        value,
        cache_key,
        cache_value,
        layout,
        softmax_scale(query, scale),
        current_tile,
        tiles,
        configs or configs_for(query, layout),
    )
    return Result(out, lse)


class _BlockSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache_key: Tensor | None,
        cache_value: Tensor | None,
        layout: BlockLayout,
        scale: float,
        current_tile: int,
        grad_tiles: tuple[int, int],
        configs: Configs,
    ) -> tuple[Tensor, Tensor]:
        out, lse2 = launch_forward(query, Sources(key, value, cache_key, cache_value), layout, scale, configs)
        ctx.save_for_backward(query, key, value, cache_key, cache_value, out, lse2)
        ctx.layout, ctx.scale, ctx.current_tile = layout, scale, current_tile
        ctx.grad_tiles, ctx.configs = grad_tiles, configs
        ctx.set_materialize_grads(False)
        return out, lse2 * math.log(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, cache_key, cache_value, out, lse2 = ctx.saved_tensors
        layout, scale, configs = ctx.layout, ctx.scale, ctx.configs
        dout = torch.zeros_like(out) if dout is None else dout.to(out.dtype).contiguous()
        delta = launch_delta(out, dout, None if dlse is None else dlse.float().contiguous())
        needs_query, needs_key, needs_value, needs_cache_key, needs_cache_value = ctx.needs_input_grad[:5]

        dq = dk = dv = cache_dk = cache_dv = None
        if needs_query:
            sources = Sources(key, value, cache_key, cache_value)
            dq = launch_dq(query, sources, dout, lse2, delta, layout, scale, configs)
        first, last = ctx.grad_tiles
        if needs_key or needs_value:
            tiles = (max(first, ctx.current_tile), max(last, ctx.current_tile))
            num_cached = 0 if cache_key is None else cache_key.shape[1]
            dk, dv = launch_dkv(query, key, value, num_cached, tiles, dout, lse2, delta, layout, scale, configs)
        if needs_cache_key or needs_cache_value:
            tiles = (min(first, ctx.current_tile), min(last, ctx.current_tile))
            cache_dk, cache_dv = launch_dkv(
                query, cache_key, cache_value, 0, tiles, dout, lse2, delta, layout, scale, configs
            )
        keep = (dk if needs_key else None, dv if needs_value else None)
        keep_cache = (cache_dk if needs_cache_key else None, cache_dv if needs_cache_value else None)
        return dq, *keep, *keep_cache, None, None, None, None, None
