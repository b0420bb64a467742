"""Five ways to compute the same function: Triton, flex_attention, xformers, SDPA and naive.

Each backend says in words which calls it cannot do. None repairs its input, and none changes what is computed.
"""

import functools
import importlib.util
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops.block_sparse_attention.configs import HEAD_DIMS, arch_of
from fastgen.ops.block_sparse_attention.layout import BlockLayout
from fastgen.ops.block_sparse_attention.naive import Cache, naive_attention, readable_rows, softmax_scale
from fastgen.ops.block_sparse_attention.result import Result
from fastgen.ops.block_sparse_attention.tiles import MAX_CAPACITY, tile_of_token

HALF = (torch.bfloat16, torch.float16)
MAX_MASK = 2e9  # elements of an expanded mask, each at least one byte; the limit is ours
_BLOCK_MASKS: weakref.WeakKeyDictionary[BlockLayout, Any] = (
    weakref.WeakKeyDictionary()
)  # one layout serves many layers


@dataclass(frozen=True)
class Call:
    """One call of attention. Its fields are `naive_attention`'s arguments. needs_lse: whether lse will be used."""

    query: Tensor
    key: Tensor
    value: Tensor
    layout: BlockLayout
    cache: Cache | None = None
    scale: float | None = None
    grad_keys: tuple[int, int] | None = None
    needs_lse: bool = False

    @property
    def needs_grad(self) -> bool:
        tensors = [self.query, self.key, self.value, *(self.cache or ())]
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values [B, L, H, D] of all sources, for backends that take one source without holes."""
        return readable_rows(self.query, self.key, self.value, self.layout, self.cache, self.grad_keys)

    def named(self) -> dict[str, Any]:
        """The keyword arguments of `naive_attention` and `triton_attention`."""
        return {"cache": self.cache, "scale": self.scale, "grad_keys": self.grad_keys}


class Backend(ABC):
    @abstractmethod
    def refusal(self, call: Call) -> str | None:
        """Why this backend cannot do the call, or None if it can."""

    @abstractmethod
    def run(self, call: Call) -> Result: ...


class Triton(Backend):
    """The Triton kernels of this folder."""

    def refusal(self, call: Call) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        from fastgen.ops.block_sparse_attention.function import DTYPES
        from fastgen.ops.block_sparse_attention.launch import INTERPRETED

        if call.query.shape[-1] not in HEAD_DIMS:
            return f"the kernels support head dimensions {HEAD_DIMS}, not {call.query.shape[-1]}"
        if call.query.dtype not in DTYPES:
            return f"the kernels do not compute in {call.query.dtype}"
        if INTERPRETED:
            return None if call.query.device.type == "cpu" else "the interpreter runs on the CPU"
        if not call.query.is_cuda or torch.version.cuda is None:
            return "the kernels need an NVIDIA GPU"
        try:
            arch_of(torch.cuda.get_device_capability(call.query.device))
        except ValueError as error:
            return str(error)
        return None

    def run(self, call: Call) -> Result:
        from fastgen.ops.block_sparse_attention.function import triton_attention

        return triton_attention(call.query, call.key, call.value, call.layout, **call.named())


class FlexAttention(Backend):
    """torch's flex_attention. It is compiled on a GPU. On a CPU it is not, and torch gives no gradients there."""

    def refusal(self, call: Call) -> str | None:
        if not call.query.is_cuda and call.needs_grad:
            return "flex_attention has no backward on a CPU"
        if call.query.dtype == torch.float64:
            return "flex_attention does not compute in float64"
        if call.query.is_cuda and min(call.layout.q_tiles.capacity, call.layout.k_tiles.capacity) < 64:
            return "flex_attention needs tiles of at least 64 tokens on a GPU"
        return None

    def run(self, call: Call) -> Result:
        from torch.nn.attention.flex_attention import AuxRequest

        query, key, value = (tensor.transpose(1, 2) for tensor in call.rows())
        attend = _compiled_flex() if call.query.is_cuda else _flex()
        if call.layout not in _BLOCK_MASKS:
            _BLOCK_MASKS[call.layout] = flex_block_mask(call.layout)
        named = {"block_mask": _BLOCK_MASKS[call.layout], "scale": softmax_scale(call.query, call.scale)}
        out, aux = attend(query, key, value, **named, return_aux=AuxRequest(lse=True))
        return Result(out.transpose(1, 2), aux.lse)


def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(_flex(), dynamic=False)


def flex_block_mask(layout: BlockLayout) -> Any:
    """flex_attention's BlockMask for a layout: made from its lists if tiles are uniform, else token by token."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    q_tiles, k_tiles = layout.q_tiles, layout.k_tiles
    batch, heads = layout.block_map.shape[:2]
    padded = F.pad(layout.block_map, (0, 1, 0, 1))
    query_tile, key_tile = tile_of_token(q_tiles, layout.device), tile_of_token(k_tiles, layout.device)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return padded[b if batch > 1 else 0, h if heads > 1 else 0, query_tile[q], key_tile[k]]

    if not (q_tiles.is_uniform and k_tiles.is_uniform):
        shape = (q_tiles.num_tokens, k_tiles.num_tokens)
        return create_block_mask(sees, batch, heads, *shape, device=str(layout.device))
    lists = layout.key_lists
    full = (lists.entries // (MAX_CAPACITY * k_tiles.capacity)).contiguous()
    last = torch.full_like(full, len(k_tiles) - 1)  # the only tile that may be ragged
    return BlockMask.from_kv_blocks(
        lists.counts - lists.full,
        last,
        lists.full,
        full,
        BLOCK_SIZE=(q_tiles.capacity, k_tiles.capacity),
        mask_mod=sees,
        seq_lengths=(q_tiles.num_tokens, k_tiles.num_tokens),
    )


class DenseMask:
    """The layout as a mask [b, h, Lq, Lk] for backends that know no block lists; None if nothing is hidden.

    So that no backend divides by 0, rows that see nothing see everything in the mask, and are set to 0 afterwards."""

    def __init__(self, layout: BlockLayout) -> None:
        self.mask: Tensor | None = None
        if not layout.sees_all:
            mask = layout.mask()
            self.blind = ~mask.any(-1, keepdim=True)
            self.mask = mask | self.blind

    def clear(self, out: Tensor) -> Tensor:
        """out: [B, H, Lq, D]. Returns it with 0 in the rows that see nothing."""
        return out if self.mask is None else out.masked_fill(self.blind, 0.0)


def mask_refusal(call: Call) -> str | None:
    """Why the layout cannot be expanded to a mask, or None. The mask would have an element for each pair of tokens, in
    each sample and head that has a map of its own."""
    batch, heads = call.layout.block_map.shape[:2]
    elements = batch * heads * call.layout.q_tiles.num_tokens * call.layout.k_tiles.num_tokens
    if call.layout.sees_all or elements <= MAX_MASK:
        return None
    return f"its mask would have {elements:.1e} elements, more than {MAX_MASK:.1e}"


class SDPA(Backend):
    """torch's scaled_dot_product_attention with the expanded mask, or without one if nothing is hidden."""

    def refusal(self, call: Call) -> str | None:
        if call.needs_lse:
            return "scaled_dot_product_attention returns no lse"
        return mask_refusal(call)

    def run(self, call: Call) -> Result:
        query, key, value = (tensor.transpose(1, 2) for tensor in call.rows())
        mask = DenseMask(call.layout)
        out = F.scaled_dot_product_attention(query, key, value, mask.mask, scale=softmax_scale(call.query, call.scale))
        return Result(mask.clear(out).transpose(1, 2), None)


class XFormers(Backend):
    """xformers' memory_efficient_attention with the expanded mask as a bias."""

    def refusal(self, call: Call) -> str | None:
        if importlib.util.find_spec("xformers") is None:
            return "xformers is not installed; its wheel must fit the installed torch exactly"
        if not call.query.is_cuda:
            return "xformers needs a GPU"
        if call.needs_lse:
            return "xformers returns no differentiable lse"
        if call.query.dtype not in (*HALF, torch.float32):
            return f"xformers does not compute in {call.query.dtype}"
        return mask_refusal(call)

    def run(self, call: Call) -> Result:
        from xformers.ops import memory_efficient_attention

        query, key, value = call.rows()
        mask = DenseMask(call.layout)
        bias = None if mask.mask is None else aligned_bias(mask.mask, query)
        out = memory_efficient_attention(
            query, key, value, attn_bias=bias, scale=softmax_scale(call.query, call.scale)
        )
        return Result(mask.clear(out.transpose(1, 2)).transpose(1, 2), None)


def aligned_bias(mask: Tensor, query: Tensor) -> Tensor:
    """The mask [b, h, Lq, Lk] as a bias of 0 and -inf, [B, H, Lq, Lk] in the query's dtype. Its rows start at
    multiples of 8 elements, as xformers demands."""
    batch, _, heads, _ = query.shape
    width = mask.shape[-1]
    bias = torch.zeros(batch, heads, mask.shape[2], width + -width % 8, dtype=query.dtype, device=query.device)
    return bias[..., :width].masked_fill_(~mask, -torch.inf)


class Naive(Backend):
    """The specification."""

    def refusal(self, call: Call) -> str | None:
        return None

    def run(self, call: Call) -> Result:
        return naive_attention(call.query, call.key, call.value, call.layout, **call.named())


BACKENDS: dict[str, Backend] = {
    "triton": Triton(),
    "flex_attention": FlexAttention(),
    "xformers": XFormers(),
    "sdpa": SDPA(),
    "naive": Naive(),
}
