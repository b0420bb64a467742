"""A frozen network whose matrices are stored in float8, by diffusers' layerwise casting."""

import torch
from torch import nn

from fastgen.denoiser import Denoiser

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # a backward pass through them needs the weights as they were


def store_float8(denoiser: Denoiser) -> None:
    """Stores linear layers in float8 (e4m3, without scales), in place. Each is bfloat16 while it runs. Convolutions,
    norms, embeddings of patches and positions, and what a family keeps in float32, stay as they are.

    A number keeps four significant bits: it changes by at most a sixteenth, or by 2^-10 where it is below 2^-6."""
    for part in denoiser.members:
        part.network.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16, skip_modules_classes=CONVOLUTIONS)
