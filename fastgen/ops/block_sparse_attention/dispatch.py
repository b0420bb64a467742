"""The choice of the backend that computes a call: the caller names it, or `auto` chooses one and logs the choice.

Every backend computes the same function. A named backend that cannot do a call raises an error with the reason. From
the density on at which dense attention is faster on this device, `auto` uses SDPA instead of the sparse kernels.
"""

import dataclasses
import functools
import logging
from typing import Literal

import torch
from torch import Tensor

from fastgen.ops.block_sparse_attention.backends import BACKENDS, Call
from fastgen.ops.block_sparse_attention.break_even import break_even_density
from fastgen.ops.block_sparse_attention.layout import BlockLayout, dense_layout
from fastgen.ops.block_sparse_attention.naive import Cache, check_shapes
from fastgen.ops.block_sparse_attention.result import Result
from fastgen.ops.block_sparse_attention.tiles import Tiles

BackendName = Literal["auto", "triton", "flex_attention", "xformers", "sdpa", "naive"]
WhenDenseWins = Literal["mask", "full", "stay"]

# the order in which `auto` tries backends; xformers, which expands the mask like SDPA, is used only when named
AUTO = {"cuda": ("triton", "flex_attention", "sdpa", "naive"), "cpu": ("sdpa", "naive")}
SPARSE = ("triton", "flex_attention")

logger = logging.getLogger(__name__)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    cache: Cache | None = None,
    scale: float | None = None,
    grad_keys: tuple[int, int] | None = None,
    needs_lse: bool = False,
    backend: BackendName = "auto",
    when_dense_wins: WhenDenseWins = "mask",
    break_even: float | None = None,
) -> Result:
    """The tensors, cache, scale and grad_keys are as in `naive_attention`. needs_lse: whether result.lse will be used;
    if not, some backends return None for it.

    when_dense_wins: what `auto` does with a layout whose density is at least the break-even density. `mask` calls SDPA
    with the same mask, which computes the same function. `full` attends to every row in a tile: a selected layout
    approximates that, but a causal layout must not become it. `stay` keeps the sparse kernel.
    break_even: that density. By default it is measured once on each device and cached; give it where several processes
    must agree. A layout whose density is not known on the host always stays sparse.

    Raises ValueError with the reason if a named backend cannot do the call."""
    check_shapes(query, key, value, layout, cache)
    call = Call(query, key, value, layout, cache, scale, grad_keys, needs_lse)
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}")
        reason = BACKENDS[backend].refusal(call)
        if reason is not None:
            raise ValueError(f"backend {backend} cannot do this: {reason}")
        return BACKENDS[backend].run(call)
    name, call = choose(call, when_dense_wins, break_even)
    return BACKENDS[name].run(call)


def choose(call: Call, when_dense_wins: WhenDenseWins, break_even: float | None) -> tuple[str, Call]:
    """The backend of an `auto` call, and the call, which covers all tiles if dense wins and `full` was asked for."""
    refused = []
    for name in AUTO.get(call.query.device.type, ("sdpa", "naive")):
        reason = BACKENDS[name].refusal(call)
        if reason is None:
            break
        refused.append(f"not {name}: {reason}")
    because = "; ".join(refused)
    if name not in SPARSE or when_dense_wins == "stay" or call.layout.density is None:
        log_once(name, because, warn=bool(refused))
        return name, call
    dense = "full" if call.layout.sees_all else when_dense_wins  # nothing is hidden: SDPA needs no mask
    reason = BACKENDS["sdpa"].refusal(widened(call) if when_dense_wins == "full" else call)
    if reason is not None:
        log_once(name, f"{because}; not sdpa, however dense: {reason}".removeprefix("; "), warn=False)
        return name, call
    limit = break_even_density(call, name, dense) if break_even is None else break_even
    side = "at least" if call.layout.density >= limit else "below"
    compared = f"density {call.layout.density:.3f} is {side} the break-even density {limit:.3f}"
    because = f"{because}; {compared}".removeprefix("; ")
    if side == "below":
        log_once(name, because, warn=bool(refused))
        return name, call
    log_once(f"sdpa ({when_dense_wins})", because, warn=True)
    return "sdpa", widened(call) if when_dense_wins == "full" else call


def widened(call: Call) -> Call:
    """The same call, with every pair of tiles visible."""
    return dataclasses.replace(call, layout=all_pairs(call.layout.q_tiles, call.layout.k_tiles, call.query.device))


@functools.lru_cache(maxsize=64)
def all_pairs(q_tiles: Tiles, k_tiles: Tiles, device: torch.device) -> BlockLayout:
    return dense_layout(q_tiles, k_tiles).to(device)


@functools.lru_cache(maxsize=1024)
def log_once(name: str, because: str, warn: bool) -> None:
    """Logs each choice with its reason once, as a warning where the first choice was not taken."""
    logger.log(logging.WARNING if warn else logging.INFO, "attention by %s%s", name, f": {because}" if because else "")
