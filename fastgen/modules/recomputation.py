"""Activation checkpointing that finds, when it repeats a forward, the settings the forward ran under."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch.utils.checkpoint import checkpoint

Setting = Callable[[], AbstractContextManager]

_active: list[Setting] = []


@contextmanager
def remembered(setting: Setting) -> Iterator[None]:
    """While inside, every checkpointed forward notes `setting`, to enter it again when it is repeated in the backward
    pass: which adapter is on, which networks are frozen."""
    _active.append(setting)
    try:
        yield
    finally:
        _active.remove(setting)


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) without keeping its activations; for diffusers' `enable_gradient_checkpointing`."""
    settings = tuple(_active)
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again(settings)))


@contextmanager
def again(settings: tuple[Setting, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting())
        yield
