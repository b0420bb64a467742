"""Folders of images, and how an image file is read into pixels."""

import os
from collections.abc import Iterator, Sequence
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
from fastgen.data.base import DataError, Samples, SampleSource
from fastgen.data.pictures import IMAGE_SUFFIXES, PictureError, image_files, picture_size, read_picture
from fastgen.data.tables import check_text, choose_column, columns_of, read_columns, read_text
from fastgen.registry import here_or_shipped

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ImageData(SampleSource):
    """A folder of images (png, jpg, jpeg, webp) with captions; one that is not there is looked for among the files
    that ship with fastgen. Either each image has its caption in a .txt file of the
    same name, or the folder has one metadata.csv, .jsonl or .parquet with the column `file_name` and a caption column,
    in the layout of `datasets`.

    Images are resized to cover the backbone's resolution and centre-cropped. Smaller images are refused unless
    allow_upscaling is set. column: the caption column, by default `prompt`, `caption` or `text`.

    They are real data, or, for a backbone that makes its samples from images, these images."""

    folder: str
    column: str | None = None
    allow_upscaling: bool = False
    name: Literal["images"] = "images"

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"latents", "pixels", "images"})

    def fills(self, backbone: BackboneConfig) -> frozenset[str]:
        return picture_fills(super().fills(backbone))

    def check(self, backbone: Any) -> None:
        files, _ = self.read()
        check_sizes(((str(f), picture_size(f, str(f))) for f in files), resolution(backbone), self.allow_upscaling)

    def samples(self, backbone: Backbone) -> Samples:
        files, captions = self.read()
        size = backbone.picture_size
        assert size is not None
        return Samples(
            captions,
            torch.arange(len(files)),
            lambda i: read_image(files[i], size, str(files[i]), self.allow_upscaling),
        )

    def read(self) -> tuple[list[Path], list[str]]:
        """The image files and their captions. Raises ValueError if either are missing."""
        folder = here_or_shipped(self.folder)
        table = metadata_table(folder)
        return read_metadata(table, self.column) if table else self.read_beside(folder)

    def read_beside(self, folder: Path) -> tuple[list[Path], list[str]]:
        """The image files, and their captions from the text files next to them."""
        files = image_files(folder)
        if self.column is not None:
            raise ValueError(f"column: {folder} has none of {', '.join(METADATA)} and so no columns; leave column out")
        missing = [f.name for f in files if not f.with_suffix(".txt").is_file()]
        if missing:
            raise ValueError(
                f"folder: {len(missing)} images in {folder} have no caption, the first is {missing[0]}; put "
                "each caption in a .txt file with the image's name, or all captions in a metadata.csv"
            )
        return files, [read_text(f.with_suffix(".txt")) for f in files]


def metadata_table(folder: Path) -> Path | None:
    """The table with the captions of a folder's images, if there is one. Raises ValueError for two."""
    tables = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"folder: {folder} has {' and '.join(t.name for t in tables)}; keep only one of them")
    return tables[0] if tables else None


def read_metadata(table: Path, column: str | None) -> tuple[list[Path], list[str]]:
    """The images that a table lists, and their captions. Raises ValueError if an image or a caption is missing, and if
    an image in the folder is not in the table, which may have been cut."""
    columns = columns_of(table)
    if "file_name" not in columns:
        raise ValueError(f"{table} has no column file_name, only {', '.join(columns)}")
    column = choose_column([c for c in columns if c != "file_name"], column, str(table))
    names, values = read_columns(table, ["file_name", column])
    captions = [check_text(value, f"{column} in row {i} of {table}") for i, value in enumerate(values, 1)]
    files = [table.parent / check_text(n, f"file_name in row {i} of {table}") for i, n in enumerate(names, 1)]
    missing = next((i for i, f in enumerate(files) if not os.path.isfile(f)), None)  # False for any impossible name
    if missing is not None:
        raise ValueError(f"row {missing + 1} of {table} names {names[missing]}, which does not exist")
    if alone := unlisted(files, table.parent):
        number = "1 image that lies" if len(alone) == 1 else f"{len(alone)} images that lie"
        raise ValueError(
            f"{table} does not list {number} there, the first is {alone[0]}; add what is missing to the table, or "
            "move the images out of the folder"
        )
    return files, captions


def unlisted(listed: Sequence[Path], root: Path) -> list[Path]:
    """The images in a folder, and in the folders below it, that are not listed; sorted by name."""
    known = {os.path.normpath(file) for file in listed}
    found = (f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and os.path.normpath(f) not in known)
    return sorted(f for f in found if not f.is_dir())


def picture_fills(provides: frozenset[str]) -> frozenset[str]:
    """What a source of single pictures has for a backbone: either real data, or images to make samples from."""
    return provides - {"latents", "pixels"} if "images" in provides else provides


def resolution(config: BackboneConfig) -> tuple[int, int]:
    """Height and width in pixels of the pictures that the backbone reads, from its configs alone. Raises ValueError if
    it has no use for pictures."""
    try:
        size = config.build(torch.device("cpu"), torch.float32, 0).picture_size
    except OSError as error:
        raise ValueError(f"cannot read the configs of the backbone: {error}") from None
    if size is None:
        raise ValueError(f"name: image data needs a backbone that makes images, and {config.name} does not")
    return size


def check_sizes(
    sizes: Iterator[tuple[str, tuple[int, int] | None]], size: tuple[int, int], allow_upscaling: bool
) -> None:
    """Raises ValueError if a file is not an image, or if images are smaller than size, (height, width). sizes: pairs
    of a name and (width, height), or of a name and None for what is not an image."""
    small, (high, wide) = [], size
    for where, dimensions in sizes:
        if dimensions is None:
            raise ValueError(f"{where} is not a readable image; replace or remove it")
        if (dimensions[0] < wide or dimensions[1] < high) and not allow_upscaling:
            small.append((where, dimensions))
    if small:
        (where, (width, height)), count = small[0], len(small)
        number = "1 image is" if count == 1 else f"{count} images are"
        raise ValueError(
            f"{number} smaller than the backbone's {wide}x{high} pixels, the first is {where} with "
            f"{width}x{height}; remove them, set data.allow_upscaling: true, or train at a lower resolution"
        )


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
    from torchvision.transforms.functional import pil_to_tensor

    try:
        image = read_picture(source, where)
    except PictureError as error:
        raise DataError(str(error)) from None
    high, wide = size
    if (image.width < wide or image.height < high) and not allow_upscaling:
        raise DataError(
            f"{where} has {image.width}x{image.height} pixels, fewer than the backbone's {wide}x{high}; "
            "remove it or set data.allow_upscaling: true"
        )
    return pil_to_tensor(ImageOps.fit(image, (wide, high), Image.Resampling.BICUBIC)).float() / 255
