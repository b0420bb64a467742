"""The preprocessing that published scorers share, in torch: from pixels in [0, 1] to a network's input, with gradient.

The scorers' own code resizes 8-bit PIL pictures. With `antialias=True`, torch uses the same filters as PIL. The
remaining difference is that PIL rounds to whole grey values, once or twice. It changes a score by less than 2 % of the
score's standard deviation over pictures (tests/test_scorers.py). A bicubic filter can give values outside [0, 1]. They
are clamped, as in PIL. The gradient there is 0, which is the exact gradient of the clamped score. HPSv2's own code
resizes a tensor of floats instead, and clamps nothing."""

import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's values, which all scorers here use
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(pixels: Tensor) -> Tensor:
    """(x - mean) / std per channel: [..., 3, H, W]."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def resize(pixels: Tensor, height: int, width: int, clamp: bool = True) -> Tensor:
    """Resizes [B, 3, H, W] to [B, 3, height, width], bicubic with antialiasing, and clamps to [0, 1]. Pictures that
    already have the size are returned unchanged."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    resized = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 1) if clamp else resized


def shortest_side(pixels: Tensor, size: int) -> Tensor:
    """Resizes the shorter side to `size` and the other in proportion, rounded down, as torchvision's Resize and CLIP's
    processor do."""
    height, width = pixels.shape[-2:]
    short, long = sorted((height, width))
    other = int(size * long / short)
    return resize(pixels, *((size, other) if height <= width else (other, size)))


def center_crop(pixels: Tensor, size: int, round_half: bool = False) -> Tensor:
    """Crops the central size x size pixels; both sides must be at least `size`. Half of an odd margin is rounded down,
    as in transformers, or to even (`round_half`), as in torchvision."""
    half = (lambda margin: round(margin / 2)) if round_half else (lambda margin: margin // 2)
    top, left = (half(side - size) for side in pixels.shape[-2:])
    return pixels[..., top : top + size, left : left + size]


def longest_side_padded(pixels: Tensor, size: int) -> Tensor:
    """Resizes the longer side to `size`, without clamping, and pads the other with zeros (black) on both sides, always
    to a square. HPSv2's own code (ResizeMaxSize after ToTensor, hpsv2/src/open_clip/transform.py) does not pad a
    picture whose longer side already is `size`, and then cannot batch it."""
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    new_height, new_width = (max(1, round(side * scale)) for side in (height, width))
    pixels = resize(pixels, new_height, new_width, clamp=False)
    down, across = (size - side for side in pixels.shape[-2:])
    return F.pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))
