"""The order in which a run sees its samples: each epoch is an independent permutation, keyed by the run's seed."""

from functools import lru_cache

import torch
from torch import Tensor

from fastgen import noise


def shuffled(positions: Tensor, size: int, key: int) -> Tensor:
    """The index into a list of length `size` for each global position. Each epoch permutes the list independently."""
    epochs = positions // size
    result = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        result[epochs == epoch] = permutation(size, key, epoch)[positions[epochs == epoch] % size]
    return result


@lru_cache(maxsize=4)
def permutation(size: int, key: int, epoch: int) -> Tensor:
    """The permutation of one epoch: [size] int64."""
    return noise.uniform(torch.arange(size), (), noise.make_key(key, "epoch", epoch), torch.float64).argsort()
