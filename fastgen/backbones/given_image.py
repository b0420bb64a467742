"""How a given image reaches the processors of image encoders, which take pictures and not tensors."""

import torch
from PIL import Image
from torch import Tensor


def to_picture(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1], or uint8, as an 8-bit picture."""
    values = pixels if pixels.dtype == torch.uint8 else (pixels.clamp(0, 1) * 255).round()
    return Image.fromarray(values.permute(1, 2, 0).to("cpu", torch.uint8).numpy())
