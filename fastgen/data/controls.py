"""Control videos in files: what a video is to look like, such as depth, poses, edges or a grey copy.

depth/a.mp4              a control video (mp4, webm, gif)
depth/masks/a.mp4        its mask, a video or a picture (a.png) for all of it: white where pixels are to be made,
                         black where those of the control are kept. Without one, all are to be made
depth/references/a.png   a picture of what is to be seen, or a folder references/a with several, sorted by name
"""

from collections.abc import Iterable, Sequence
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from fastgen.backbones.base import Backbone
from fastgen.backbones.given import Control
from fastgen.batch import Conditioning
from fastgen.data.base import DataError
from fastgen.data.clips import Header, VideoError, read_clip, read_header
from fastgen.data.images import encode_files, fitted, read_image
from fastgen.data.media import IMAGES, VIDEOS
from fastgen.data.pictures import PictureError, picture_size, read_picture
from fastgen.data.sounds import ENDING, is_sound, read_sound


class ControlFiles(NamedTuple):
    """The files of one control. mask: None if all pixels are to be made."""

    video: Path
    mask: Path | None
    references: tuple[Path, ...]

    def header(self) -> Header:
        """That of the video. Raises ValueError if the mask is a video of another length, or cannot be read, and if a
        reference cannot."""
        header = read_header(self.video, self.video.suffix, str(self.video))
        if self.mask is not None and is_video(self.mask):
            check_length(read_header(self.mask, self.mask.suffix, str(self.mask)), header, self.mask, self.video)
        pictures = self.references if self.mask is None or is_video(self.mask) else (*self.references, self.mask)
        if broken := next((file for file in pictures if picture_size(file, str(file)) is None), None):
            raise ValueError(f"{broken} is not a readable image; replace or remove it")
        return header

    def read(self, place: float, count: int, fps: float, size: tuple[int, int], allow_upscaling: bool) -> Control:
        """The clip [count, ...] of `clips.read_clip` at this place, with the same clip of a mask that is a video; both
        in the size (H, W). Raises DataError if a file cannot be read."""

        def clip(file: Path) -> Tensor:
            def keep(image: Image.Image) -> Tensor:
                return fitted(image, size, str(file), allow_upscaling)

            return read_clip(file, file.suffix, str(file), place, count, fps, keep).float() / 255

        try:
            mask, frames = None, clip(self.video)
            if self.mask is not None and is_video(self.mask):
                mask = clip(self.mask)[:, 0]
            elif self.mask is not None:
                mask = read_image(self.mask, size, str(self.mask), allow_upscaling)[0].expand(count, -1, -1)
            return Control(frames, mask, tuple(read_whole(file) for file in self.references))
        except (VideoError, PictureError) as error:
            raise DataError(str(error)) from None

    def mask_size(self) -> tuple[int, int] | None:
        """Width and height of the mask, which there is."""
        assert self.mask is not None
        if is_video(self.mask):
            header = read_header(self.mask, self.mask.suffix, str(self.mask))
            return header.width, header.height
        return picture_size(self.mask, str(self.mask))

    @property
    def files(self) -> list[Path]:
        return [self.video, *([] if self.mask is None else [self.mask]), *self.references]


def is_video(file: Path) -> bool:
    return file.suffix.lower() in VIDEOS.suffixes


KINDS = {"images": "pictures", "controls": f"control videos ({VIDEOS.endings})", "sound": f"sounds ({ENDING})"}


def named_kinds(given: Iterable[str]) -> str:
    """For messages: what samples are made from, by the kinds of `BackboneConfig.given`."""
    return ", ".join(KINDS[kind] for kind in given)


def kind_of(file: Path) -> str:
    """What a sample that is made from this file is made from, as `BackboneConfig.given` calls it."""
    if is_sound(file):
        return "sound"
    return "controls" if is_video(file) else "images"


def holds_controls(folder: Path) -> bool:
    """Whether a folder has videos and no pictures, so that samples are made from these."""
    files = list(folder.iterdir()) if folder.is_dir() else []
    return any(map(is_video, files)) and not any(file.suffix.lower() in IMAGES.suffixes for file in files)


def read_whole(file: Path) -> Tensor:
    """A picture [3, h, w] in [0, 1] of its own size."""
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(read_picture(file, str(file))).float() / 255


def control_of(video: Path) -> ControlFiles:
    """A control video with its mask and references. Raises ValueError if it has two masks, or both a reference and a
    folder of them."""
    masks = named(video, "masks", (*VIDEOS.suffixes, *IMAGES.suffixes))
    references = named(video, "references", IMAGES.suffixes)
    several = video.parent / "references" / video.stem
    if len(masks) > 1 or len(references) + several.is_dir() > 1:
        raise ValueError(f"{video} has more than one mask, or more than one file or folder of references; keep one")
    return ControlFiles(
        video, masks[0] if masks else None, tuple(IMAGES.files(several) if several.is_dir() else references)
    )


def named(video: Path, folder: str, suffixes: Sequence[str]) -> list[Path]:
    """The files of this name in a folder beside a video."""
    found = (video.parent / folder).glob(f"{escape(video.stem)}.*")
    return sorted(file for file in found if file.stem == video.stem and file.suffix.lower() in suffixes)


def references_of(files: Sequence[Path]) -> int | None:
    """The number of reference pictures of these control videos, by the first of them; None if they are pictures."""
    return len(control_of(files[0]).references) if files and is_video(files[0]) else None


def controls_like(folder: Path, names: Sequence[str], references: int) -> list[ControlFiles]:
    """The controls of these names (without endings) in a folder. Raises ValueError if one is missing, if there are
    two of one name, if one has another number of references, and for a mask or references of no video there."""
    videos = VIDEOS.files(folder)
    of_name = {video.stem: video for video in videos}
    if len(of_name) < len(videos):
        raise ValueError(f"{folder} has several videos of one name; keep one of each")
    missing = [name for name in names if name not in of_name]
    if missing:
        number = f"{len(missing)} of {len(names)} videos have"
        raise ValueError(f"{number} no control of their name in {folder}, the first is {missing[0]}")
    parts = [part for name in ("masks", "references") for part in sorted((folder / name).glob("[!.]*"))]
    if odd := next((part for part in parts if part.stem not in of_name and part.name not in of_name), None):
        raise ValueError(f"{odd} belongs to no control video: none in {folder} has its name")
    known = {part for video in videos for part in control_of(video).files}
    if odd := next((part for part in parts if part.is_file() and part not in known), None):
        raise ValueError(f"{odd} has an ending that fastgen does not read there; convert or remove it")
    found = [control_of(of_name[name]) for name in names]
    if other := next((files for files in found if len(files.references) != references), None):
        raise ValueError(
            f"{other.video} has {len(other.references)} reference pictures, and backbone.references is {references}"
        )
    return found


def check_length(header: Header, wanted: Header, file: Path, other: Path) -> None:
    """Raises ValueError for a video that is longer or shorter than another by more than half a picture."""
    if abs(header.seconds - wanted.seconds) > 0.5 / (wanted.rate or 1):
        raise ValueError(
            f"{file} lasts {header.seconds:.2f} s and {other} {wanted.seconds:.2f} s; they must show the same time"
        )


def all_files(given: Sequence[Path]) -> list[Path]:
    """These pictures or control videos, each once and with its mask and references."""
    files = dict.fromkeys(given)
    return [part for file in files for part in (control_of(file).files if is_video(file) else [file])]


def encode_given(backbone: Backbone, files: Sequence[Path]) -> Conditioning:
    """What networks are told of these files, one row each, if samples are made from them: pictures, control videos
    with their masks and references, or sounds, both from their beginning. Pictures are resized to cover what the
    backbone reads, smaller ones too, and their centre is cropped. Raises ValueError for files of another kind."""
    config: Any = backbone.config
    if odd := next((file for file in files if kind_of(file) not in config.given), None):
        raise ValueError(f"this pipeline makes its samples from {named_kinds(config.given)}, and {odd} is none")
    if "sound" in config.given:
        count = config.sound.length(backbone.latent_shape[0])
        moments = (read_sound(file, config.sound, 0, count).to(backbone.device) for file in files)
        return Conditioning.cat([backbone.encode_sound(each) for each in moments])
    if not config.takes_control:
        return encode_files(backbone, files)
    size, rows = backbone.picture_size, {}
    assert size is not None
    for file in dict.fromkeys(files):
        control = control_of(file).read(0.0, config.num_frames, config.fps, size, allow_upscaling=True)
        rows[file] = backbone.encode_control(control.to(backbone.device))
    return Conditioning.cat([rows[file] for file in files])
