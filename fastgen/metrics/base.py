"""The interface of a metric, and the context that a metric is created with."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastgen.backbones.ar1_law import AR1Law
from fastgen.backbones.gaussian_mixture import Mixture
from fastgen.data.order import permutation
from fastgen.metrics.features import FeatureNetwork
from fastgen.metrics.reference import Reference
from fastgen.noise import make_key
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
    the device of the rewards' networks. spread: whether `compared` is spread over the samples, or the first of them,
    which have the reference's own prompts."""

    num_samples: int
    seed: int
    reference: Reference | None = None
    features: FeatureNetwork | None = None
    law: Mixture | AR1Law | None = None
    timing: Timing | None = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    device: torch.device | str = "cpu"
    spread: bool = False

    @cached_property
    def compared(self) -> list[int]:
        """The samples that are compared with the reference: all, or as many as it has. They are a seeded choice if
        `spread`, because the first samples may all be of one class."""
        count = self.num_samples if self.reference is None else min(self.num_samples, len(self.reference))
        if not self.spread or count == self.num_samples:
            return list(range(count))
        return sorted(permutation(self.num_samples, make_key(self.seed, "eval compared"), 0)[:count].tolist())


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
    reads_prompts: ClassVar[bool] = False  # whether it compares samples with their prompts, or by them

    def __init__(self, context: MetricContext):
        self.context = context

    @classmethod
    def fits(cls, output: str, backbone: str) -> bool:
        """Whether it can measure this kind of sample, made by the backbone of this name."""
        return cls.output in (output, "any") and (not cls.backbones or backbone in cls.backbones)

    @classmethod
    def check_prompts(cls, prompts: Sequence[str]) -> None:
        """Raises ValueError for a prompt that it cannot read. Most metrics take any."""
        return None

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
