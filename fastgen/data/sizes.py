"""The sizes at which pictures are read: that of the backbone, or buckets, and whether pictures are large enough.

A bucket is a size (height, width) besides the backbone's own. Every picture is read at one of them, and all samples of
an update have the same (`order.bucketed`)."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fastgen.backbones.base import Backbone, BackboneConfig
from fastgen.data.media import IMAGES, Medium
from fastgen.registry import MOST_WIDTH

Side = Annotated[int, Field(ge=16, le=MOST_WIDTH)]
Buckets = tuple[tuple[int, int], ...]


def resolution(config: BackboneConfig) -> tuple[int, int]:
    """Height and width in pixels of the pictures that the backbone reads, from its configs alone. Raises ValueError if
    it has no use for pictures."""
    try:
        size = config.build(torch.device("cpu"), torch.float32, 0).picture_size
    except OSError as error:
        raise ValueError(f"cannot read the configs of the backbone: {error}") from None
    if size is None:
        videos = "; data of videos is {name: videos}" if config.output == "frames" else ""
        raise ValueError(f"name: image data needs a backbone that makes images, and {config.name} does not{videos}")
    return size


def check_sizes(
    sizes: Iterable[tuple[str, tuple[int, int] | None]],
    size: tuple[int, int],
    allow_upscaling: bool,
    medium: Medium = IMAGES,
    whose: str = "the backbone's",
) -> None:
    """Raises ValueError if a file is not an image, or if images are smaller than size, (height, width). sizes: pairs
    of a name and (width, height), or of a name and None for what is not an image."""
    small, (high, wide) = [], size
    for where, dimensions in sizes:
        if dimensions is None:
            raise ValueError(f"{where} is not a readable {medium.word}; replace or remove it")
        if (dimensions[0] < wide or dimensions[1] < high) and not allow_upscaling:
            small.append((where, dimensions))
    if small:
        (where, (width, height)), count = small[0], len(small)
        number = f"1 {medium.word} is" if count == 1 else f"{count} {medium.word}s are"
        raise ValueError(
            f"{number} smaller than {whose} {wide}x{high} pixels, the first is {where} with "
            f"{width}x{height}; remove them, set data.allow_upscaling: true, or train at a lower resolution"
        )


def check_buckets(
    config: BackboneConfig,
    buckets: Buckets,
    sizes: Sequence[tuple[str, tuple[int, int] | None]],
    allow_upscaling: bool,
) -> None:
    """Raises ValueError for buckets that the backbone does not take, and as `check_sizes`."""
    resolution(config)
    backbone = config.build(torch.device("cpu"), torch.float32, 0)
    if backbone.takes_image:
        raise ValueError(f"buckets: backbone {config.name} is given pictures of one size; leave buckets out")
    for i, size in enumerate(buckets):
        try:
            backbone.latent_shape_of(size)
        except ValueError as error:
            raise ValueError(f"buckets: {error}") from None
        if size in buckets[:i]:
            raise ValueError(f"buckets: {list(size)} is there twice; remove one")
    check_sizes((pair for pair in sizes if pair[1] is None), buckets[0], allow_upscaling)
    bucket_of = assigned([size for _, size in sizes], buckets)
    for bucket, size in enumerate(buckets):
        of_bucket = [pair for pair, own in zip(sizes, bucket_of.tolist(), strict=True) if own == bucket]
        check_sizes(of_bucket, size, allow_upscaling, whose="the bucket's")


def placed(
    backbone: Backbone, buckets: Buckets, picture_sizes: Callable[[], Sequence[tuple[int, int] | None]]
) -> tuple[Callable[[int], tuple[int, int]], Tensor | None]:
    """The size at which each picture is read, and the buckets, if there are any, [P] int64."""
    if not buckets:
        size = backbone.picture_size
        assert size is not None
        return lambda _: size, None
    bucket_of = assigned(picture_sizes(), buckets)
    return lambda i: buckets[int(bucket_of[i])], bucket_of


def assigned(sizes: Sequence[tuple[int, int] | None], buckets: Buckets) -> Tensor:
    """The bucket of each picture, [P] int64: the one whose shape is nearest to its own, by the logarithm of height by
    width; of those, the largest that the picture covers, or else the smallest. sizes: (width, height)."""

    def distance(size: tuple[int, int] | None, bucket: tuple[int, int]) -> tuple[float, bool, int]:
        wide, high = size or (1, 1)
        ratio, area = math.log(high / wide * bucket[1] / bucket[0]), bucket[0] * bucket[1]
        covers = high >= bucket[0] and wide >= bucket[1]
        return round(abs(ratio), 9), not covers, -area if covers else area

    return torch.tensor([min(range(len(buckets)), key=lambda k: distance(size, buckets[k])) for size in sizes])
