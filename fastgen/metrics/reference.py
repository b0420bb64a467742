"""Sets of images: the real ones that generated images are compared with, and folders of generated images."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.data.captioned import metadata_table, read_metadata
from fastgen.data.controls import control_of, holds_controls, is_video
from fastgen.data.digits import load_digits, prompt_for
from fastgen.data.media import IMAGES, VIDEOS
from fastgen.data.pictures import image_files, picture_size, read_picture
from fastgen.data.sounds import is_sound, sound_files, text_file
from fastgen.data.tables import read_text
from fastgen.registry import here_or_shipped


@dataclass(frozen=True)
class Reference:
    """Real images with the prompts that describe them. read(start, stop): pixels [stop - start, 3, H, W] in [0, 1].
    facts(): what a result says of all the images, of which others may be selected: their hash, or how they are
    made; {} for those that ship with fastgen."""

    name: str
    prompts: tuple[str, ...]
    read: Callable[[int, int], Tensor]
    facts: Callable[[], Mapping[str, Any]] = dict

    def __len__(self) -> int:
        return len(self.prompts)

    def selected(self, rows: Sequence[int]) -> "Reference":
        """These images, in this order, with their prompts."""

        def read(start: int, stop: int) -> Tensor:
            return torch.cat([self.read(i, i + 1) for i in rows[start:stop]])

        return Reference(self.name, tuple(self.prompts[i] for i in rows), read, self.facts)


OVERVIEWS = ("grid.png", "views.png")
TEACHER = "teacher"  # names the teacher's own samples, which a sampler makes


def drawn_reference(
    name: str, prompts: Sequence[str], draw: Callable[[int, int], Tensor], facts: Callable[[], Mapping[str, Any]]
) -> Reference:
    """A reference whose images are made when they are first asked for: draw(start, stop) gives pixels in [0, 1]. They
    are kept as 8-bit values."""
    kept: dict[tuple[int, int], Tensor] = {}

    def read(start: int, stop: int) -> Tensor:
        if (start, stop) not in kept:
            kept[start, stop] = (draw(start, stop) * 255).round().to("cpu", torch.uint8)
        return kept[start, stop].float() / 255

    return Reference(name, tuple(prompts), read, facts)


def open_reference(name: str) -> Reference:
    """The images of a name. "digits" gives the 599 held-out digits, with prompts such as "a handwritten three". Any
    other name is a folder, whose images are `in_order`, with the prompts of `captions`.

    Raises ValueError if the folder has no images, or captions for only some of them."""
    if name == "digits":
        pixels, labels = load_digits("test")
        prompts = tuple(prompt_for(int(label)) for label in labels)
        return Reference("digits", prompts, lambda start, stop: pixels[start:stop])
    files = sample_files(here_or_shipped(name))
    check_one_size(files)
    prompts = captions(files)

    def facts() -> dict[str, str]:
        return {"reference_sha256": hash_captioned(files, prompts)}

    return Reference(name, prompts, lambda start, stop: read_images(files[start:stop]), facts)


def sample_files(folder: Path) -> list[Path]:
    """The images of a folder, `in_order`, without the overviews that `fastgen sample` adds.

    Raises ValueError if there are none."""
    files = [file for file in image_files(folder) if file.name not in OVERVIEWS]
    if not files:
        raise ValueError(f"{folder} contains no images except overviews ({', '.join(OVERVIEWS)})")
    return in_order(files)


def in_order(files: Sequence[Path]) -> list[Path]:
    """Sorted by name; by number if all names are numbers, so that 10.png comes after 9.png."""
    stems = {file: file.name.partition(".")[0] for file in files}
    if all(stem.isdecimal() for stem in stems.values()):
        return sorted(files, key=lambda file: (int(stems[file]), file.name))
    return sorted(files)


def given_files(folder: str) -> list[Path]:
    """The pictures that samples are made from, or the control videos, or the sounds, `in_order`. Raises ValueError
    if there are none, or if one cannot be read; from their headers alone."""
    where = here_or_shipped(folder)
    if sounds := sound_files(where):
        return in_order(sounds)
    if holds_controls(where):
        videos = in_order(VIDEOS.files(where))
        for video in videos:
            control_of(video).header()
        return videos
    files = sample_files(where)
    if broken := next((file for file in files if picture_size(file, str(file)) is None), None):
        raise ValueError(f"{broken} is not a readable image; replace or remove it")
    return files


def given_prompts(folder: str) -> tuple[str, ...]:
    """The texts next to these pictures. Raises ValueError if they have none."""
    prompts = captions(given_files(folder))
    need_captions(prompts, folder)
    return prompts


def need_captions(prompts: Sequence[str], folder: str) -> None:
    """Raises ValueError if these texts of a folder's images, which samples are to be made from, are all empty."""
    if not any(prompts):
        raise ValueError(f"the images of {folder} have no texts next to them; add them, or give eval.prompts")


def captions(files: Sequence[Path]) -> tuple[str, ...]:
    """The texts of images of one folder: those of its table (metadata.csv or the like, docs/data.md), or else those
    next to them (a.txt for a.png). All are empty if no image has a text. Raises ValueError if only some have one."""
    if (table := metadata_table(files[0].parent)) and not is_sound(files[0]):
        medium = VIDEOS if is_video(files[0]) else IMAGES
        listed = dict(zip(*read_metadata(table, None, medium), strict=True))
        return tuple(listed[file] for file in files)
    texts = [text_file(f) if is_sound(f) else f.with_suffix(".txt") for f in files]
    missing = [t for t in texts if not t.is_file()]
    if len(missing) == len(texts):
        return ("",) * len(files)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(texts)} images have no caption, the first is {missing[0]}; "
            "give every image a caption, or none"
        )
    return tuple(read_text(t) for t in texts)


def read_images(files: Sequence[Path]) -> Tensor:
    """Pixels [B, 3, H, W] float32 in [0, 1], of `pictures.read_picture`. Raises ValueError, naming the file, if one
    cannot be read, or if the sizes differ."""
    images: list[Tensor] = []
    for file in files:
        pixels = torch.from_numpy(np.array(read_picture(file, str(file)))).permute(2, 0, 1).float() / 255
        if images and pixels.shape != images[0].shape:
            sizes = f"{file} has {list(pixels.shape)}, {files[0]} has {list(images[0].shape)}"
            raise ValueError(f"images must all have the same size: {sizes}")
        images.append(pixels)
    return torch.stack(images)


def check_one_size(files: Sequence[Path]) -> None:
    """Raises ValueError if images differ in size, whatever the batch size, or if one is not an image; from their
    headers alone."""
    sizes = {file: picture_size(file, str(file)) for file in files}
    for file, size in sizes.items():
        if size is None:
            raise ValueError(f"{file} is not a readable image; replace or remove it")
        if size != sizes[files[0]]:
            raise ValueError(
                f"images must all have the same size: {file} has {size[0]}x{size[1]}, {files[0]} has "
                f"{sizes[files[0]][0]}x{sizes[files[0]][1]}"  # type: ignore[index]
            )


def hash_files(files: Sequence[Path]) -> str:
    """The sha256 over the names and contents of the files, in order. A file is read once as long as it stays as it
    is."""
    from fastgen.sampling.sampler import sha256  # its backbones take a second to import

    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + bytes.fromhex(sha256(file)))
    return digest.hexdigest()


def hash_captioned(files: Sequence[Path], prompts: Sequence[str]) -> str:
    """The sha256 over `hash_files` and the prompts of the files."""
    return hashlib.sha256("\n".join([hash_files(files), *prompts]).encode()).hexdigest()
