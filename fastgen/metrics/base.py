"""The interface of a metric, and everything a metric may ask for."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastgen.backbones.gaussian_mixture import Mixture
from fastgen.metrics.features import FeatureNetwork
from fastgen.metrics.reference import Reference
from fastgen.rewards import Reward

Direction = Literal["lower", "higher", "neither"]
Directions = Mapping[str, Direction]  # number -> which way it is better


@dataclass
class Timing:
    """Wall time of each batch of sampling and decoding, filled while an evaluation runs.

    network_evaluations: calls of the network for one sample."""

    network_evaluations: int
    batches: list[tuple[int, float]] = field(default_factory=list)  # (samples, seconds)


@dataclass(frozen=True)
class MetricContext:
    """What an evaluation knows before the first sample. A field that does not apply is None.

    num_samples, seed: of the evaluation; sample i has seed `seed + i`.
    reference: real images. features: shared by all metrics, so that each batch is embedded once.
    mixture: the exact target law of points. timing: only where a sampler runs (not for a folder of images). rewards:
    by the names of the metrics that measure them, where they have keys of their own. device: their networks' place."""

    num_samples: int
    seed: int
    reference: Reference | None = None
    features: FeatureNetwork | None = None
    mixture: Mixture | None = None
    timing: Timing | None = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    device: torch.device | str = "cpu"


class Metric(ABC):
    """A streaming metric: made once, updated with each batch in order, computed once.

    name: its key in METRICS. output: the kind of sample it measures. directions: the keys compute() returns, and which
    way each is better. Subclasses raise ValueError from __init__ if the context lacks what they need."""

    name: ClassVar[str]
    output: ClassVar[Literal["pixels", "frames", "points", "any"]]
    directions: ClassVar[Directions]

    def __init__(self, context: MetricContext):
        self.context = context

    @abstractmethod
    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        """samples: pixels [B, 3, H, W] or frames [B, F, 3, H, W] in [0, 1], or points [B, D], on the CPU, ordered by
        seed. prompts: [B]."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The numbers named in `directions`. Raises ValueError if there were too few samples."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that `update` has gathered, so that an evaluation can be interrupted."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        """What `state` gave, into a metric that is new; prompts: of all samples it had seen. The numbers that come of
        it are the same to the bit."""

    def need_features(self) -> FeatureNetwork:
        if self.context.features is None:
            raise ValueError(f"{self.name} needs a feature network; set eval.features to digits or inception")
        return self.context.features

    def need_reference(self) -> Reference:
        if self.context.reference is None:
            raise ValueError(
                f"{self.name} compares with real images; set eval.reference to digits or a folder of images"
            )
        return self.context.reference
