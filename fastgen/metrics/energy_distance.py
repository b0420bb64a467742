"""A distance between two distributions, estimated from samples. It is zero only if they are equal."""

import itertools
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from fastgen import noise
from fastgen.metrics.base import Directions
from fastgen.metrics.points import LawMetric

EXACT_SETS = 4  # their six pairs give the floor


def distances(x: Tensor, y: Tensor, rows: int = 1024) -> Iterator[Tensor]:
    """|x_i - y_j| in blocks of at most `rows` rows, from differences, not inner products, so that |x - x| is 0."""
    for block in x.split(rows):
        yield torch.cdist(block, y, compute_mode="donot_use_mm_for_euclid_dist")


def mean_distance(x: Tensor, y: Tensor | None = None) -> float:
    """Mean |x - y| over all pairs; with one set, over the pairs of different members."""
    total = sum(float(block.sum()) for block in distances(x, x if y is None else y))
    return total / (len(x) * (len(x) - 1) if y is None else len(x) * len(y))


class EnergyDistance(LawMetric):
    """2 E|x - y| - E|x - x'| - E|y - y'|    (Szekely and Rizzo, J. Stat. Plan. Inference 2013, eq. 2.1, without root)

    between the samples x and equally many exact samples y. The estimator is the U-statistic, whose means run over
    pairs of different samples. Two sets from one distribution therefore give 0 on average, and can give less than 0.
    The floor is the mean absolute value of the same estimator over all pairs of four exact sets of the same size. It
    is what a perfect student scores. With class labels, both numbers are computed within each label and averaged with
    the labels' shares, because a student that swaps two classes has the right pooled distribution."""

    name = "energy_distance"
    directions: ClassVar[Directions] = {"energy_distance": "lower", "energy_distance_floor": "neither"}

    def compute(self) -> dict[str, float]:
        value, floors = 0.0, [0.0] * (EXACT_SETS * (EXACT_SETS - 1) // 2)
        for group in self.groups(least=2):
            ids, label = group.ids, torch.full_like(group.ids, group.label)
            keys = [noise.make_key(self.context.seed, "exact", i) for i in range(EXACT_SETS)]
            exact = [self.law.sample(ids, label, key).flatten(1) for key in keys]
            within = [mean_distance(y) for y in exact]
            distance = 2 * mean_distance(group.points, exact[0]) - mean_distance(group.points) - within[0]
            value += group.share * distance
            for n, (i, j) in enumerate(itertools.combinations(range(EXACT_SETS), 2)):
                floors[n] += group.share * (2 * mean_distance(exact[i], exact[j]) - within[i] - within[j])
        return {"energy_distance": value, "energy_distance_floor": sum(map(abs, floors)) / len(floors)}
