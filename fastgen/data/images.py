"""Folders of images, and how an image file is read into pixels."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.backbones.base import Backbone, BackboneConfig
from fastgen.batch import Conditioning
from fastgen.data.base import DataError
from fastgen.data.captioned import read_captioned
from fastgen.data.media import IMAGES
from fastgen.data.pictures import PictureError, picture_size, read_picture
from fastgen.data.samples import Samples, SampleSource
from fastgen.data.sizes import Side, check_buckets, check_sizes, placed, resolution
from fastgen.registry import here_or_shipped


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ImageData(SampleSource):
    """A folder of images (png, jpg, jpeg, webp) with captions; one that is not there is looked for among the files
    that ship with fastgen. Either each image has its caption in a .txt file of the
    same name, or the folder has one metadata.csv, .jsonl or .parquet with the column `file_name` and a caption column,
    in the layout of `datasets`.

    Images are resized to cover the backbone's resolution and centre-cropped. Smaller images are refused unless
    allow_upscaling is set. column: the caption column, by default `prompt`, `caption` or `text`. buckets: sizes
    (height, width) in place of that one, each picture at the one nearest to its own shape; see `buckets`.

    They are real data, or, for a backbone that makes its samples from images, these images."""

    folder: str
    column: str | None = None
    allow_upscaling: bool = False
    buckets: tuple[tuple[Side, Side], ...] = ()
    name: Literal["images"] = "images"

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"latents", "pixels", "images"})

    def fills(self, backbone: BackboneConfig) -> frozenset[str]:
        return picture_fills(super().fills(backbone))

    def check(self, backbone: Any) -> None:
        files, _ = self.read()
        sizes = ((str(f), picture_size(f, str(f))) for f in files)
        if self.buckets:
            check_buckets(backbone, self.buckets, list(sizes), self.allow_upscaling)
        else:
            check_sizes(sizes, resolution(backbone), self.allow_upscaling)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return self.buckets

    def samples(self, backbone: Backbone) -> Samples:
        files, captions = self.read()
        size_of, bucket_of = placed(backbone, self.buckets, lambda: [picture_size(f, str(f)) for f in files])
        return Samples(
            captions,
            torch.arange(len(files)),
            lambda i: read_image(files[i], size_of(i), str(files[i]), self.allow_upscaling),
            sizes=self.buckets,
            bucket_of=bucket_of,
        )

    def read(self) -> tuple[list[Path], list[str]]:
        """The image files and their captions. Raises ValueError if either are missing."""
        return read_captioned(here_or_shipped(self.folder), self.column, IMAGES)


def picture_fills(provides: frozenset[str]) -> frozenset[str]:
    """What a source of single pictures has for a backbone: either real data, or images to make samples from."""
    return provides - {"latents", "pixels"} if "images" in provides else provides


def encode_files(backbone: Backbone, files: Sequence[Path]) -> Conditioning:
    """What networks are told of these pictures, one row each, if samples are made from them. They are resized to cover
    what the backbone reads, smaller ones too, and their centre is cropped."""
    size = backbone.picture_size
    assert size is not None
    pictures = {file: read_image(file, size, str(file), allow_upscaling=True) for file in files}
    rows = {file: backbone.encode_image(pixels.to(backbone.device)) for file, pixels in pictures.items()}
    return Conditioning.cat([rows[file] for file in files])


def read_image(source: Path | BytesIO, size: tuple[int, int], where: str, allow_upscaling: bool) -> Tensor:
    """Pixels [3, H, W] in [0, 1], of `pictures.read_picture`. size: (H, W), which the resized image covers (bicubic,
    antialiased), and to which its centre is cropped. Raises DataError, naming `where`, if the image cannot be read or
    is too small."""
    try:
        return fitted(read_picture(source, where), size, where, allow_upscaling).float() / 255
    except PictureError as error:
        raise DataError(str(error)) from None


def fitted(image: Image.Image, size: tuple[int, int], where: str, allow_upscaling: bool) -> Tensor:
    """Bytes [3, H, W] of an RGB image, as in `read_image`. Raises DataError if it is too small."""
    from torchvision.transforms.functional import pil_to_tensor

    high, wide = size
    if (image.width < wide or image.height < high) and not allow_upscaling:
        raise DataError(
            f"{where} has {image.width}x{image.height} pixels, fewer than the backbone's {wide}x{high}; "
            "remove it or set data.allow_upscaling: true"
        )
    return pil_to_tensor(ImageOps.fit(image, (wide, high), Image.Resampling.BICUBIC))
