"""Metrics that compare the features of all samples at once."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastgen.metrics.base import Metric, MetricContext


class Gathered(Metric):
    """Keeps the features of every sample until the last one is there."""

    output = "pixels"

    def __init__(self, context: MetricContext):
        super().__init__(context)
        self.features = self.need_features()
        self.generated: list[Tensor] = []

    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        self.generated.append(self.features(samples))

    def state(self) -> dict[str, Tensor]:
        return {"generated": torch.cat(self.generated)}

    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        self.generated = [state["generated"]]


class Compared(Gathered):
    """Compares them with those of real images. Both sides have n = min(num_samples, len(reference)) images: the first
    n of the reference, and those generated images that `MetricContext.compared` names."""

    needs_reference = True

    def __init__(self, context: MetricContext):
        super().__init__(context)
        self.reference = self.need_reference()
        self.count = len(context.compared)

    def both(self) -> tuple[Tensor, Tensor]:
        """Features [n, D] float64, real and generated. Raises ValueError if samples are missing."""
        fake = torch.cat(self.generated)
        if len(fake) != self.context.num_samples:
            raise ValueError(f"{self.name} expected {self.context.num_samples} samples, got {len(fake)}")
        real = self.features.of_reference(self.reference, self.count)
        return real.double(), fake[self.context.compared].double()
