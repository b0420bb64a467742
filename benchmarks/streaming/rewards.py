"""A reward for moving as the prompt says, without a network."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.metrics.tracks import centres, displacements, stated


def told_motion(frames: Tensor, prompts: Sequence[str]) -> Tensor:
    """[B]: minus the mean over pictures of | |d along| - speed | + |d across|, in pixels a picture, where d is the
    displacement of the bright centre and along the axis that the prompt names. (A digit bounces, so that its sign is
    free.) 0 is the best. frames: [B, F, 3, H, W] in [0, 1]."""
    said = stated(list(prompts), "direction", "speed")
    axis = torch.tensor([s.direction for s in said], dtype=torch.float64, device=frames.device).abs()
    speed = torch.tensor([s.speed for s in said], dtype=torch.float64, device=frames.device)[:, None]
    moved = displacements(centres(frames)).abs()
    along = (moved * axis[:, None]).sum(-1)
    across = (moved * (1 - axis[:, None])).sum(-1)
    return -((along - speed).abs() + across).mean(1).float()
