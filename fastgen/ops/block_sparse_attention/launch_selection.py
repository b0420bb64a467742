"""Launchers of the selection kernels. Their results equal those of the torch code in selection.py and layout.py."""

import torch
import triton
from torch import Tensor

from fastgen.ops.block_sparse_attention.kernel_selection import lists_kernel, pool_kernel, select_kernel
from fastgen.ops.block_sparse_attention.tensors import on_device, row_strides
from fastgen.ops.block_sparse_attention.tiles import Tiles, entries


def pool_by_kernel(tokens: Tensor, tiles: Tiles) -> Tensor:
    """[B, L, H, D] -> [B, H, len(tiles), D] float32, without gradient. D must be a power of two."""
    batch, _, heads, dim = tokens.shape
    means = torch.empty(batch, heads, len(tiles), dim, device=tokens.device)
    with on_device(tokens):
        pool_kernel[(len(tiles), batch * heads)](
            tokens,
            entries(tiles, tokens.device),
            means,
            heads,
            len(tiles),
            *row_strides(tokens),
            HEAD_DIM=dim,
            CAPACITY=tiles.capacity,
        )
    return means


def select_by_kernel(scores: Tensor, forced: Tensor, top_k: int = 0, mass: float = 0.0) -> Tensor:
    """The map [B, H, q, k] bool of `mass_map` if mass > 0, else of `top_k_map`. forced: [1, 1, 1, k] bool."""
    scores = scores.contiguous()
    columns = scores.shape[-1]
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    with on_device(scores):
        select_kernel[(scores.numel() // columns,)](
            scores,
            forced.view(torch.uint8),
            kept.view(torch.uint8),
            columns,
            mass if mass > 0 else float(top_k),
            COLUMNS=max(16, triton.next_power_of_2(columns)),
            BY_MASS=mass > 0,
        )
    return kept


def lists_by_kernel(block_map: Tensor, columns: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """The entries, counts and full counts of `block_lists`.

    block_map: [b, h, rows, len(columns)], with any strides that let b and h be flattened into one dimension."""
    batch, heads, rows, width = block_map.shape
    flat = block_map.view(torch.uint8).flatten(0, 1)
    lists = torch.zeros(batch, heads, rows, width, dtype=torch.int32, device=block_map.device)
    counts, full = (torch.empty(batch, heads, rows, dtype=torch.int32, device=block_map.device) for _ in range(2))
    with on_device(block_map):
        lists_kernel[(rows, batch * heads)](
            flat,
            entries(columns, block_map.device),
            lists,
            counts,
            full,
            rows,
            width,
            *flat.stride(),
            COLUMNS=max(16, triton.next_power_of_2(width)),
            CAPACITY=columns.capacity,
        )
    return lists, counts, full
