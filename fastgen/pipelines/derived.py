"""Network classes of our own that are made of a stock class: their constructors, and how they take over a network."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config


def extending(stock: type, complete: Callable[[Any], None], **own: Any) -> Callable[..., None]:
    """The `__init__` of a subclass of `stock`. diffusers reads from its signature what config.json may hold: the
    settings in `own`, with these defaults, and those of the stock constructor.

    complete(network) adds what the class has besides the stock network."""

    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        stock.__init__(self, **{k: v for k, v in self.config.items() if k in stock_settings})  # type: ignore[misc]
        complete(self)

    first, *parameters = inspect.signature(stock.__init__).parameters.values()  # type: ignore[misc]
    stock_settings = {p.name for p in parameters}
    keyword = inspect.Parameter.KEYWORD_ONLY
    mine = [inspect.Parameter(name, keyword, default=default) for name, default in own.items()]
    both = [first, *(p.replace(kind=keyword) for p in parameters), *mine]
    __init__.__signature__ = inspect.Signature(both)  # type: ignore[attr-defined]
    return register_to_config(__init__)


def taken_over(cls: type, network: Any, **settings: Any) -> Any:
    """A network of class `cls` (with an `extending` constructor) that shares all weights with a stock network, with
    these settings. What it has besides is not initialised, and is on the meta device."""
    with torch.device("meta"):
        made = cls.from_config({**network.config, **settings})  # type: ignore[attr-defined]
    for name, module in network.named_children():
        setattr(made, name, module)
    for name, tensor in (*network.named_parameters(recurse=False), *network.named_buffers(recurse=False)):
        setattr(made, name, tensor)
    if "kept_width" in vars(network):  # a narrower network (modules.kept_heads)
        made.kept_width = network.kept_width
    return made.train(network.training)
