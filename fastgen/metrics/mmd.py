"""The maximum mean discrepancy between feature distributions."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastgen.metrics.base import Directions
from fastgen.metrics.energy_distance import distances
from fastgen.metrics.gathered import Compared

BANDWIDTH = 10.0  # sigma of the Gaussian kernel, for features of length 1
SCALE = 1000.0


class MMD(Compared):
    """1000 (E k(x, x') + E k(y, y') - 2 E k(x, y)),  k(a, b) = exp(-|a - b|^2 / (2 10^2))

    of real and generated features of length 1   (CMMD: Jayasumana et al., arXiv 2401.09603, with CLIP ViT-L/14 at 336
    pixels; its numbers are comparable only for that network). The means run over all pairs, those of an image with
    itself included, as in the authors' code. Unlike fid it fits no Gaussian, and it needs fewer samples."""

    name = "mmd"
    directions: ClassVar[Directions] = {"mmd": "lower"}

    def compute(self) -> dict[str, float]:
        real, fake = self.both()
        return {"mmd": discrepancy(F.normalize(real, dim=1), F.normalize(fake, dim=1))}


def discrepancy(x: Tensor, y: Tensor) -> float:
    """The value of `MMD` for features x [N, D] and y [M, D]."""
    return SCALE * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def mean_kernel(x: Tensor, y: Tensor) -> float:
    total = sum(float((-block.square() / (2 * BANDWIDTH**2)).exp().sum()) for block in distances(x, y))
    return total / (len(x) * len(y))
