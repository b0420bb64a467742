"""Does a video stay what it was at its beginning?"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.metrics.base import Directions, Metric
from fastgen.metrics.tracks import centres, displacements, early_and_late, mass

FROZEN = 0.1  # pixels a picture


class Drift(Metric):
    """Fading, freezing and flicker. Brightness below 0.1 counts as background.

    drift: |mass_ratio - 1|. mass_ratio: the mean brightness of the last quarter of the latent frames divided by that
    of the first quarter (at least one latent frame each), over all videos: 1 for a video that keeps its brightness,
    below 1 for one that fades. freeze_share: the share of videos whose median speed |c(k + 4) - c(k)| / 4 is below 0.1
    pixels a picture, with c the centre of brightness. flicker: the mean of |m(k + 1) - m(k)| / m(k) over the pictures
    that are not black, with m the brightness of a picture; at most 1 for each, so that a flash counts no more than a
    blackout.

    update raises ValueError for videos whose length is not 4 k + 1. Prompts are not read."""

    name = "drift"
    output = "frames"
    directions: ClassVar[Directions] = {
        "drift": "lower",
        "mass_ratio": "neither",
        "freeze_share": "lower",
        "flicker": "lower",
    }
    measured: Tensor = torch.zeros(0, 4, dtype=torch.float64)  # by video: early and late mass, frozen, flicker

    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        early, late = early_and_late(samples.shape[1])
        light = mass(samples)
        speed = displacements(centres(samples)).norm(dim=2).median(1).values
        columns = (light[:, early].mean(1), light[:, late].mean(1), speed < FROZEN, flicker_of(light))
        self.measured = torch.cat([self.measured, torch.stack([c.double() for c in columns], 1)])

    def compute(self) -> dict[str, float]:
        if not len(self.measured):
            raise ValueError("drift needs at least one sample")
        early, late, frozen, flicker = self.measured.mean(0).tolist()
        ratio = late / max(early, 1e-9)
        return {"drift": abs(ratio - 1), "mass_ratio": ratio, "freeze_share": frozen, "flicker": flicker}

    def state(self) -> dict[str, Tensor]:
        return {"measured": self.measured}

    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        self.measured = state["measured"]


def flicker_of(light: Tensor) -> Tensor:
    """The flicker [B] of the brightness [B, F]; 0 for a black video."""
    now, seen = light[:, :-1], light[:, :-1] > 0
    change = (light.diff(dim=1).abs() / torch.where(seen, now, 1)).clamp(max=1)
    return (change * seen).sum(1) / seen.sum(1).clamp(min=1)
