"""The order in which a run sees its samples: each epoch is an independent permutation, keyed by the run's seed.

Samples of several sizes (buckets) are seen in updates of one size each. Bucket k has n_k of N samples, and an update
has U. After e epochs, bucket k has had floor(e n_k / U) updates. So every sample is seen equally often in the long
run, however few its bucket has; and what an update shows is known without going through those before it."""

from collections.abc import Sequence
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


def bucketed(positions: Tensor, bucket_of: Tensor, unit: int, key: int) -> Tensor:
    """The sample at each global position [B] if all `unit` samples of an update have the same bucket. bucket_of: [N],
    the bucket of each sample. The updates of an epoch are permuted, and so are the samples of each bucket."""
    sizes, result = bucket_of.bincount().tolist(), torch.empty_like(positions)
    updates = positions // unit
    for update in updates.unique().tolist():
        bucket, number = place_of(update, sizes, unit, key)
        here = updates == update
        members = (bucket_of == bucket).nonzero()[:, 0]
        order = shuffled(number * unit + positions[here] % unit, len(members), noise.make_key(key, "bucket", bucket))
        result[here] = members[order]
    return result


def place_of(update: int, sizes: Sequence[int], unit: int, key: int) -> tuple[int, int]:
    """The bucket of an update, and how many updates that bucket had before it. sizes: of the buckets."""

    def had(epochs: int) -> list[int]:
        return [epochs * size // unit for size in sizes]

    epoch = update * unit // sum(sizes)  # or a later one, as each bucket's number is rounded down
    while sum(had(epoch + 1)) <= update:
        epoch += 1
    before, after = had(epoch), had(epoch + 1)
    place = int(permutation(sum(after) - sum(before), key, epoch)[update - sum(before)])
    for bucket, (first, last) in enumerate(zip(before, after, strict=True)):
        if place < last - first:
            return bucket, first + place
        place -= last - first
    raise AssertionError


@lru_cache(maxsize=4)
def permutation(size: int, key: int, epoch: int) -> Tensor:
    """The permutation of one epoch: [size] int64."""
    return noise.uniform(torch.arange(size), (), noise.make_key(key, "epoch", epoch), torch.float64).argsort()
