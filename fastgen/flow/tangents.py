"""Directional derivatives of networks, by forward-mode differentiation or by finite differences.

A training step of MeanFlow, sCM or the semigradient Lagrangian loss takes two passes. First, `tangent` gives a value
and a derivative without gradient. Then an ordinary forward of the network carries the gradient; it can use fast
attention, activation checkpointing and the hooks that shard the network. Losses with gradient *through* a derivative
(Lagrangian and Eulerian) use `live_tangent`.

Forward mode needs the MATH backend of scaled_dot_product_attention, which stores the whole attention matrix. For long
videos, use finite differences. tests/test_tangents.py shows what works with the installed torch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.schedule import expand

Backend = Literal["jvp", "difference"]


def tangent(
    fn: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    backend: Backend = "jvp",
    step: float = 5e-3,
    room: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """fn(*primals) and its derivative along the tangents, both without gradient: [B, ...] each.

    backend: jvp is exact; difference evaluates fn at -step and +step as well, within `room`, see `difference`.
    Attention uses the MATH backend, and autocast is off, because a derivative in bfloat16 is noise. The random state
    is restored, so that the forward that follows draws the same dropout. Under no_grad, diffusers does not checkpoint
    activations."""
    primals = [p.detach().clone(memory_format=torch.contiguous_format) for p in primals]
    tangents = [v.detach().clone(memory_format=torch.contiguous_format) for v in tangents]
    device = primals[0].device
    cuda = [device] if device.type == "cuda" else []
    with torch.no_grad(), math_attention(), torch.random.fork_rng(cuda), torch.autocast(device.type, enabled=False):
        if backend == "jvp":
            value, derivative = forward_mode(fn, primals, tangents)
        else:
            value, derivative = difference(fn, primals, tangents, step, room)
    torch.clear_autocast_cache()
    return value, derivative


def live_tangent(
    fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """fn(*primals) and its derivative along the tangents, both with gradient to the parameters inside fn (reverse over
    forward mode). Attention uses the MATH backend, and autocast is off. Does not work with activation checkpointing.
    """
    with math_attention(), torch.autocast(primals[0].device.type, enabled=False):
        return forward_mode(fn, primals, tangents)


def forward_mode(fn: Callable[..., Any], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Any, Any]:
    value, derivative = jvp(fn, tuple(primals), tuple(tangents))  # type: ignore[misc]
    return value, derivative


@contextmanager
def math_attention() -> Iterator[None]:
    """Selects the only backend of scaled_dot_product_attention that has a forward-mode derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def difference(
    fn: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    step: float,
    room: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """fn(*primals) and (fn(p + a v) - fn(p - b v)) / (a + b), for the same random state, combined in float64.

    a = b = step, or less where room limits them: [B] each, how far a sample may move forward and back (b = 0 gives the
    forward difference). Steps near 5e-3 in t (AnyFlow's 5 of 1000) smooth networks whose time embedding oscillates as
    fast. With steps below 1e-3 a float32 difference is noise; a bfloat16 difference always is."""
    ahead = behind = primals[0].new_full((len(primals[0]),), step)
    if room is not None:
        ahead, behind = torch.minimum(ahead, room[0].to(ahead)), torch.minimum(behind, room[1].to(behind))

    def at(distance: Tensor) -> Tensor:
        moved = [p + expand(distance, p) * v for p, v in zip(primals, tangents, strict=True)]
        with torch.random.fork_rng([primals[0].device] if primals[0].device.type == "cuda" else []):
            return fn(*moved)

    value, above, below = at(torch.zeros_like(ahead)), at(ahead), at(-behind)
    total = expand((ahead + behind).double().clamp_min(1e-12), value)
    return value, ((above.double() - below.double()) / total).to(value.dtype)
