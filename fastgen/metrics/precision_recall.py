"""Fidelity and coverage, as two numbers."""

from typing import ClassVar

import torch
from torch import Tensor

from fastgen.metrics.base import Directions, MetricContext
from fastgen.metrics.energy_distance import distances
from fastgen.metrics.gathered import Compared

NEIGHBOURS = 3  # "k = 3", Sec. 3.1 of the paper


class PrecisionRecall(Compared):
    """Improved precision and recall, in [0, 1]    (Kynkaanniemi et al., arXiv 1904.06991, eqs. 1-3)

    The manifold of a set is the union of balls around its features. Each ball reaches to the k-th nearest other
    feature of the set, k = 3. precision: the share of generated features in the real manifold. recall: the share of
    real features in the generated manifold."""

    name = "precision_recall"
    fewest_samples = NEIGHBOURS + 1
    directions: ClassVar[Directions] = {"precision": "higher", "recall": "higher"}

    def __init__(self, context: MetricContext):
        super().__init__(context)
        if self.count <= NEIGHBOURS:
            raise ValueError(f"precision_recall needs more than {NEIGHBOURS} images per side, got {self.count}")

    def compute(self) -> dict[str, float]:
        real, fake = self.both()
        return {"precision": share_inside(fake, real), "recall": share_inside(real, fake)}


def share_inside(points: Tensor, manifold: Tensor) -> float:
    """The share of points [M, D] that lie in at least one ball of the manifold [N, D]."""
    # A feature is its own nearest neighbour, so the k-th other feature has the (k + 1)-th smallest distance.
    radius = torch.cat([block.kthvalue(NEIGHBOURS + 1, dim=1).values for block in distances(manifold, manifold)])
    inside = [(block <= radius).any(1) for block in distances(points, manifold)]
    return float(torch.cat(inside).double().mean())
