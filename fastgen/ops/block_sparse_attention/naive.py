"""Block-sparse attention in plain torch: the specification of every backend.

    s_ij = scale q_i . k_j  where the tile of i sees the tile of j, else -inf
    lse_i = log sum_j exp(s_ij),    out_i = sum_j exp(s_ij - lse_i) v_j

A query that sees nothing has out 0 and lse -inf. Rows in no tile are never read, so they may hold anything.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.ops.block_sparse_attention.layout import BlockLayout
from fastgen.ops.block_sparse_attention.result import Result
from fastgen.ops.block_sparse_attention.tiles import tile_of_token


class Cache(NamedTuple):
    """Keys and values [B, L, H, D] that come before the current ones. The Triton kernels read them in place."""

    key: Tensor
    value: Tensor


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    cache: Cache | None = None,
    scale: float | None = None,
    grad_keys: tuple[int, int] | None = None,
) -> Result:
    """query: [B, Lq, H, D].  key, value: [B, Lk, H, D].
    cache: keys and values before them; the layout's key tiles cover both.  scale: D ** -0.5 by default.
    grad_keys: the rows (first, last + 1), among all keys, that get gradient; by default all of them.
    Computed in float64 for float64 inputs, else in float32. The output has the query's dtype.

    Raises ValueError if the layout does not fit the tensors."""
    check_shapes(query, key, value, layout, cache)
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = readable_rows(query, key, value, layout, cache, grad_keys)
    query_rows, key_rows, value_rows = (tensor.to(wide) for tensor in rows)
    logits = torch.einsum("bqhd,bkhd->bhqk", query_rows, key_rows) * softmax_scale(query, scale)
    logits = logits.masked_fill(~layout.mask(), -torch.inf)
    largest = logits.amax(-1, keepdim=True).detach()
    weights = (logits - largest.masked_fill(largest == -torch.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    seen = total > 0
    safe = torch.where(seen, total, 1.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights / safe, value_rows)
    lse = torch.where(seen, largest + safe.log(), -torch.inf).squeeze(-1)
    return Result(out.to(query.dtype), lse)


def softmax_scale(query: Tensor, scale: float | None) -> float:
    """The scale, D ** -0.5 by default. Raises ValueError if it is not positive, because kernels take a row's maximum
    before they scale."""
    if scale is not None and scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return query.shape[-1] ** -0.5 if scale is None else scale


def all_keys(key: Tensor, cache_key: Tensor | None) -> Tensor:
    """The cached rows, then the current ones, in one tensor."""
    return key if cache_key is None else torch.cat([cache_key, key], dim=1)


def readable_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    cache: Cache | None,
    grad_keys: tuple[int, int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, and keys and values of both sources, with zeros in rows of no tile and gradient only for `grad_keys`."""
    key = all_keys(key, None if cache is None else cache.key)
    value = all_keys(value, None if cache is None else cache.value)
    if grad_keys is not None:
        row = torch.arange(key.shape[1], device=key.device)[:, None, None]
        receives = (grad_keys[0] <= row) & (row < grad_keys[1])
        key, value = (torch.where(receives, tensor, tensor.detach()) for tensor in (key, value))
    if not layout.k_tiles.covers_all:
        in_tile = tile_of_token(layout.k_tiles, key.device) < len(layout.k_tiles)
        key, value = (tensor.masked_fill(~in_tile[:, None, None], 0.0) for tensor in (key, value))
    if not layout.q_tiles.covers_all:
        in_tile = tile_of_token(layout.q_tiles, key.device) < len(layout.q_tiles)
        query = query.masked_fill(~in_tile[:, None, None], 0.0)
    return query, key, value


def check_shapes(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, cache: Cache | None) -> None:
    """Raises ValueError for tensors that do not fit each other or the layout."""
    sources = {"key": key, "value": value}
    if cache is not None:
        sources |= {"cache.key": cache.key, "cache.value": cache.value}
    if query.dim() != 4:
        raise ValueError(f"query must be [B, L, H, D], got {tuple(query.shape)}")
    batch, queries, heads, dim = query.shape
    for name, tensor in sources.items():
        if tensor.dim() != 4 or (tensor.shape[0], *tensor.shape[2:]) != (batch, heads, dim):
            raise ValueError(f"{name} must be [{batch}, L, {heads}, {dim}] like the query, got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but the query is {query.dtype} on {query.device}"
            )
    if key.shape != value.shape or (cache is not None and cache.key.shape != cache.value.shape):
        raise ValueError("each key tensor must be as long as its value tensor; the numbers of tokens differ")
    keys = key.shape[1] + (0 if cache is None else cache.key.shape[1])
    if (queries, keys) != (layout.q_tiles.num_tokens, layout.k_tiles.num_tokens):
        tiled = f"{layout.q_tiles.num_tokens} queries and {layout.k_tiles.num_tokens} keys"
        raise ValueError(f"there are {queries} queries and {keys} keys, but the layout is for {tiled}")
    if layout.block_map.shape[0] not in (1, batch) or layout.block_map.shape[1] not in (1, heads):
        raise ValueError(
            f"the layout's batch and heads are {tuple(layout.block_map.shape[:2])}, the query's {(batch, heads)}"
        )
    if layout.device != query.device:
        raise ValueError(
            f"the layout is on {layout.device}, but the query is on {query.device}; call layout.to(query.device)"
        )
