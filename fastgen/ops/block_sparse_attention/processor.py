"""Sparse attention in diffusers' transformers: a processor that wraps the stock one and leaves it as it is.

A stock processor projects, normalises and rotates as its family does, then calls `scaled_dot_product_attention` once.
Only that call is replaced, through torch's own hook for it (`TorchFunctionMode`). So one class serves every family
whose stock processor makes that call: Wan, PixArt, SD3, Flux and others.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgen.ops.block_sparse_attention.coarse import CoarseGate, coarse_attention
from fastgen.ops.block_sparse_attention.dispatch import BackendName, WhenDenseWins, attention
from fastgen.ops.block_sparse_attention.layout import BlockLayout
from fastgen.ops.block_sparse_attention.linear_branch import LinearBranch, linear_state
from fastgen.ops.block_sparse_attention.selection import Selection

SELF_ATTENTION = ("attn1", "attn")  # diffusers' names of self and joint attention; attn2 is cross-attention


class BlockSparseAttnProcessor(nn.Module):
    """stock: the layer's own processor.  layout: a fixed layout, or a rule that selects one by content.
    gate: adds VSA's coarse branch through this gate; it needs a `Selection`, or a layout without holes.
    linear: adds this linear-attention branch over all keys.  backend, when_dense_wins: as in `attention`.

    The tokens are those of the stock call. Joint families have text and image tokens in one sequence, and the layout
    covers both. Raises ValueError if the call has a mask, dropout, causality or grouped heads. Raises RuntimeError if
    the stock processor does not call `scaled_dot_product_attention` exactly once, as with another attention backend of
    diffusers."""

    def __init__(
        self,
        stock: Any,
        layout: BlockLayout | Selection,
        *,
        gate: CoarseGate | None = None,
        linear: LinearBranch | None = None,
        backend: BackendName = "auto",
        when_dense_wins: WhenDenseWins = "mask",
    ) -> None:
        super().__init__()
        self.stock = stock
        self.layout = layout
        self.gate = gate
        self.linear = linear
        self.backend: BackendName = backend
        self.when_dense_wins: WhenDenseWins = when_dense_wins

    @property
    def __call__(self) -> Callable[..., Any]:  # type: ignore[override]
        """A function with the stock signature, because diffusers drops arguments that __call__ does not declare."""

        @functools.wraps(self.stock.__call__)
        def call(attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            with _Replaced(functools.partial(self.attend, hidden_states)) as replaced:
                result = self.stock(attn, hidden_states, *args, **kwargs)
            if replaced.calls != 1:
                raise RuntimeError(
                    f"{type(self.stock).__name__} called scaled_dot_product_attention {replaced.calls} times, not "
                    "once; sparse attention needs self-attention layers and diffusers' native attention backend"
                )
            return result

        return call

    def attend(self, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """hidden_states: [B, L, width], the layer's input.  query, key, value: [B, L, H, D], like the result."""
        coarse = None
        if isinstance(self.layout, BlockLayout):
            layout = self.layout = self.layout.to(query.device)
            if self.gate is not None:
                coarse, _ = coarse_attention(query, key, value, layout.q_tiles, layout.k_tiles, scale)
        elif self.gate is not None:
            coarse, scores = coarse_attention(query, key, value, self.layout.q_tiles, self.layout.k_tiles, scale)
            layout = self.layout.from_scores(scores)
        else:
            layout = self.layout(query, key)
        out = attention(
            query, key, value, layout, scale=scale, backend=self.backend, when_dense_wins=self.when_dense_wins
        ).out
        if self.gate is not None and coarse is not None:
            out = out + self.gate(hidden_states, coarse).to(out.dtype)
        if self.linear is not None:
            out = out + self.linear(query, linear_state(key, value, self.linear.kind))
        return out


class _Replaced(TorchFunctionMode):
    """Inside this context, scaled_dot_product_attention calls attend(query, key, value, scale), with [B, L, H, D]."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._attention(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The arguments of scaled_dot_product_attention; tensors are [B, H, L, D]."""
        extras = {
            "attn_mask": attn_mask is not None,
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "gqa": enable_gqa,
        }
        if any(extras.values()):
            names = ", ".join(name for name, value in extras.items() if value)
            raise ValueError(f"sparse attention takes its mask from the layout, but the layer asks for {names}")
        if torch.is_autocast_enabled(query.device.type):  # as torch does for this function
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        return self.attend(*(tensor.transpose(1, 2) for tensor in (query, key, value)), scale).transpose(1, 2)


def set_sparse_attention(
    transformer: nn.Module,
    layout: BlockLayout | Selection,
    *,
    names: Collection[str] = SELF_ATTENTION,
    coarse: bool = False,
    linear: bool = False,
    backend: BackendName = "auto",
    when_dense_wins: WhenDenseWins = "mask",
) -> list[str]:
    """Gives every self-attention layer of a diffusers transformer a `BlockSparseAttnProcessor`, through the
    transformer's own `set_attn_processor`, which can also undo it. Returns the names of these layers.

    names: what these layers are called in their blocks.  coarse, linear: adds these branches, new for each layer and
    zero-initialised, so that they change nothing until trained. Their parameters are in the transformer's state dict
    under `processor.gate` and `processor.linear`, which a stock transformer does not have.
    Raises ValueError if no layer has one of these names."""
    processors: dict[str, Any] = dict(transformer.attn_processors)  # type: ignore[arg-type]
    chosen = [name for name in processors if name.split(".")[-2] in names]
    if not chosen:
        raise ValueError(f"no attention layer is called {' or '.join(names)}; there are {', '.join(processors)}")
    for name in chosen:
        layer: Any = transformer.get_submodule(name.removesuffix(".processor"))
        stock = processors[name]
        if isinstance(stock, BlockSparseAttnProcessor):
            stock = stock.stock
        weight = layer.to_q.weight
        gate = CoarseGate(weight.shape[1], layer.heads, weight.shape[0] // layer.heads).to(weight) if coarse else None
        branch = LinearBranch(weight.shape[0] // layer.heads).to(weight) if linear else None
        processors[name] = BlockSparseAttnProcessor(
            stock, layout, gate=gate, linear=branch, backend=backend, when_dense_wins=when_dense_wins
        )
    transformer.set_attn_processor(processors)  # type: ignore[operator]
    return chosen


def reorder_tokens(transformer: nn.Module, order: Tensor) -> list[torch.utils.hooks.RemovableHandle]:
    """Makes a Wan transformer work on tokens[order] from its first block to its last, reordering once per forward.

    order: [tokens] int64, such as `TileGrid.order()`. Positions follow their tokens, and so do time embeddings if each
    token has its own. The output is that of the stock transformer. Returns the hooks; remove them to undo this."""
    inverse = torch.argsort(order)
    blocks: Any = transformer.blocks

    def rotations(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part[:, order.to(part.device)] for part in output)

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, text, temb, *rest = args
        if module is blocks[0]:
            hidden_states = hidden_states[:, order.to(hidden_states.device)]
        if temb.ndim == 4:  # [B, tokens, 6, width]
            temb = temb[:, order.to(temb.device)]
        return hidden_states, text, temb, *rest

    def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output[:, inverse.to(output.device)]

    rope: Any = transformer.rope
    return [
        rope.register_forward_hook(rotations),
        *(block.register_forward_pre_hook(enter) for block in blocks),
        blocks[-1].register_forward_hook(leave),
    ]
