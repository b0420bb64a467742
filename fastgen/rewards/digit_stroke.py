"""How much ink is in a picture of a digit?"""

from collections.abc import Sequence

from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.rewards.base import CONFIG, Reward


@dataclass(frozen=True, config=CONFIG)
class DigitStroke(Reward):
    """r(x) = mean over channels and pixels of x: the inked fraction of the picture, in [0, 1]. Ink is white on black.

    The gradient is 1 / (3 H W) everywhere. Broad strokes score higher; a white picture scores 1."""

    input = "pixels"
    differentiable = True
    reads_prompts = False

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        return x.flatten(1).mean(1)
