"""Does the video move as the prompt says?"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.metrics.base import Directions, Metric
from fastgen.metrics.tracks import STEP, centres, displacements, stated

STILL = 0.5  # pixels in STEP pictures that do not count as motion; the slowest videos move 2


class MotionError(Metric):
    """How far the motion of the centre of brightness is from the prompt's direction and speed.

    direction_accuracy: the share of videos that begin in the told direction: after 4 pictures the centre has moved
    that way, by more than half a pixel and by more than it has moved across. speed_error: the mean over videos of
    |v - told speed|, in pixels a picture, where v is the median over the video of |c(k + 4) - c(k)| / 4 along the told
    axis; the median leaves out the few pairs with a bounce between them. wander: the mean over videos of the mean
    |c(k) - mean of c| across the told axis, in pixels.

    update raises ValueError for a prompt without a direction or a speed, and for videos shorter than 5 frames."""

    name = "motion_error"
    output = "frames"
    reads_prompts = True
    directions: ClassVar[Directions] = {
        "direction_accuracy": "higher",
        "speed_error": "lower",
        "wander": "lower",
    }
    measured: Tensor = torch.zeros(0, 3, dtype=torch.float64)  # by video: direction right, speed error, wander

    @classmethod
    def check_prompts(cls, prompts: Sequence[str]) -> None:
        stated(list(prompts), "direction", "speed")

    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        if samples.shape[1] <= STEP:
            raise ValueError(f"motion_error needs videos of at least {STEP + 1} frames, got {samples.shape[1]}")
        said = stated(list(prompts), "direction", "speed")
        along = torch.tensor([part.direction for part in said], dtype=torch.float64)  # [B, 2]
        speed = torch.tensor([part.speed for part in said], dtype=torch.float64)
        centre = centres(samples)
        begun = centre[:, STEP] - centre[:, 0]
        forward = (begun * along).sum(1)
        across = begun.abs()[along == 0]
        moved = (displacements(centre) * along[:, None]).sum(2).abs()
        apart = centre[(along == 0)[:, None].expand_as(centre)].view(centre.shape[:2])
        columns = (
            (forward > STILL) & (forward > across),
            (moved.median(1).values - speed).abs(),
            (apart - apart.mean(1, keepdim=True)).abs().mean(1),
        )
        self.measured = torch.cat([self.measured, torch.stack([c.double() for c in columns], 1)])

    def compute(self) -> dict[str, float]:
        if not len(self.measured):
            raise ValueError("motion_error needs at least one sample")
        return dict(zip(self.directions, self.measured.mean(0).tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        return {"measured": self.measured}

    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        self.measured = state["measured"]
