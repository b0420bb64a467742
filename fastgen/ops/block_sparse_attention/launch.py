"""Launchers: from tensors and a layout to kernel arguments. Forward and backward, without autograd."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgen.ops.block_sparse_attention.configs import KERNELS, KernelConfig, arch_of, kernel_config
from fastgen.ops.block_sparse_attention.kernel import forward_kernel
from fastgen.ops.block_sparse_attention.kernel_backward import delta_kernel, dkv_kernel, dq_kernel
from fastgen.ops.block_sparse_attention.layout import BlockLayout, BlockLists
from fastgen.ops.block_sparse_attention.tensors import on_device, row_strides
from fastgen.ops.block_sparse_attention.tiles import entries

# TRITON_INTERPRET=1 before the first import of triton runs kernels on the CPU, one program after the other
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)

Configs = dict[str, KernelConfig]  # by kernel: forward, dq, dkv


def configs_for(query: Tensor, layout: BlockLayout) -> Configs:
    """The shipped configuration of each kernel for this device, cut down to the layout's tiles."""
    arch = "sm_90" if INTERPRETED else arch_of(torch.cuda.get_device_capability(query.device))
    capacity = min(layout.q_tiles.capacity, layout.k_tiles.capacity)
    float32 = query.dtype == torch.float32
    return {kernel: kernel_config(arch, query.shape[-1], capacity, kernel, float32) for kernel in KERNELS}


def launch_forward(
    query: Tensor, keys: "Sources", layout: BlockLayout, scale: float, configs: Configs
) -> tuple[Tensor, Tensor]:
    """out [B, Lq, H, D], and lse [B, H, Lq] float32 to base 2."""
    batch, queries, heads, dim = query.shape
    config = configs["forward"]
    out = like(query, layout.q_tiles.covers_all)
    lse = torch.full((batch, heads, queries), -torch.inf, device=query.device)
    lists = layout.key_lists
    capacity = layout.q_tiles.capacity
    grid = (len(layout.q_tiles) * (capacity // config.block_m), batch * heads)
    described, steps = keys.described(config)
    with on_device(query):
        forward_kernel[grid](
            query,
            *keys.tensors,
            *described,
            out,
            lse,
            entries(layout.q_tiles, query.device),
            *lists,
            scale * math.log2(math.e),
            heads,
            queries,
            keys.num_cached,
            *steps,
            *row_strides(query),
            *keys.strides,
            *list_strides(lists),
            HEAD_DIM=dim,
            QUERY_TILE=capacity,
            KEY_TILE=layout.k_tiles.capacity,
            TWO_SOURCES=keys.num_cached > 0,
            TMA=is_described(described),
            **common(config),
        )
    return out.to(query.dtype), lse


def launch_delta(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """delta [B, H, Lq] = rowsum(out * dout) - dlse, float32; dlse is that of the natural lse."""
    batch, queries, heads, dim = out.shape
    delta = torch.empty(batch, heads, queries, device=out.device)
    rows, block = batch * queries * heads, 32
    with on_device(out):
        delta_kernel[(triton.cdiv(rows, block),)](
            out,
            dout,
            delta if dlse is None else dlse,
            delta,
            rows,
            heads,
            queries,
            HEAD_DIM=dim,
            BLOCK_M=block,
            HAS_DLSE=dlse is not None,
            UPCAST=INTERPRETED,
        )
    return delta


def launch_dq(
    query: Tensor,
    keys: "Sources",
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    layout: BlockLayout,
    scale: float,
    configs: Configs,
) -> Tensor:
    """dq, [B, Lq, H, D]."""
    batch, queries, heads, dim = query.shape
    config = configs["dq"]
    dq = like(query, layout.q_tiles.covers_all)
    lists = layout.key_lists
    capacity = layout.q_tiles.capacity
    grid = (len(layout.q_tiles) * (capacity // config.block_m), batch * heads)
    described, steps = keys.described(config)
    with on_device(query):
        dq_kernel[grid](
            query,
            *keys.tensors,
            *described,
            dout,
            lse,
            delta,
            dq,
            entries(layout.q_tiles, query.device),
            *lists,
            scale * math.log2(math.e),
            scale,
            heads,
            queries,
            keys.num_cached,
            *steps,
            *row_strides(query),
            *keys.strides,
            *list_strides(lists),
            HEAD_DIM=dim,
            QUERY_TILE=capacity,
            KEY_TILE=layout.k_tiles.capacity,
            TWO_SOURCES=keys.num_cached > 0,
            TMA=is_described(described),
            **common(config),
        )
    return dq.to(query.dtype)


def launch_dkv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_row: int,
    tiles: tuple[int, int],
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    layout: BlockLayout,
    scale: float,
    configs: Configs,
) -> tuple[Tensor, Tensor]:
    """dk and dv of one source, both of its shape; its row 0 is row `first_row` of all keys.

    tiles: the key tiles, first to last + 1, that get gradient; only they are computed, other rows are 0."""
    batch, queries, heads, dim = query.shape
    config = configs["dkv"]
    first, last = tiles
    starts, lengths = layout.k_tiles.starts[first:last], layout.k_tiles.lengths[first:last]
    dk, dv = (like(key, covered=sum(lengths) == key.shape[1]) for _ in range(2))
    if not starts:
        return dk.to(key.dtype), dv.to(key.dtype)
    lists = layout.query_lists
    capacity = layout.k_tiles.capacity
    described, steps = describe((query, dout), config.block_m, config.tma)
    with on_device(query):
        dkv_kernel[((last - first) * (capacity // config.block_n), batch * heads)](
            query,
            key,
            value,
            dout,
            *described,
            lse,
            delta,
            dk,
            dv,
            entries(layout.k_tiles, query.device),
            *lists,
            scale * math.log2(math.e),
            scale,
            heads,
            queries,
            key.shape[1],
            first_row,
            first,
            *steps[:3],
            *row_strides(query),
            *row_strides(key),
            *row_strides(value),
            *list_strides(lists),
            HEAD_DIM=dim,
            QUERY_TILE=layout.q_tiles.capacity,
            KEY_TILE=capacity,
            TMA=is_described(described),
            **common(config),
        )
    return dk.to(key.dtype), dv.to(key.dtype)


def like(tensor: Tensor, covered: bool) -> Tensor:
    """A contiguous output of this shape, zeros unless every row will be written.

    The interpreter cuts bfloat16 off where a GPU rounds: there it writes float32, which torch then rounds."""
    make = torch.empty if covered else torch.zeros
    return make(tensor.shape, dtype=torch.float32 if INTERPRETED else tensor.dtype, device=tensor.device)


class Sources:
    """Keys and values of one source, or of a cache and the current tokens after it, as kernels take them."""

    def __init__(self, key: Tensor, value: Tensor, cache_key: Tensor | None, cache_value: Tensor | None) -> None:
        cached = (key, value) if cache_key is None or cache_value is None else (cache_key, cache_value)
        self.num_cached = 0 if cache_key is None else cache_key.shape[1]
        self.tensors = (key, value, *cached)
        self.strides = tuple(stride for tensor in self.tensors for stride in row_strides(tensor))

    def described(self, config: KernelConfig) -> tuple[tuple[Tensor | TensorDescriptor, ...], tuple[int, ...]]:
        """`describe` of key and value; with a cache, where a tile may lie in either source, they stay pointers."""
        return describe(self.tensors[:2], config.block_n, config.tma and not self.num_cached)


def describe(
    tensors: Sequence[Tensor], block_rows: int, tma: bool
) -> tuple[tuple[Tensor | TensorDescriptor, ...], tuple[int, ...]]:
    """Descriptors of the tensors, and of each the steps of batch and head in rows, and of head in columns; the tensors
    themselves and zeros without tma, or if one of them cannot be described."""
    views = [matrix_view(tensor) for tensor in tensors] if tma else [None]
    if any(view is None for view in views):
        return tuple(tensors), (0, 0, 0) * len(tensors)
    found = [
        TensorDescriptor(tensor, list(view.shape), [tensor.stride(1), 1], [block_rows, tensor.shape[-1]])
        for tensor, view in zip(tensors, views, strict=True)
        if view is not None
    ]
    return tuple(found), tuple(step for view in views if view is not None for step in view.steps)


def is_described(arguments: Sequence[Tensor | TensorDescriptor]) -> bool:
    return isinstance(arguments[0], TensorDescriptor)


class MatrixView(NamedTuple):
    """shape: rows and columns; a row is a token.  steps: of batch and head in rows, of head in columns."""

    shape: tuple[int, int]
    steps: tuple[int, int, int]


def matrix_view(tensor: Tensor) -> MatrixView | None:
    """[B, L, H, D] as a matrix in which a token of one head is one row: heads side by side in a row, or one after the
    other in rows, as they lie in memory. None where neither is so, or where TMA's 16-byte alignment is not given."""
    batch, length, heads, dim = tensor.shape
    stride_batch, stride, stride_head, _ = tensor.stride()
    size = tensor.element_size()
    if tensor.data_ptr() % 16 or stride * size % 16 or stride == 0 or stride_head * size % 16:
        return None
    side_by_side = (heads - 1) * stride_head + dim <= stride
    if (batch > 1 and stride_batch % stride) or not (side_by_side or stride_head % stride == 0):
        return None
    columns = (heads - 1) * stride_head + dim if side_by_side else dim
    step_batch = stride_batch // stride if batch > 1 else 0
    step_head = 0 if side_by_side else stride_head // stride
    rows = (batch - 1) * step_batch + (heads - 1) * step_head + length
    return MatrixView((rows, columns), (step_batch, step_head, stride_head if side_by_side else 0))


def list_strides(lists: BlockLists) -> tuple[int, int, int, int, int]:
    """Of entries: batch, head, row; of counts: batch, head. 0 where one list serves all."""
    batch, heads, rows, width = lists.entries.shape
    one_batch, one_head = batch == 1, heads == 1
    return (
        0 if one_batch else heads * rows * width,
        0 if one_head else rows * width,
        width,
        0 if one_batch else heads * rows,
        0 if one_head else rows,
    )


def common(config: KernelConfig) -> dict[str, object]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "UPCAST": INTERPRETED,  # the interpreter computes bfloat16 wrongly
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
