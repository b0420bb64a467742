"""What samples are made from besides prompts: how a picture reaches the processors of image encoders, which take no
tensors, control videos, and sounds."""

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor


def to_picture(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1], or uint8, as an 8-bit picture."""
    values = pixels if pixels.dtype == torch.uint8 else (pixels.clamp(0, 1) * 255).round()
    return Image.fromarray(values.permute(1, 2, 0).to("cpu", torch.uint8).numpy())


class GivenSound(NamedTuple):
    """A sound that drives a video: its moments [M, bins], see `streaming.sound`."""

    moments: Tensor


class Control(NamedTuple):
    """A control video, such as depth, poses, edges or a grey copy of what is to be made.

    frames: [F, 3, H, W] in [0, 1]. mask: [F, H, W] in [0, 1]; above 1/2, a pixel is to be made, and below, that of the
    frame is kept. None: all are to be made. references: pictures [3, h, w] in [0, 1], of any sizes, of what is to be
    seen in the video."""

    frames: Tensor
    mask: Tensor | None = None
    references: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> "Control":
        mask = None if self.mask is None else self.mask.to(device)
        return Control(self.frames.to(device), mask, tuple(picture.to(device) for picture in self.references))
