"""Videos with captions: a folder of files, or tar shards."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone, BackboneConfig
from fastgen.backbones.given import Control
from fastgen.data.base import DataError
from fastgen.data.captioned import read_captioned
from fastgen.data.clips import (
    Header,
    Source,
    VideoError,
    check_reader,
    read_clip,
    read_header,
    shortest,
    start_of,
)
from fastgen.data.controls import ControlFiles, check_length, controls_like
from fastgen.data.images import fitted
from fastgen.data.media import VIDEOS
from fastgen.data.readers import READERS
from fastgen.data.samples import Samples, SampleSource
from fastgen.data.sizes import check_sizes
from fastgen.data.sounds import check_file, check_fits, check_normal, read_sound, sounds_like
from fastgen.data.tar_shards import Entry, key_and_suffix, member, shard_entries
from fastgen.registry import MOST_SEED, MOST_STEPS, here_or_shipped

LOWEST_RATE = 0.9  # of a file, as a share of the stated one; ours. 23.976 for 24 and 15 for 16 are near enough


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class VideoData(SampleSource):
    """Videos (mp4, webm, gif) with captions. folder: of files, with captions as in ImageData. shards: tar files, as in
    WebDatasetData. One of the two is given, unless there are controls alone. column: the caption column.

    A sample is a clip of `backbone.num_frames` pictures, `fps` of them per second (by default `backbone.fps`),
    whatever the file's own frame rate is; see `clips`. They are resized to cover the backbone's size and
    centre-cropped. Smaller videos are refused unless allow_upscaling is set, those with a much lower frame rate, in
    which pictures would repeat, unless allow_repeats is set, and shorter ones always.

    clips: how many clips are taken of each video: epoch e of a run shows clip e % clips. Where clip k of video i
    begins is a uniform draw that depends on (seed, i, k) alone.

    They are real data. A backbone that makes its samples from images is also given their first pictures.

    controls: a folder of control videos, for a backbone that makes its samples from such; see `data.controls`. The
    control of clips/a.mp4 has its name and shows the same time. Without folder, samples are the control videos of this
    folder with their own captions, and there is no real data.

    sounds: a folder with the sound of every video, for a backbone whose videos have sound, or are made from one; see
    `data.sounds`."""

    folder: str | None = None
    shards: str | tuple[str, ...] | None = None
    controls: str | None = None
    sounds: str | None = None
    column: str | None = None
    fps: float | None = Field(default=None, gt=0, le=MOST_STEPS)
    clips: int = Field(default=1, ge=1, le=MOST_STEPS)
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    allow_upscaling: bool = False
    allow_repeats: bool = False
    name: Literal["videos"] = "videos"

    @property
    def provides(self) -> frozenset[str]:
        real = {"latents", "pixels", "images"} if self.has_videos else set()
        beside = {"controls": self.controls, "sound": self.sounds}
        return frozenset(real | {kind for kind, folder in beside.items() if folder})

    @property
    def has_videos(self) -> bool:
        """Whether there are videos besides the controls."""
        return self.controls is None or not (self.folder is None and self.shards is None)

    def settled(self, backbone: BackboneConfig) -> "VideoData":
        return dataclasses.replace(self, fps=self.rate(backbone))

    def rate(self, backbone: Any) -> float:
        """Pictures per second."""
        return float(self.fps or backbone.fps)

    def check(self, backbone: Any) -> None:
        check_reader()
        if backbone.output != "frames":
            raise ValueError(f"name: video data needs a backbone that makes videos, and {backbone.name} does not")
        if self.controls is not None and not backbone.takes_control:
            raise ValueError(
                f"controls: backbone {backbone.name} takes none here; leave controls out, or for wan_vace set "
                "backbone.control: video"
            )
        found = list(self.headers())
        if self.sounds is not None:
            self.check_sounds(backbone, found)
        if self.controls is not None:
            found = self.check_controls(backbone, found)
        headers = [(video.where, header) for video, header in found]
        check_sizes(
            ((where, (header.width, header.height)) for where, header in headers),
            (backbone.height, backbone.width),
            self.allow_upscaling,
            VIDEOS,
        )
        check_lengths(headers, backbone.num_frames, self.rate(backbone))
        if not self.allow_repeats:
            check_rates(headers, self.rate(backbone))

    def check_sounds(self, backbone: Any, headers: Sequence[tuple["Video", Header]]) -> None:
        """Raises ValueError if the backbone's videos have no sound, if the sound of a video is missing, has another
        length or other numbers than the backbone's, or if those are normalised by another mean and deviation than
        theirs."""
        sound = getattr(backbone, "sound", None)
        if sound is None:
            raise ValueError("sounds: videos of this backbone have no sound; set backbone.sound, or leave sounds out")
        files = self.sound_files([video for video, _ in headers])
        frames = backbone.latent_frames()
        for file, (video, header) in zip(files, headers, strict=True):
            if frames is None:
                check_file(file, sound)
            else:
                rate = sound.rate(self.rate(backbone), backbone.num_frames, frames)
                check_fits(file, video.where, header, sound, rate)
        check_normal(files, sound)

    def sound_files(self, videos: Sequence["Video"]) -> list[Path]:
        assert self.sounds is not None
        if self.shards is not None:
            raise ValueError("sounds: they belong to a folder of videos; give folder instead of shards")
        return sounds_like(here_or_shipped(self.sounds), own_names(videos, "sounds"))

    def check_controls(self, backbone: Any, headers: Sequence[tuple["Video", Header]]) -> list[tuple["Video", Header]]:
        """The videos and their controls, with their headers. Raises ValueError if a control is missing or shows
        another time than its video."""
        controls = self.control_files([video for video, _ in headers], backbone.references)
        with ThreadPoolExecutor(READERS, "headers") as readers:
            read = list(readers.map(ControlFiles.header, controls))
        for (video, header), files, own in zip(headers, controls, read, strict=True):
            check_length(own, header, files.video, Path(video.where))
        masks = [(str(files.mask), files.mask_size()) for files in controls if files.mask is not None]
        check_sizes(masks, (backbone.height, backbone.width), self.allow_upscaling)
        found = [(Video(files.video, ""), own) for files, own in zip(controls, read, strict=True)]
        return [*headers, *found] if self.has_videos else found

    def control_files(self, videos: Sequence["Video"], references: int) -> list[ControlFiles]:
        assert self.controls is not None
        if self.shards is not None:
            raise ValueError("controls: they belong to a folder of videos; give folder instead of shards")
        return controls_like(here_or_shipped(self.controls), own_names(videos, "controls"), references)

    def samples(self, backbone: Backbone) -> Samples:
        config, videos = backbone.config, self.videos()
        size, rate = (config.height, config.width), self.rate(config)
        controls = self.control_files(videos, config.references) if self.controls is not None else []
        sounds = self.sound_files(videos) if self.sounds is not None else []

        def place_of(number: int) -> tuple[int, float]:
            index, clip = divmod(number, self.clips)
            key = noise.make_key(self.seed, "clip", clip)
            return index, float(noise.uniform(torch.tensor([index]), (), key, torch.float64))

        def read_control(number: int) -> Control:
            index, place = place_of(number)
            return controls[index].read(place, config.num_frames, rate, size, self.allow_upscaling)

        def read_moments(number: int) -> Tensor:
            index, place = place_of(number)
            frames = backbone.latent_shape[0]
            start = start_of(place, Fraction(videos[index].header().seconds), config.num_frames, rate)
            moments = config.sound.rate(rate, config.num_frames, frames)
            return read_sound(sounds[index], config.sound, int(start * moments), config.sound.length(frames))

        def read(number: int) -> Tensor:
            index, place = place_of(number)
            video = videos[index]
            try:
                with video.open() as source:
                    pixels = read_clip(
                        source,
                        video.ending,
                        video.where,
                        place,
                        config.num_frames,
                        rate,
                        lambda image: fitted(image, size, video.where, self.allow_upscaling),
                    )
            except VideoError as error:
                raise DataError(str(error)) from None
            return pixels.float().div_(255)

        return Samples(
            [video.caption for video in videos],
            torch.arange(len(videos)),
            read if self.has_videos else None,
            self.clips,
            read_control=read_control if controls else None,
            read_sound=read_moments if sounds else None,
            sound_given=bool(sounds) and config.sound.given,
        )

    def videos(self) -> list["Video"]:
        """Every video, in order. Raises ValueError if one has no caption."""
        if self.has_videos and (self.folder is None) == (self.shards is None):
            raise ValueError("folder: give either a folder of videos or shards, and not both")
        if self.shards is not None:
            return [
                Video(shard, entry.caption, entry) for shard, entry in shard_entries(self.shards, self.column, VIDEOS)
            ]
        folder = self.folder or self.controls
        assert folder is not None
        files, captions = read_captioned(here_or_shipped(folder), self.column, VIDEOS)
        return [Video(file, caption) for file, caption in zip(files, captions, strict=True)]

    def headers(self) -> Iterator[tuple["Video", Header]]:
        """Every video with what its header says; several files are read at a time."""
        with ThreadPoolExecutor(READERS, "headers") as readers:
            videos = self.videos()
            yield from zip(videos, readers.map(Video.header, videos), strict=True)


@dataclasses.dataclass(frozen=True)
class Video:
    """A file, or a member of a shard, with its caption."""

    file: Path
    caption: str
    entry: Entry | None = None

    @property
    def where(self) -> str:
        return str(self.file) if self.entry is None else f"{self.entry.name} in {self.file}"

    @property
    def ending(self) -> str:
        return self.file.suffix if self.entry is None else key_and_suffix(self.entry.name)[1]

    def open(self) -> AbstractContextManager[Source]:
        return nullcontext(self.file) if self.entry is None else member(self.file, self.entry)

    def header(self) -> Header:
        if self.entry is not None and self.entry.header is not None:
            return self.entry.header
        return read_header(self.file, self.ending, self.where)


def check_lengths(headers: Iterable[tuple[str, Header]], count: int, fps: float) -> None:
    """Raises ValueError if videos are too short for a clip."""
    short = [(where, header.seconds) for where, header in headers if header.seconds < shortest(count, fps)]
    if short:
        (where, seconds), number = short[0], "1 video is" if len(short) == 1 else f"{len(short)} videos are"
        raise ValueError(
            f"{number} shorter than {count} pictures at {fps:g} per second ({count / fps:.2f} s), the first is "
            f"{where} with {seconds:.2f} s; remove them, or lower backbone.num_frames or raise data.fps"
        )


def check_rates(headers: Iterable[tuple[str, Header]], fps: float) -> None:
    """Raises ValueError if videos have much fewer pictures per second than a clip."""
    slow = [(where, header.rate) for where, header in headers if header.rate and header.rate < LOWEST_RATE * fps]
    if slow:
        (where, rate), number = slow[0], "1 video has" if len(slow) == 1 else f"{len(slow)} videos have"
        raise ValueError(
            f"{number} fewer than {fps:g} pictures per second, some of which would repeat; the first is {where} with "
            f"{rate:g}. Remove them, lower data.fps, or set data.allow_repeats: true"
        )


def own_names(videos: Sequence[Video], key: str) -> list[str]:
    """The name of each video without its ending, by which its control or its sound is found. Raises ValueError if two
    videos have the same."""
    names = [video.file.stem for video in videos]
    if doubled := next((name for name, count in Counter(names).items() if count > 1), None):
        raise ValueError(f"{key}: two videos are named {doubled}, and would get the same file; give each its own name")
    return names
