"""The interface of a data source. Samples are addressed by their global position in a stream, so that a run resumes at
the sample where it stopped, and ranks and micro-batches split one stream."""

from abc import ABC, abstractmethod
from concurrent.futures import Executor
from typing import Any, ClassVar

from torch import Tensor

from fastgen.backbones.base import Backbone, BackboneConfig
from fastgen.batch import Batch, Conditioning
from fastgen.data.readers import READERS


class DataError(RuntimeError):
    """Data cannot be read during a run. The message names the sample or the data set."""


class DataSource(ABC):
    """The recipe's `data:` section; subclasses are frozen pydantic dataclasses."""

    name: str
    encodes_prompts: ClassVar[bool] = True  # False if the source stores embeddings, so that no text encoder is needed

    @property
    def provides(self) -> frozenset[str]:
        """What the source has in addition to the prompts: any of latents, pixels and pairs, which are fields of Batch,
        images or controls, from which a backbone may make its samples, and sound, which its latents may have, or from
        which it makes them."""
        return frozenset()

    def fills(self, backbone: BackboneConfig) -> frozenset[str]:
        """What of this a backbone gets."""
        unused = {"images", "controls", "sound"} - backbone.given
        return self.provides - (unused if backbone.encodes_data else unused | {"latents"})

    def check(self, backbone: Any) -> None:  # noqa: B027 - most sources have nothing to check
        """Raises ValueError, before weights load, if files are missing or the backbone's config does not fit."""

    def settled(self, backbone: BackboneConfig) -> "DataSource":
        """This source with the settings that it takes from the backbone filled in."""
        return self

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes (H, W) of pictures, if there are several; one update sees one of them."""
        return ()

    @abstractmethod
    def open(self, backbone: Backbone, seed: int, unit: int = 1, readers: int = READERS) -> "Stream":
        """The stream of this source. Its order depends on the seed alone, and with pictures of several sizes on
        `unit`, the number of prompts of an update. readers: how many threads read pictures. Called once."""


class Stream(ABC):
    """Prompts, images, latents, pixels and pairs, looked up by global sample positions [B] int64."""

    @abstractmethod
    def prompts(self, positions: Tensor) -> list[str]:
        """One prompt per position."""

    def size(self, positions: Tensor) -> tuple[int, int] | None:
        """Height and width of the pictures of these positions, if the source has several sizes."""
        return None

    def images(self, positions: Tensor) -> Conditioning | None:
        """The images, control videos or sounds from which the samples at the same positions are made, as
        `Backbone.encode_images` gives them, on the CPU; None if the backbone takes nothing."""
        return None

    def latents(self, positions: Tensor) -> Tensor | None:
        """Latents of real data [B, *latent_shape] for the same positions; None if the source has no real data."""
        return None

    def pixels(self, positions: Tensor) -> Tensor | None:
        """Real images [B, 3, H, W] in [0, 1] for the same positions, or videos [B, F, 3, H, W]; None if the source has
        neither."""
        return None

    def pairs(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """The teacher's ODE pairs (noise, x0), [B, *latent_shape] each, for the prompts of the same positions; None if
        the source has no pairs."""
        return None


def make_batch(
    stream: Stream,
    backbone: Backbone,
    positions: Tensor,
    key: int,
    needs: frozenset[str],
    group_size: int = 1,
    other: Executor | None = None,
) -> Batch:
    """The batch at these global positions, in the backbone's dtype. `needs` lists the optional fields to fill.

    group_size: this many consecutive positions form one prompt group, and all of them read one row of the data. other:
    a thread, if there is one, in which real data are read and encoded while prompts are. Raises ValueError if a group
    is incomplete, because the samples of a group are compared with each other."""
    group = positions // group_size
    if group_size > 1 and bool((group.unique(return_counts=True)[1] != group_size).any()):
        raise ValueError(
            f"positions {int(positions[0])} to {int(positions[-1])} split a prompt group of {group_size}"
            "; make train.batch_size a multiple of objective.group_size"
        )
    prompts, size, shape = stream.prompts(group), stream.size(group), backbone.latent_shape
    images = stream.images(group)
    coming = None if other is None else other.submit(real_data, stream, group, needs)
    cond, uncond = backbone.encode_both(prompts, images)
    latents, pixels = real_data(stream, group, needs) if coming is None else coming.result()
    if size is not None:
        cond, uncond = backbone.told_size(cond, size), backbone.told_size(uncond, size)
        shape = backbone.latent_shape_of(size)
    pairs = stream.pairs(group) if "pairs" in needs else None
    device = backbone.device
    return Batch(
        ids=positions.to(device),
        key=key,
        cond=cond,
        uncond=uncond,
        latent_shape=shape,
        prompts=tuple(prompts),
        latents=None if latents is None else latents.to(device, backbone.dtype),
        pixels=None if pixels is None else pixels.to(device, backbone.dtype),
        pairs=None if pairs is None else (pairs[0].to(device, backbone.dtype), pairs[1].to(device, backbone.dtype)),
        group=group.to(device),
        dtype=backbone.dtype,
    )


def real_data(stream: Stream, positions: Tensor, needs: frozenset[str]) -> tuple[Tensor | None, Tensor | None]:
    """The latents and the pixels of these positions, those that `needs` lists."""
    latents = stream.latents(positions) if "latents" in needs else None
    return latents, stream.pixels(positions) if "pixels" in needs else None
