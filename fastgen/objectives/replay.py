"""Samples that serve several updates, kept in an objective's state: tensors, checkpointed, equal on all processes.

replay.age counts the updates they have served; replay.<name> [N, ...] are the N samples of one update, of all its
micro-batches and processes, in the order of their ids: the rows of any micro-batch of a later update are ids % N."""

from collections.abc import Mapping

import torch
from accelerate.utils import gather
from torch import Tensor

AGE = "replay.age"


def empty() -> dict[str, Tensor]:
    """For `Objective.init_state`."""
    return {AGE: torch.zeros((), dtype=torch.int64)}


def is_fresh(state: Mapping[str, Tensor]) -> bool:
    """Whether this update has to make its samples."""
    return int(state[AGE]) == 0


def store(state: dict[str, Tensor], samples: Mapping[str, Tensor]) -> None:
    """Appends a micro-batch: tensors [B, ...], of which every process gives its own rows."""
    for key, value in samples.items():
        name, rows = f"replay.{key}", gather(value.contiguous())
        state[name] = torch.cat([state[name], rows]) if name in state else rows


def recall(state: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The rows of the samples with these ids [B]."""
    stored = {name.removeprefix("replay."): value for name, value in state.items() if name.startswith("replay.")}
    del stored["age"]
    return {name: value[ids % len(value)] for name, value in stored.items()}


def grow_older(state: dict[str, Tensor], updates: int) -> None:
    """For `Objective.finish`, once an update: after so many updates the samples are dropped."""
    state[AGE].add_(1).remainder_(updates)
    if is_fresh(state):
        for name in [name for name in state if name.startswith("replay.") and name != AGE]:
            del state[name]
