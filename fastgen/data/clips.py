"""How every video file is read: with PyAV, which is FFmpeg.

A clip is `count` pictures of a file at equal steps of time: the picture that the file shows at the clip's start, and
those nearest to every later step. So a file with a higher frame rate loses pictures, and one with a lower rate shows
some twice. Pictures are turned as the file says, and what is transparent shows white, as in `pictures`. What has no
known meaning on an ordinary screen (HDR, pixels that are not square) is refused.

A file is read in the format that its name says, and no other: some formats of FFmpeg open further files. Decoders end
at the first damage that they notice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fastgen.data.base import DataError
from fastgen.data.pictures import check_regular, to_rgb

FORMATS = {".mp4": "mov", ".webm": "matroska", ".gif": "gif"}  # as FFmpeg calls them
HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273
TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}

Source = Path | BinaryIO


class VideoError(ValueError):
    """A video that cannot be read; the message names it."""


class Header(NamedTuple):
    """Width and height of the pictures as they are shown, how long they are shown altogether, and how many a second on
    average (None: the file does not say it)."""

    width: int
    height: int
    seconds: float
    rate: float | None


def check_reader() -> None:
    """Raises ValueError if videos cannot be read."""
    if find_spec("av") is None:
        raise ValueError("reading videos needs av: pip install 'fastgen-distill[video]'")


def read_header(source: Source, ending: str, where: str) -> Header:
    """What the header and the first picture say. ending: of the file's name, such as .mp4. where: its name in
    messages. Raises VideoError for what is not a video."""
    with opened(source, ending, where) as (container, stream):
        seconds = float(length(container, stream))
        frame = next(container.decode(stream), None)
        if frame is None:
            raise VideoError("it has no pictures")
        check_frame(frame)
        turned = frame.rotation % 180 != 0
        wide, high = (frame.height, frame.width) if turned else (frame.width, frame.height)
        return Header(wide, high, seconds, float(stream.average_rate) if stream.average_rate else None)


def read_clip(
    source: Source,
    ending: str,
    where: str,
    place: float,
    count: int,
    fps: float,
    keep: Callable[[Image.Image], Tensor],
) -> Tensor:
    """A clip [count, ...] of a video, 1 / fps seconds from picture to picture. It begins at the share `place`, in
    [0, 1), of the time in which it can begin. keep: what is kept of each RGB picture. Raises VideoError, naming
    `where`, for what is not a whole video, or is too short."""
    at_start = False
    while True:
        try:
            with opened(source, ending, where) as (container, stream):
                seconds, step = length(container, stream), 1 / Fraction(fps)
                if seconds < shortest(count, fps):
                    raise VideoError(
                        f"it lasts {float(seconds):.2f} s, and the clip {float(shortest(count, fps)):.2f}"
                    )
                start = start_of(place, seconds, count, fps)
                at_start = at_start or start < 1
                frames = decoded(container, stream, None if at_start else start)
                return torch.stack([keep(picture(frame)) for frame in spaced(frames, start, count, step)])
        except VideoError:
            if at_start:
                raise
            at_start = True  # the pictures after a key frame may need those before it: read from the beginning


def start_of(place: float, seconds: Fraction, count: int, fps: float) -> Fraction:
    """When a clip begins, in seconds: the share `place` of the time in which it can begin."""
    return Fraction(place) * (seconds - (count - 1) / Fraction(fps))


def shortest(count: int, fps: float) -> Fraction:
    """How long a video must be for a clip, in seconds: all steps, and half of the time of the last picture, because
    files round their times."""
    return (count - Fraction(1, 2)) / Fraction(fps)


@contextmanager
def opened(source: Source, ending: str, where: str) -> Iterator[tuple[Any, Any]]:
    """The container and the video stream of a file. Any error in the block except DataError becomes a VideoError that
    names it: of a damaged file, FFmpeg raises errors of many kinds."""
    import av

    try:
        kind = FORMATS.get(ending.lower())
        if kind is None:
            raise VideoError(f"its name does not end in {', '.join(FORMATS)}")
        if isinstance(source, Path):
            check_regular(source, where)
        else:
            source.seek(0)
        with (
            source.open("rb") if isinstance(source, Path) else nullcontext(source) as file,
            av.open(file, format=kind, options={"err_detect": "explode"}, metadata_errors="ignore") as container,
        ):
            stream: Any = container.streams.best("video")  # a VideoStream, which its type does not say
            context = None if stream is None else stream.codec_context
            if context is None:
                raise VideoError("it has no pictures that FFmpeg knows")
            check_shape(context.width, context.height, stream.sample_aspect_ratio)
            context.options, context.thread_count = {"err_detect": "explode"}, 1  # several files are read at a time
            yield container, stream
    except DataError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"cannot read the video {where}: {reason}; replace or remove it") from None


def check_shape(width: int, height: int, aspect: Fraction | None) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise VideoError(f"its pictures have {width}x{height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
    if aspect and aspect != 1:
        raise VideoError(f"its pixels are not square ({aspect}); scale it with ffmpeg -vf scale=iw*sar:ih,setsar=1")


def length(container: Any, stream: Any) -> Fraction:
    """For how many seconds the pictures are shown. If the header does not say it, all packets are read, but not
    decoded."""
    if stream.duration:
        return stream.duration * stream.time_base
    spans = [(p.pts, p.duration or 0) for p in container.demux(stream) if p.pts is not None]
    if not spans:
        raise VideoError("it has no pictures")
    container.seek(0)
    (first, _), (last, shown) = min(spans), max(spans)
    return (last - first + (shown or Fraction(last - first, max(len(spans) - 1, 1)))) * stream.time_base


def decoded(container: Any, stream: Any, start: Fraction | None) -> Iterator[tuple[Fraction, Any]]:
    """The pictures with their times in seconds after the first one. start: they begin at the last key frame before
    it. Raises VideoError if that one comes later."""
    begin = stream.start_time or 0
    if start is not None:
        container.seek(begin + int(start / stream.time_base), stream=stream)
    for frame in container.decode(stream):
        if frame.pts is None:
            raise VideoError("it has a picture without a time")
        time = (frame.pts - begin) * frame.time_base
        if start is not None and time > start:
            raise VideoError("it has no key frame there")
        start = None
        yield time, frame


def spaced(frames: Iterator[tuple[Fraction, Any]], start: Fraction, count: int, step: Fraction) -> Iterator[Any]:
    """The picture shown at `start`, and those nearest to each of the next count - 1 steps after its own time."""
    here, after = next(frames, None), next(frames, None)
    if here is None:
        raise VideoError("it has no pictures")
    while after is not None and after[0] <= start:
        here, after = after, next(frames, None)
    first = here[0]
    for target in (first + i * step for i in range(count)):
        while after is not None and abs(after[0] - target) < abs(here[0] - target):
            if after[0] <= here[0]:
                raise VideoError("its pictures are not in the order of their times")
            here, after = after, next(frames, None)
        shown = max((here[1].duration or 0) * here[1].time_base, step)
        if after is None and target > here[0] + shown + step / 2:
            raise VideoError(f"its pictures end after {float(here[0]):.2f} s, earlier than its header says")
        yield here[1]


def picture(frame: Any) -> Image.Image:
    """The 8-bit RGB image of a frame."""
    check_frame(frame)
    alpha = any(component.is_alpha for component in frame.format.components)
    image = to_rgb(Image.fromarray(frame.to_ndarray(format="rgba" if alpha else "rgb24")))
    return image.transpose(TURNS[frame.rotation % 360]) if frame.rotation % 360 else image


def check_frame(frame: Any) -> None:
    if frame.is_corrupt:
        raise VideoError("a picture is damaged")
    if frame.color_trc in HDR:
        raise VideoError(f"it is in HDR ({HDR[frame.color_trc]}); convert it to SDR")
    if frame.rotation % 90:
        raise VideoError(f"its pictures are turned by {frame.rotation} degrees")
