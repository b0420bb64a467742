"""A reward of motion on AR(1) videos. Its tilt of their law has a closed form."""

import math
from collections.abc import Sequence

from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.backbones.ar1_law import to_complex
from fastgen.backbones.base import BackboneConfig
from fastgen.rewards.base import CONFIG, Reward


@dataclass(frozen=True, config=CONFIG)
class AR1Motion(Reward):
    """r(x) = 1/2 Re sum_k e^{-i phase} z_{k+1} conj(z_k): how much each frame is the one before, turned by `phase`.

    The half is the mean over the two channels of a frame. Tilting a law of mean 0 and precision P, in which frames
    have variance 1, by exp(r / beta) gives the precision P - B / beta, where B is `ar1_formulas.motion_form`. With
    several copies in a sample, r is their sum."""

    phase: float

    input = "latents"
    differentiable = True
    reads_prompts = False

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        z = to_complex(x)
        turned = z[:, 1:] * z[:, :-1].conj() * complex(math.cos(self.phase), -math.sin(self.phase))
        return turned.real.sum((1, 2)) / 2

    def check(self, config: BackboneConfig) -> None:
        super().check(config)
        if config.name != "ar1_video":
            raise ValueError(f"ar1_motion reads the videos of backbone ar1_video, not those of {config.name}")
