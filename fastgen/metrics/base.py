"""The interface of a metric, and everything a metric may ask for."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fastgen.backbones.gaussian_mixture import Mixture
from fastgen.metrics.features import FeatureNetwork
from fastgen.metrics.reference import Reference

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
    mixture: the exact target law of points. timing: only where a sampler runs (not for a folder of images)."""

    num_samples: int
    seed: int
    reference: Reference | None = None
    features: FeatureNetwork | None = None
    mixture: Mixture | None = None
    timing: Timing | None = None


class Metric(ABC):
    """A streaming metric: made once, updated with each batch in order, computed once.

    name: its key in METRICS. output: the kind of sample it measures. directions: the keys compute() returns, and which
    way each is better. Subclasses raise ValueError from __init__ if the context lacks what they need."""

    name: ClassVar[str]
    output: ClassVar[Literal["pixels", "points", "any"]]
    directions: ClassVar[Directions]

    def __init__(self, context: MetricContext):
        self.context = context

    @abstractmethod
    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        """samples: pixels [B, 3, H, W] in [0, 1] or points [B, D], on the CPU, ordered by seed. prompts: [B]."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The numbers named in `directions`. Raises ValueError if there were too few samples."""

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
