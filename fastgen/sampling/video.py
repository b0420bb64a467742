"""Writes videos as mp4 files, and picks the few frames that represent a video in a picture."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.data.files import unused_sibling


def check_writer() -> None:
    """Raises ValueError if mp4 files cannot be written."""
    if find_spec("imageio") is None or find_spec("imageio_ffmpeg") is None:
        raise ValueError("writing videos needs imageio and ffmpeg: pip install 'fastgen-distill[video]'")


@contextmanager
def video_writer(path: Path, fps: int, playable: bool = False) -> Iterator[Callable[[Tensor], None]]:
    """Writes an mp4 (H.264) of pictures as they come: a function that appends [n, 3, H, W] in [0, 1], H and W even, on
    any device. The file is complete when the block ends, also by an exception.

    playable: the file can be played while it grows, a second later at the latest, and also if the process is killed.
    It is then larger."""
    check_writer()
    import imageio.v2

    fragments = ["-movflags", "frag_keyframe+empty_moov+default_base_moof", "-flush_packets", "1"]
    options = ["-tune", "zerolatency", "-g", str(fps), *fragments] if playable else []
    writer: Any = imageio.v2.get_writer(
        path, fps=fps, codec="libx264", quality=8, macro_block_size=2, output_params=options
    )

    def append(pictures: Tensor) -> None:
        images = (pictures.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
        for image in images.cpu().numpy():
            writer.append_data(image)

    with writer:
        yield append


def save_video(frames: Tensor, path: Path, fps: int) -> None:
    """Writes an mp4 (H.264) atomically. frames: [F, 3, H, W] in [0, 1], H and W even, on any device."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unused_sibling(path, "partial", ".mp4")
    try:
        with video_writer(temporary, fps) as append:
            append(frames)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def side_by_side(videos: Tensor) -> Tensor:
    """Tiles several videos [B, F, 3, H, W] into one, [F, 3, H', W'], with about as many rows as columns."""
    from torchvision.utils import make_grid  # takes a second to import

    columns = max(1, round(len(videos) ** 0.5))
    return torch.stack([make_grid(frame, nrow=columns, padding=2, pad_value=1.0) for frame in videos.transpose(0, 1)])


def stills(videos: Tensor, count: int = 4) -> Tensor:
    """Evenly spaced frames of each video, including the first and the last: [B, at most count, 3, H, W]."""
    length = videos.shape[1]
    chosen = torch.linspace(0, length - 1, min(count, length)).round().long()
    return videos[:, chosen.to(videos.device)]
