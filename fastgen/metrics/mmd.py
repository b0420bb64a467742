"""The maximum mean discrepancy between feature distributions."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.metrics.base import Directions, Metric, MetricContext
from fastgen.metrics.energy_distance import distances

BANDWIDTH = 10.0  # sigma of the Gaussian kernel, for features of length 1
SCALE = 1000.0


class MMD(Metric):
    """1000 (E k(x, x') + E k(y, y') - 2 E k(x, y)),  k(a, b) = exp(-|a - b|^2 / (2 10^2))

    of real and generated features of length 1   (CMMD: Jayasumana et al., arXiv 2401.09603, with CLIP ViT-L/14 at 336
    pixels; its numbers are comparable only for that network). The means run over all pairs, those of an image with
    itself included, as in the authors' code. Unlike fid it fits no Gaussian, and it needs fewer samples. Both sides
    have n = min(num_samples, len(reference)) images, the first n of each."""

    name = "mmd"
    needs_reference = True
    output = "pixels"
    directions: ClassVar[Directions] = {"mmd": "lower"}

    def __init__(self, context: MetricContext):
        super().__init__(context)
        self.features, self.reference = self.need_features(), self.need_reference()
        self.count = min(context.num_samples, len(self.reference))
        self.generated: list[Tensor] = []

    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        self.generated.append(self.features(samples))

    def state(self) -> dict[str, Tensor]:
        return {"generated": torch.cat(self.generated)}

    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        self.generated = [state["generated"]]

    def compute(self) -> dict[str, float]:
        fake = torch.cat(self.generated)[: self.count]
        if len(fake) != self.count:
            raise ValueError(f"mmd expected {self.count} samples, got {len(fake)}")
        real = self.features.of_reference(self.reference, self.count)
        return {"mmd": discrepancy(F.normalize(real.double(), dim=1), F.normalize(fake.double(), dim=1))}


def discrepancy(x: Tensor, y: Tensor) -> float:
    """The value of `MMD` for features x [N, D] and y [M, D]."""
    return SCALE * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def mean_kernel(x: Tensor, y: Tensor) -> float:
    total = sum(float((-block.square() / (2 * BANDWIDTH**2)).exp().sum()) for block in distances(x, y))
    return total / (len(x) * len(y))
