"""The text encoders of a pipeline: loaded without the rest of it, and off the device between uses if asked for."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastgen.backbones.folder import OPTIONAL
from fastgen.backbones.loading import read_component
from fastgen.modules.sharding import WeightsError

NETWORKS = (
    "transformer",
    "transformer_2",
    "unet",
    "vae",
    "audio_vae",
    "vocoder",
)  # that encoding prompts does not need


def load_text_pipeline(
    cls: Any, source: str, components: Mapping[str, Any], options: dict[str, Any], parts: Mapping[str, Any]
) -> Any:
    """The stock pipeline, of class `cls`, without the parts that make or check images. Raises WeightsError if a text
    encoder, a tokenizer or the scheduler cannot be loaded. parts: those that its constructor asks for all the same,
    without weights; they are taken away afterwards."""
    given: dict[str, Any] = {name: None for name in (*NETWORKS, *OPTIONAL) if name in components} | dict(parts)
    if "safety_checker" in given:
        given["requires_safety_checker"] = False  # it makes no images
    import transformers

    for name, entry in components.items():
        if name.startswith("text_encoder") and isinstance(entry, list) and entry[0] == "transformers":
            given[name] = read_component(getattr(transformers, entry[1]), source, name, options)
    try:
        pipeline = cls.from_pretrained(source, **given, **options)
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        raise WeightsError(f"path: cannot load the text encoders and the scheduler of {source}: {error}") from None
    for name in parts:
        setattr(pipeline, name, None)
    logger = logging.getLogger(cls.__module__)
    logger.filters = [kept for kept in logger.filters if not isinstance(kept, Once)]  # of a pipeline before this one
    logger.addFilter(Once("part of your input was truncated"))
    return pipeline


class Once(logging.Filter):
    """Lets the first warning with these words through, and no other: a stock pipeline warns of every prompt that is
    longer than its encoder reads."""

    def __init__(self, words: str):
        super().__init__()
        self.words, self.said = words, False

    def filter(self, record: logging.LogRecord) -> bool:
        if self.words not in record.getMessage():
            return True
        said, self.said = self.said, True
        return not said


@contextmanager
def on_device(pipeline: Any, device: torch.device) -> Iterator[None]:
    """The frozen networks of a pipeline are on the device inside. Afterwards they are where they were, in the same
    memory: nothing is copied back."""
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    before = [tensor.data for tensor in tensors]
    for tensor, data in zip(tensors, before, strict=True):
        tensor.data = data.to(device)
    try:
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data
