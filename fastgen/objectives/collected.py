"""The rows by which all samples of an update are compared, before its first gradient.

In a turn with `Turn.collects` the loop shows an objective every micro-batch twice. `Objective.collect` makes the
samples and scores them. It leaves in `Batch.shared` what only this micro-batch needs again, and adds to the state,
here, what is compared: one row for each sample. The rows of all micro-batches and processes come together in the
order of their ids. `Objective.loss` reads both, and `Objective.finish` drops the rows.

A loss that is called without `collect` compares the samples of its micro-batch."""

from collections.abc import Mapping

from torch import Tensor

from fastgen.objectives.replay import append, rows_of

PREFIX = "collected."


def add(state: dict[str, Tensor], rows: Mapping[str, Tensor]) -> None:
    """Appends the rows [B, ...] of a micro-batch. Every process passes its own."""
    append(state, PREFIX, rows)


def of_update(state: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The rows of all samples of the update, [N, ...]; where nothing was collected, these of the micro-batch."""
    return rows_of(state, PREFIX) or rows


def of_samples(value: Tensor, ids: Tensor) -> Tensor:
    """The entries of value [N] that belong to the samples of a micro-batch with these ids [B]. N is the number of
    samples of an update, a multiple of which is the first id of every update; where nothing was collected it is B."""
    return value if len(value) == len(ids) else value[ids % len(value)]


def drop(state: dict[str, Tensor]) -> None:
    for name in rows_of(state, PREFIX):
        del state[PREFIX + name]
