"""Activation checkpointing that recomputes a forward under the settings it first ran under."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

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
