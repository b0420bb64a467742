"""Samples that are used for several updates. They are kept in the objective's state, so they are checkpointed and are
equal on all processes.

replay.age counts the updates that have used the samples. replay.<name> [N, ...] holds the N samples of one update,
from all its micro-batches and processes, in the order of their ids. In a later update, a sample with a given id uses
row id % N."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastgen.batch import Batch, Conditioning
from fastgen.modules.processes import gathered

PREFIX = "replay."
AGE = "replay.age"


def empty() -> dict[str, Tensor]:
    """The state before any sample is stored, for `Objective.init_state`."""
    return {AGE: torch.zeros((), dtype=torch.int64)}


def needs_samples(state: Mapping[str, Tensor]) -> bool:
    """Whether this update has to make new samples."""
    return int(state[AGE]) == 0


def store(state: dict[str, Tensor], samples: Mapping[str, Tensor]) -> None:
    """Appends a micro-batch of tensors [B, ...]. Every process passes its own rows, and all of them are stored."""
    append(state, PREFIX, samples)


def recall(state: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The stored rows for the samples with these ids [B], by name."""
    stored = rows_of(state, PREFIX)
    del stored["age"]
    return {name: value[ids % len(value)] for name, value in stored.items()}


def count_use(state: dict[str, Tensor], updates: int) -> None:
    """Counts one use, for `Objective.finish`, once per update. After `updates` uses the samples are dropped, and after
    one if they are not finite: every update that uses them is skipped."""
    state[AGE].add_(1).remainder_(updates)
    if not all(bool(value.isfinite().all()) for value in rows_of(state, PREFIX).values()):
        state[AGE].zero_()
    if needs_samples(state):
        for name in [name for name in state if name.startswith(PREFIX) and name != AGE]:
            del state[name]


def conditioning(batch: Batch) -> dict[str, Tensor]:
    """Both conditionings of a batch as rows, cond.<key> and uncond.<key>. The negative one belongs to the sample, too:
    it has the image, the actions or the sound that the sample is made from."""
    both = {"cond": batch.cond, "uncond": batch.uncond}
    return {f"{name}.{key}": value for name, values in both.items() for key, value in values.items()}


def conditioned(batch: Batch, rows: Mapping[str, Tensor]) -> Batch:
    """The batch with the conditionings among these rows."""
    cond, uncond = (Conditioning(rows_of(rows, prefix)) for prefix in ("cond.", "uncond."))
    return replace(batch, cond=cond, uncond=uncond)


def append(state: dict[str, Tensor], prefix: str, samples: Mapping[str, Tensor]) -> None:
    """Appends every process's rows [B, ...] to the state's entries <prefix><name>."""
    for key, value in samples.items():
        rows = gathered(value)
        state[prefix + key] = torch.cat([state[prefix + key], rows]) if prefix + key in state else rows


def rows_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The state's entries with this prefix, by the names after it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
