"""Launchers, which turn tensors and a layout into kernel arguments. Forward and backward, without autograd."""

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

# with TRITON_INTERPRET=1 set before the first import of triton, kernels run on the CPU, one program after another
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)

Configs = dict[str, KernelConfig]  # kernel (forward, dq, dkv) -> its configuration


def configs_for(query: Tensor, layout: BlockLayout) -> Configs:
    """The shipped configuration of each kernel for this device, cut down to the layout's tiles."""
    arch = "sm_90" if INTERPRETED else arch_of(torch.cuda.get_device_capability(query.device))
    capacity = min(layout.q_tiles.capacity, layout.k_tiles.capacity)
    float32 = query.dtype == torch.float32
    return {kernel: kernel_config(arch, query.shape[-1], capacity, kernel, float32) for kernel in KERNELS}


def launch_forward(
    query: Tensor, keys: "Sources", layout: BlockLayout, scale: float, configs: Configs
) -> tuple[Tensor, Tensor]:
    """Returns out [B, Lq, H, D], and lse [B, H, Lq] float32 to base 2."""
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
    """delta [B, H, Lq] = rowsum(out * dout) - dlse, float32. dlse: the gradient of the natural lse."""
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
    """Returns dq [B, Lq, H, D]."""
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
    """Returns dk and dv of one source, in its shape. Row 0 of the source is row `first_row` among all keys.

    tiles: the key tiles (first, last + 1) that get gradient. Only these are computed; all other rows are 0."""
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
    """A contiguous output of this shape, filled with zeros unless every row will be written.

    The interpreter truncates to bfloat16 where a GPU rounds. So under it kernels write float32, which torch rounds."""
    make = torch.empty if covered else torch.zeros
    return make(tensor.shape, dtype=torch.float32 if INTERPRETED else tensor.dtype, device=tensor.device)


class Sources:
    """Keys and values as kernels take them: of one source, or of a cache and the current tokens after it."""

    def __init__(self, key: Tensor, value: Tensor, cache_key: Tensor | None, cache_value: Tensor | None) -> None:
        cached = (key, value) if cache_key is None or cache_value is None else (cache_key, cache_value)
        self.num_cached = 0 if cache_key is None else cache_key.shape[1]
        self.tensors = (key, value, *cached)
        self.strides = tuple(stride for tensor in self.tensors for stride in row_strides(tensor))

    def described(self, config: KernelConfig) -> tuple[tuple[Tensor | TensorDescriptor, ...], tuple[int, ...]]:
        """`describe` for key and value. With a cache they stay pointers, because a tile may lie in either source."""
        return describe(self.tensors[:2], config.block_n, config.tma and not self.num_cached)


def describe(
    tensors: Sequence[Tensor], block_rows: int, tma: bool
) -> tuple[tuple[Tensor | TensorDescriptor, ...], tuple[int, ...]]:
    """Descriptors of the tensors, and for each tensor three steps: of a batch in rows, a head in rows, and a head in
    columns. Without tma, or if a tensor cannot be described, the tensors themselves, and zeros for the steps."""
    views = [matrix_view(tensor) for tensor in tensors] if tma else [None]
    if any(view is None for view in views):
        return tuple(tensors), (0, 0, 0) * len(tensors)
    descriptors = [
        TensorDescriptor(tensor, list(view.shape), [tensor.stride(1), 1], [block_rows, tensor.shape[-1]])
        for tensor, view in zip(tensors, views, strict=True)
        if view is not None
    ]
    return tuple(descriptors), tuple(step for view in views if view is not None for step in view.steps)


def is_described(arguments: Sequence[Tensor | TensorDescriptor]) -> bool:
    return isinstance(arguments[0], TensorDescriptor)


class MatrixView(NamedTuple):
    """shape: rows and columns; each row is a token.  steps: of a batch in rows, a head in rows, a head in columns."""

    shape: tuple[int, int]
    steps: tuple[int, int, int]


def matrix_view(tensor: Tensor) -> MatrixView | None:
    """A tensor [B, L, H, D] as a matrix in which each token of a head is in one row. The heads are side by side in a
    row, or one after another in rows, depending on the memory layout. None if the memory layout is neither, or if it
    lacks the 16-byte alignment that TMA needs."""
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
    """The strides of entries (batch, head, row) and of counts (batch, head). 0 where one list serves all."""
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
