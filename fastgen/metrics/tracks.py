"""Where the bright object of a video is in every picture, and which pictures count as early and late."""

import torch
from torch import Tensor

from fastgen.data.moving_digits import Told, told

HAZE = 0.1  # brightness that counts as background: codecs leave it everywhere
LATENT = 4  # pictures of one latent frame of a video VAE; the first latent frame is one picture
STEP = 4  # pictures between the two places that a speed is measured by


def brightness(frames: Tensor) -> Tensor:
    """The brightness above HAZE, [B, F, H, W] float64, of frames [B, F, 3, H, W] in [0, 1]."""
    return (frames.double().mean(2) - HAZE).clamp(min=0)


def mass(frames: Tensor) -> Tensor:
    """The sum of the brightness of every picture, [B, F]."""
    return brightness(frames).sum((-2, -1))


def centres(frames: Tensor) -> Tensor:
    """The centre of brightness (row, column) of every picture, [B, F, 2] in pixels; that of the canvas in a black
    picture."""
    light = brightness(frames)
    total = light.sum((-2, -1))
    found = []
    for axis, size in ((3, light.shape[2]), (2, light.shape[3])):
        line = light.sum(axis)
        place = (line @ torch.arange(size, dtype=line.dtype)) / total.clamp(min=1e-9)
        found.append(torch.where(total > 0, place, (size - 1) / 2))
    return torch.stack(found, -1)


def displacements(centre: Tensor) -> Tensor:
    """How far the centre [B, F, 2] has moved STEP pictures later, [B, F - STEP, 2] in pixels a picture."""
    return (centre[:, STEP:] - centre[:, :-STEP]) / STEP


def latent_frames(count: int) -> Tensor:
    """The latent frame of every picture, [count]: 0, 1, 1, 1, 1, 2, ... Raises ValueError unless count is 4 k + 1."""
    if count % LATENT != 1 or count < 1 + LATENT:
        raise ValueError(f"a video of 4 k + 1 frames, at least 5, is needed, but this one has {count}")
    return (torch.arange(count) + LATENT - 1) // LATENT


def early_and_late(count: int) -> tuple[slice, slice]:
    """The pictures of the first and of the last quarter of the latent frames, at least one latent frame each."""
    of = latent_frames(count)
    quarter = max(1, (int(of[-1]) + 1) // 4)
    return slice(0, int((of < quarter).sum())), slice(int((of <= of[-1] - quarter).sum()), count)


def stated(prompts: list[str], *parts: str) -> list[Told]:
    """What the prompts say. Raises ValueError for a prompt that does not state one of `parts` of `Told`."""
    found = [told(prompt) for prompt in prompts]
    for prompt, said in zip(prompts, found, strict=True):
        for part in parts:
            if getattr(said, part) is None:
                raise ValueError(f"the prompt {prompt!r} states no {part}, which this metric compares with")
    return found
