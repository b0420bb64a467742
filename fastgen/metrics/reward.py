"""The mean reward of the samples, whether or not the student was trained on it."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.metrics.base import Direction, Directions, Metric, MetricContext
from fastgen.rewards import Reward
from fastgen.rewards.digit_class import DigitClass
from fastgen.rewards.digit_stroke import DigitStroke
from fastgen.rewards.jpeg_size import JpegSize


class RewardMetric(Metric):
    """<name>: the mean of the reward over the samples that have a score. <name>_std: their standard deviation,
    dividing by the count. Measured on the teacher's samples, these are the numbers that `calibration: zscore` needs.

    The reward comes from the context, or else from the class, if it needs no keys. Raises ValueError if there is
    neither. The reward's network, if it has one, is loaded with the first batch."""

    output = "pixels"
    reward: ClassVar[Reward | None] = None

    def __init__(self, context: MetricContext):
        super().__init__(context)
        reward = context.rewards.get(self.name, type(self).reward)
        if reward is None:
            raise ValueError(
                f"{self.name} needs the path of its network; set eval.scorers.{self.name}.path, or give "
                f"--scorer {self.name}=FOLDER"
            )
        self.measured: Reward = reward
        self.values: list[Tensor] = []

    @torch.no_grad()
    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        score = self.measured(samples.to(self.context.device), prompts)
        self.values.append(score.value[score.valid].double().cpu())

    def state(self) -> dict[str, Tensor]:
        return {"values": torch.cat(self.values)}

    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        self.values = [state["values"]]

    def compute(self) -> dict[str, float]:
        values = torch.cat(self.values) if self.values else torch.zeros(0)
        if not len(values):
            raise ValueError(f"{self.name} needs at least one sample with a score")
        return {self.name: float(values.mean()), f"{self.name}_std": float(values.std(correction=0))}


def reward_metric(
    name: str, kind: str = "pixels", better: Direction = "higher", reward: Reward | None = None
) -> type[RewardMetric]:
    """The metric of a registered reward. reward: an instance of it, if it needs no keys."""
    directions: Directions = {name: better, f"{name}_std": "neither"}
    reads = reward is None or reward.reads_prompts  # of one with keys, the config's reward says it
    members = {"name": name, "output": kind, "directions": directions, "reward": reward, "reads_prompts": reads}
    members["__module__"] = __name__
    return type(f"{name}_metric", (RewardMetric,), members)


DigitClassMetric = reward_metric("digit_class", reward=DigitClass())
DigitStrokeMetric = reward_metric("digit_stroke", better="neither", reward=DigitStroke())
JpegSizeMetric = reward_metric("jpeg_size", better="neither", reward=JpegSize())
ClipScoreMetric = reward_metric("clip_score")
ClipContrastMetric = reward_metric("clip_contrast")
HPSv2Metric = reward_metric("hpsv2")
PickscoreMetric = reward_metric("pickscore")
ImageRewardMetric = reward_metric("image_reward")
AestheticMetric = reward_metric("aesthetic")
HPSv3Metric = reward_metric("hpsv3")
VideoRewardMetric = reward_metric("video_reward", "frames")
MotionMetric = reward_metric("motion", "frames", "neither")
