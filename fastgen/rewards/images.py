"""The preprocessing that published scorers share, in torch: from pixels in [0, 1] to a network's input, with gradient.

Their own code resizes 8-bit PIL pictures. `antialias=True` makes torch's filters PIL's; what is left is PIL's rounding
to whole grey values, once or twice, which moves a score by less than 2 % of its standard deviation over pictures
(tests/test_scorers.py). Values beyond [0, 1] that a bicubic filter makes are clamped, as PIL's are; there the gradient
is 0, as it is of the score itself."""

import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's, of every scorer here
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(pixels: Tensor) -> Tensor:
    """(x - mean) / std by channel: [..., 3, H, W]."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, clamped: [B, 3, H, W] to [B, 3, height, width]. The same size is left alone."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    resized = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 1)


def shortest_side(pixels: Tensor, size: int) -> Tensor:
    """The shorter side to `size`, the other in proportion, rounded down (torchvision's Resize, CLIP's processor)."""
    height, width = pixels.shape[-2:]
    short, long = sorted((height, width))
    other = int(size * long / short)
    return resize(pixels, *((size, other) if height <= width else (other, size)))


def center_crop(pixels: Tensor, size: int, round_half: bool = False) -> Tensor:
    """The middle size x size; sides are at least `size`. Half an odd margin is rounded down, as transformers does, or
    to even (`round_half`), as torchvision does."""
    half = (lambda margin: round(margin / 2)) if round_half else (lambda margin: margin // 2)
    top, left = (half(side - size) for side in pixels.shape[-2:])
    return pixels[..., top : top + size, left : left + size]


def longest_side_padded(pixels: Tensor, size: int) -> Tensor:
    """The longer side to `size`, zeros (black) around the other, centred, always square. HPSv2's own code leaves a
    picture whose longer side is `size` already without padding, and then cannot stack it."""
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    pixels = resize(pixels, *(max(1, round(side * scale)) for side in (height, width)))
    down, across = (size - side for side in pixels.shape[-2:])
    return F.pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))
