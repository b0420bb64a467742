"""Finite data sets with random access to their rows, in the order of a run."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone
from fastgen.backbones.given import Control, GivenSound
from fastgen.batch import Conditioning
from fastgen.data.base import DataSource, Stream
from fastgen.data.order import bucketed, shuffled
from fastgen.data.pairs import Pairs
from fastgen.data.readers import READERS, Readers

LATENT_BYTES = 1 << 30  # of latents that a stream caches; pictures beyond that are read and encoded every time


class Sounding(NamedTuple):
    """A video [F, 3, H, W] and its sound [moments, bins]."""

    pixels: Tensor
    sound: Tensor


Pixels = Tensor | Sounding  # pictures, or a video with its sound


@dataclasses.dataclass(frozen=True)
class Samples:
    """A finite data set, by row. Row i has the prompt prompts[i] and, if there are images, the picture number
    pictures[i] (pictures: [N] int64). read(number) gives that picture's pixels, [3, H, W] in [0, 1], at the backbone's
    `picture_size`, or those of a video, [F, 3, H, W]. Several rows may share a picture.

    views: how many numbers each entry p of `pictures` stands for, p * views and those after it. They are shown in
    turn, one in each epoch of the rows.

    sizes: if pictures have several sizes (H, W), these, and picture p is read at sizes[bucket_of[p]] (bucket_of: [P]
    int64) instead of `picture_size`.

    A backbone that makes its samples from images is given the pictures, or the first ones of the videos; one that
    takes control videos, read_control(number). Without real data, there is only this.

    read_sound(number): the sound of a video, [moments, bins], for a backbone whose videos have sound, or which makes
    its samples from one (`streaming.sound`). sound_given: which of both."""

    prompts: Sequence[str]
    pictures: Tensor | None = None
    read: Callable[[int], Tensor] | None = None
    views: int = 1
    sizes: tuple[tuple[int, int], ...] = ()
    bucket_of: Tensor | None = None
    read_control: Callable[[int], Control] | None = None
    read_sound: Callable[[int], Tensor] | None = None
    sound_given: bool = False

    def read_data(self, picture: int) -> "Pixels":
        """What is encoded to latents."""
        assert self.read is not None
        pixels = self.read(picture)
        if self.read_sound is None or self.sound_given:
            return pixels
        return Sounding(pixels, self.read_sound(picture))

    def read_given(self, picture: int) -> Tensor | Control | GivenSound:
        """What a sample is made from."""
        if self.sound_given:
            assert self.read_sound is not None
            return GivenSound(self.read_sound(picture))
        found = self.read_control or self.read
        assert found is not None
        return found(picture)

    @property
    def num_pictures(self) -> int:
        return 0 if self.pictures is None else (int(self.pictures.max()) + 1) * self.views

    def of_buckets(self) -> list[Tensor]:
        """The numbers of the pictures of each size, in order; [] if there is one size."""
        if self.bucket_of is None:
            return []
        return [(self.bucket_of == bucket).nonzero()[:, 0] for bucket in range(len(self.sizes))]

    def shown(self, rows: Tensor, epochs: Tensor) -> list[int]:
        """The numbers of the pictures of rows [B] in these epochs [B]. With ODE pairs, pair i is of epoch i // N."""
        assert self.pictures is not None
        return (self.pictures[rows] * self.views + epochs % self.views).tolist()


class SampleSource(DataSource):
    """A source with random access to its rows. `fastgen prepare` can store its prompts and latents."""

    @abstractmethod
    def samples(self, backbone: Backbone) -> Samples:
        """All rows. An image is read only when it is needed."""

    def open(self, backbone: Backbone, seed: int, unit: int = 1, readers: int = READERS) -> Stream:
        return SampleStream(self.samples(backbone), backbone, noise.make_key(seed, "data"), None, unit, readers)


class SampleStream(Stream):
    """The rows of a data set, in a different random order in each epoch. With ODE pairs, the pairs are shuffled
    instead, and each pair gives the row of its prompt. With pictures of several sizes, the order is `order.bucketed`,
    and `unit` rows that follow each other from a multiple of `unit` on have one size.

    Up to a gigabyte of latents, and of what is told of images, is
    cached in memory."""

    def __init__(
        self,
        samples: Samples,
        backbone: Backbone,
        key: int,
        pairs: Pairs | None = None,
        unit: int = 1,
        readers: int = READERS,
    ):
        self._samples, self._backbone, self._key, self._pairs, self._unit = samples, backbone, key, pairs, unit
        self._latents, self._images = dict[int, Tensor](), dict[int, Conditioning]()
        self._readers = Readers(readers)

    def rows(self, positions: Tensor) -> Tensor:
        """The row of each position, [B] int64."""
        if self._pairs is not None:
            return self._pairs.sample_of[self._pairs.index(positions, self._key)]
        if self._samples.sizes:
            return bucketed(positions, self.buckets, self._unit, self._key)
        return shuffled(positions, len(self._samples.prompts), self._key)

    @cached_property
    def buckets(self) -> Tensor:
        """The bucket of each row, [N]."""
        assert self._samples.bucket_of is not None and self._samples.pictures is not None
        return self._samples.bucket_of[self._samples.pictures]

    def size(self, positions: Tensor) -> tuple[int, int] | None:
        if not self._samples.sizes:
            return None
        buckets = self.buckets[self.rows(positions)].unique().tolist()
        if len(buckets) > 1:
            raise ValueError(f"positions {positions.tolist()} are of several updates, whose pictures differ in size")
        return self._samples.sizes[buckets[0]]

    def pairs(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if self._pairs is None else self._pairs[self._pairs.index(positions, self._key)]

    def prompts(self, positions: Tensor) -> list[str]:
        return [self._samples.prompts[i] for i in self.rows(positions).tolist()]

    def pictures(self, positions: Tensor) -> list[int]:
        """The number of the picture of each position, in a data set that has some."""
        order = positions if self._pairs is None else self._pairs.index(positions, self._key)
        return self._samples.shown(self.rows(positions), order // len(self._samples.prompts))

    def pixels(self, positions: Tensor) -> Tensor | None:
        if self._samples.pictures is None or self._samples.read is None:
            return None
        return torch.stack(list(self._readers.each(self._samples.read, self.pictures(positions))))

    def images(self, positions: Tensor) -> Conditioning | None:
        if self._samples.pictures is None or not self._backbone.takes_given:
            return None
        return Conditioning.cat(self.picture_images(self.pictures(positions)))

    def latents(self, positions: Tensor) -> Tensor | None:
        if self._samples.pictures is None:
            return None
        return torch.stack(self.picture_latents(self.pictures(positions)))

    def picture_latents(self, pictures: list[int]) -> list[Tensor]:
        """The latent of each picture, [*latent_shape], on the CPU."""
        return self.encoded(pictures, self._latents, self._samples.read_data, encode_picture)

    def picture_images(self, pictures: list[int]) -> list[Conditioning]:
        """What networks are told of each picture, one row, on the CPU."""
        return self.encoded(pictures, self._images, self._samples.read_given, encode_given_picture)

    def encoded(
        self,
        pictures: list[int],
        kept: dict[int, Any],
        read: Callable[[int], Any],
        encode: Callable[[Backbone, Any], Any],
    ) -> Any:
        """What `encode` makes of what is read of each picture, several files at a time. Those that are new are kept,
        up to a gigabyte."""
        new = [i for i in dict.fromkeys(pictures) if i not in kept]
        values = zip(new, self._readers.each(read, new), strict=True)
        fresh = {i: encode(self._backbone, value) for i, value in values}
        found = [fresh[i] if i in fresh else kept[i] for i in pictures]
        for picture, value in fresh.items():
            if (len(kept) + 1) * value.nbytes <= LATENT_BYTES:
                kept[picture] = value
        return found


def encode_picture(backbone: Backbone, given: Pixels) -> Tensor:
    """The latent [*latent_shape], on the CPU, of pixels [3, H, W] or [F, 3, H, W], or of a video with its sound. Every
    image is encoded alone. In a batch, the last bits of its latent would depend on the other images, and so, in a
    resumed run, on where the run was stopped."""
    if isinstance(given, Sounding):
        latents = backbone.encode(given.pixels[None].to(backbone.device))
        return backbone.with_sound(latents, given.sound[None])[0].cpu()
    return backbone.encode(given[None].to(backbone.device))[0].cpu()


def encode_given_picture(backbone: Backbone, given: Tensor | Control | GivenSound) -> Conditioning:
    """One row, on the CPU: what networks are told of a picture [3, H, W], of the first one of a video [F, 3, H, W], of
    a control video, or of a sound."""
    if isinstance(given, GivenSound):
        return backbone.encode_sound(given.moments.to(backbone.device)).to("cpu")
    if isinstance(given, Control):
        return backbone.encode_control(given.to(backbone.device)).to("cpu")
    return backbone.encode_image((given[0] if given.dim() == 4 else given).to(backbone.device)).to("cpu")
