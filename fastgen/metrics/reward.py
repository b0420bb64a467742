"""What a reward gives the samples, whether or not anything was trained on it."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.metrics.base import Directions, Metric, MetricContext
from fastgen.rewards import Reward
from fastgen.rewards.digit_class import DigitClass
from fastgen.rewards.digit_stroke import DigitStroke
from fastgen.rewards.jpeg_size import JpegSize


class RewardMetric(Metric):
    """<name>: mean of the reward over the samples that have one; <name>_std: their standard deviation, dividing by the
    count. Both are what `calibration: zscore` asks for, measured on the teacher's samples."""

    output = "pixels"
    reward: ClassVar[Reward]

    def __init__(self, context: MetricContext):
        super().__init__(context)
        self.values: list[Tensor] = []

    @torch.no_grad()
    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        score = self.reward(samples, prompts)
        self.values.append(score.value[score.valid].double())

    def compute(self) -> dict[str, float]:
        values = torch.cat(self.values) if self.values else torch.zeros(0)
        if not len(values):
            raise ValueError(f"{self.name} needs at least one sample with a score")
        return {self.name: float(values.mean()), f"{self.name}_std": float(values.std(correction=0))}


class DigitClassReward(RewardMetric):
    name, reward = "digit_class", DigitClass()
    directions: ClassVar[Directions] = {"digit_class": "higher", "digit_class_std": "neither"}


class DigitStrokeReward(RewardMetric):
    name, reward = "digit_stroke", DigitStroke()
    directions: ClassVar[Directions] = {"digit_stroke": "neither", "digit_stroke_std": "neither"}


class JpegSizeReward(RewardMetric):
    name, reward = "jpeg_size", JpegSize()
    directions: ClassVar[Directions] = {"jpeg_size": "neither", "jpeg_size_std": "neither"}
