"""Activation checkpointing that recomputes a forward under the settings it first ran under."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Setting = Callable[[], AbstractContextManager]

_active: list[Setting] = []


@contextmanager
def remembered(setting: Setting) -> Iterator[None]:
    """Checkpointed forwards inside this context remember `setting`, such as which adapter is on or which networks are
    frozen. They enter it again when the backward pass recomputes them."""
    _active.append(setting)
    try:
        yield
    finally:
        _active.remove(setting)


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """Calls function(*args) without keeping its activations. For diffusers' `enable_gradient_checkpointing`."""
    settings = tuple(_active)
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again(settings)))


@contextmanager
def again(settings: tuple[Setting, ...]) -> Iterator[None]:
    """Enters all the settings."""
    with ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting())
        yield


class Replay(torch.autograd.Function):
    """apply(replay, anchor, *values): the values, as if they had been computed with gradient.

    replay(grads) is called once by the backward pass, with the gradients of all values. It computes the values again,
    part by part, and passes the gradients on to the parameters itself. anchor: a scalar that requires gradient, as
    the values, computed without it, do not. Settings and autocast are those of the call (`remembered`)."""

    @staticmethod
    def forward(ctx: Any, replay: Callable[[tuple[Tensor, ...]], None], anchor: Tensor, *values: Tensor) -> Any:
        ctx.replay, ctx.settings = replay, tuple(_active)
        device = values[0].device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.autocast = lambda: torch.autocast(device, dtype, enabled, torch.is_autocast_cache_enabled())
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with again(ctx.settings), ctx.autocast():
            ctx.replay(grads)
        return (None, None, *(None for _ in grads))
