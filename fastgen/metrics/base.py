"""The interface of a metric, and the context that a metric is created with."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastgen.backbones.ar1_law import AR1Law
from fastgen.backbones.gaussian_mixture import Mixture
from fastgen.metrics.features import FeatureNetwork
from fastgen.metrics.reference import Reference
from fastgen.rewards import Reward

Direction = Literal["lower", "higher", "neither"]
Directions = Mapping[str, Direction]  # name of a number -> whether lower or higher is better


@dataclass
class Timing:
    """The wall time of sampling and decoding each batch. It is filled while an evaluation runs.

    network_evaluations: network calls per sample."""

    network_evaluations: int
    batches: list[tuple[int, float]] = field(default_factory=list)  # (samples, seconds)


@dataclass(frozen=True)
class MetricContext:
    """What is known about an evaluation before its first sample. A field that does not apply is None.

    num_samples, seed: those of the evaluation; sample i has seed `seed + i`.
    reference: the real images. features: the feature network that all metrics share, so that each batch is embedded
    once. law: the exact target distribution of points. timing: given only if a sampler runs, not for a folder of
    images. rewards: the rewards that have keys in the config, by the names of the metrics that measure them. device:
    the device of the rewards' networks."""

    num_samples: int
    seed: int
    reference: Reference | None = None
    features: FeatureNetwork | None = None
    law: Mixture | AR1Law | None = None
    timing: Timing | None = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    device: torch.device | str = "cpu"


class Metric(ABC):
    """A streaming metric: it is created once, updated with each batch in order, and computed once.

    name: its key in METRICS. output: the kind of sample that it measures. directions: the keys that compute()
    returns, and whether lower or higher is better for each. Subclasses raise ValueError from __init__ if the context
    lacks what they need."""

    name: ClassVar[str]
    output: ClassVar[Literal["pixels", "frames", "points", "any"]]
    directions: ClassVar[Directions]
    backbones: ClassVar[tuple[str, ...]] = ()  # the backbones whose exact law it needs; (): it needs none
    needs_reference: ClassVar[bool] = False  # whether it compares with real images
    fewest_samples: ClassVar[int] = 1
    compares_within_prompts: ClassVar[bool] = False  # whether it needs a prompt with two samples

    def __init__(self, context: MetricContext):
        self.context = context

    @classmethod
    def fits(cls, output: str, backbone: str) -> bool:
        """Whether it can measure this kind of sample, made by the backbone of this name."""
        return cls.output in (output, "any") and (not cls.backbones or backbone in cls.backbones)

    @abstractmethod
    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        """samples: pixels [B, 3, H, W] or frames [B, F, 3, H, W] in [0, 1], or points [B, D], on the CPU, ordered by
        seed. prompts: one per sample."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The numbers named in `directions`. Raises ValueError if there were too few samples."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that `update` has gathered, so that an interrupted evaluation can continue."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        """Loads what `state` returned into a new metric. prompts: those of all samples that the state covers. The
        numbers computed afterwards are the same to the bit."""

    def need_features(self) -> FeatureNetwork:
        if self.context.features is None:
            raise ValueError(
                f"{self.name} needs a feature network; set eval.features to digits, inception, clip or latents"
            )
        return self.context.features

    def need_reference(self) -> Reference:
        if self.context.reference is None:
            raise ValueError(
                f"{self.name} compares with other images; set eval.reference to their folder, to teacher or to digits"
            )
        return self.context.reference
