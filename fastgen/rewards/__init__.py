"""Rewards by name, as `rewards.parts` of a recipe chooses them; a class is imported only when it is chosen."""

from fastgen.rewards.base import Reward, Score
from fastgen.rewards.composite import Composite, Scorer

REWARDS: dict[str, str] = {
    "linear": "fastgen.rewards.linear:Linear",
    "quadratic": "fastgen.rewards.quadratic:Quadratic",
    "digit_class": "fastgen.rewards.digit_class:DigitClass",
    "digit_stroke": "fastgen.rewards.digit_stroke:DigitStroke",
    "jpeg_size": "fastgen.rewards.jpeg_size:JpegSize",
    "function": "fastgen.rewards.function:FunctionReward",
}

__all__ = ["REWARDS", "Composite", "Reward", "Score", "Scorer"]
