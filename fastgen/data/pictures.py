"""How every image file is read: for training, preparing, measuring, scoring and references alike.

A picture is rotated as its EXIF data says. What is transparent shows white, so that colours that a file hides under
alpha do not appear. 16-bit greyscale is scaled to 8 bits. The first frame of an animation is taken. Modes whose scale
nobody can know (32-bit integers, floating point) are refused."""

import math
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fastgen.data.media import IMAGES

ORIENTATION = 0x0112  # the tag of EXIF data
UNKNOWN_SCALE = ("I", "F")  # modes of Pillow: 32-bit integers, floating point


class PictureError(ValueError):
    """An image that cannot be read; the message names it."""


def read_picture(source: Path | BytesIO, where: str) -> Image.Image:
    """The image as 8-bit RGB. where: its name in messages. Raises PictureError for whatever is not a whole image."""
    check_regular(source, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as file:
                file.load()
                return to_rgb(ImageOps.exif_transpose(file))
    except PictureError as error:
        raise PictureError(f"cannot read the image {where}: {error}") from None
    except Exception as error:  # a decoder of a foreign file may raise anything
        raise PictureError(f"cannot read the image {where}: {error}; replace or remove it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode with a known scale. Raises PictureError for the others."""
    if image.mode in UNKNOWN_SCALE:
        raise PictureError(
            f"its mode is {image.mode}, whose scale is not known; convert it to 8 or 16 bits per channel"
        )
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def picture_size(source: Path | BytesIO, where: str) -> tuple[int, int] | None:
    """Width and height as `read_picture` would give them, from the header alone; None for what it would refuse."""
    try:
        check_regular(source, where)
        with Image.open(source) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf) or image.mode in UNKNOWN_SCALE:
                return None
            turned = orientation(image) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except Exception:  # as in read_picture
        return None


def orientation(image: Image.Image) -> int:
    """How `ImageOps.exif_transpose` turns an image, from its header alone: of a PNG, whose EXIF data may come last, if
    they come first."""
    if image.format != "PNG":
        return image.getexif().get(ORIENTATION, 1)
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    return exif.get(ORIENTATION, 1)


def check_regular(source: Path | BytesIO, where: str) -> None:
    """Raises PictureError for a pipe or a device, which would never end."""
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise PictureError(f"{where} is not a file")


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name. Raises ValueError if there are none."""
    return IMAGES.files(folder)
