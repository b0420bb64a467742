"""The sound of videos in files, for a backbone whose videos have sound, or are made from one (`streaming.sound`).

clips/a.mp4                      a video
sounds/a.sound.safetensors       its sound: the tensor "sound" [M, bins], as `fastgen stream` and `sample` write it

Moment j is that of j / rate seconds after the first picture, see `Sound.rate`."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgen.data.base import DataError
from fastgen.data.clips import Header
from fastgen.streaming.sound import Sound

ENDING = ".sound.safetensors"
KEY = "sound"


def is_sound(file: Path) -> bool:
    return file.name.endswith(ENDING)


def sound_files(folder: Path) -> list[Path]:
    """The sounds of a folder, sorted by name; [] if there are none, or no folder."""
    return sorted(filter(is_sound, folder.iterdir())) if folder.is_dir() else []


def text_file(file: Path) -> Path:
    """The file with the prompt of a sound, a.txt beside a.sound.safetensors."""
    return file.with_name(file.name.removesuffix(ENDING) + ".txt")


def sounds_like(folder: Path, names: Sequence[str]) -> list[Path]:
    """The sounds of videos with these names (without endings) in a folder. Raises ValueError if one is missing."""
    files = [folder / f"{name}{ENDING}" for name in names]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"sounds: {len(missing)} of {len(files)} videos have none, the first is {missing[0]}")
    return files


def check_file(file: Path, sound: Sound) -> int:
    """The number of moments of a file, from its header. Raises ValueError if it is none of this sound."""
    try:
        with safe_open(file, framework="pt") as opened:
            part = opened.get_slice(KEY)
            shape, dtype = part.get_shape(), part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise ValueError(f'sounds: {file} is no safetensors file with a tensor "{KEY}": {error}') from None
    if len(shape) != 2 or shape[1] != sound.bins or not shape[0] or dtype not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(
            f"sounds: {file} holds {dtype} of shape {shape}, and a sound is [moments, {sound.bins}] in float32, with "
            "backbone.sound.bins numbers a moment"
        )
    return shape[0]


def check_fits(file: Path, video: str, header: Header, sound: Sound, rate: Fraction) -> None:
    """Raises ValueError for a file that is none of this sound, and for one that is longer or shorter than its video by
    more than the moments of one latent frame."""
    found, wanted = check_file(file, sound), header.seconds * float(rate)
    if abs(found - wanted) > sound.moments:
        raise ValueError(
            f"sounds: {file} has {found} moments, and {video} lasts {header.seconds:.2f} s, which are {wanted:.0f} at "
            f"{float(rate):g} per second (data.fps, and backbone.sound.moments in each latent frame)"
        )


def check_whole(file: Path, sound: Sound, frames: int) -> None:
    """Raises ValueError for a file that is none of this sound, or too short to drive a video of so many latent
    frames."""
    if (found := check_file(file, sound)) + sound.moments < sound.length(frames):
        raise ValueError(f"sounds: {file} has {found} moments, and the video that it drives {sound.length(frames)}")


def read_sound(file: Path, sound: Sound, first: int, count: int) -> Tensor:
    """Moments `first` to `first + count` of a file, [count, bins] float32. The last moment goes on for as many as may
    be missing, those of one latent frame. Raises DataError for what `check_file` refuses, for a file that ends too
    early, and for numbers that are not finite."""
    try:
        total = check_file(file, sound)
    except ValueError as error:
        raise DataError(str(error)) from None
    if first + count > total + sound.moments:
        raise DataError(f"sounds: {file} ends after {total} moments, and a clip needs {first + count}")
    with safe_open(file, framework="pt") as opened:
        found = opened.get_slice(KEY)[min(first, total - 1) : first + count].float()
    if not bool(found.isfinite().all()):
        raise DataError(f"sounds: {file} holds numbers that are not finite; replace it")
    return torch.cat([found, found[-1:].expand(count - len(found), -1)])


def check_normal(files: Sequence[Path], sound: Sound) -> None:
    """Raises ValueError if the numbers of these files, normalised as the recipe says, have a mean above 1 in
    magnitude, or a deviation that is not between 1/2 and 2; or if one is not finite. These bounds are ours. Of 64
    files at most, 1,000 moments are read."""
    chosen = files[:: -(-len(files) // 64)]
    try:
        parts = [read_sound(file, sound, 0, min(check_file(file, sound), 1000)) for file in chosen]
    except DataError as error:
        raise ValueError(str(error)) from None
    numbers = torch.cat(parts).double()
    mean, std = float(numbers.mean()), float(numbers.std())
    if not (abs(mean - sound.mean) <= sound.std and sound.std / 2 <= std <= 2 * sound.std):
        raise ValueError(
            f"sounds: the numbers of {chosen[0].parent} have mean {mean:.3g} and standard deviation {std:.3g}, and "
            f"backbone.sound normalises them by {sound.mean:g} and {sound.std:g}; set its mean and std to those"
        )
