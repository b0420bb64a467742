"""Several lists of levels for one student, so that it can make samples in different numbers of steps.

Each update trains with one list, as if it were that of the policy: `Networks.with_policy` hands it to everything that
reads the policy. What is exported is the policy's own list, `rollout.timesteps`, which is one of them."""

import bisect
import itertools
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, ValidationError

from fastgen.batch import Batch
from fastgen.registry import MOST_STEPS
from fastgen.rollout import RolloutPolicy

StepList = Annotated[tuple[float, ...], Field(min_length=1, max_length=MOST_STEPS)]
StepLists = Annotated[tuple[StepList, ...], Field(max_length=16)]


def policies(policy: RolloutPolicy, lists: StepLists) -> tuple[RolloutPolicy, ...]:
    """The policy with each of the lists, or itself if there are none. Raises ValueError for a list of levels that no
    policy can have."""
    return tuple(policy if levels == policy.timesteps else replace(policy, timesteps=levels) for levels in lists) or (
        policy,
    )


def check_lists(objective: Any, policy: RolloutPolicy) -> None:
    """Raises ValueError for `objective.lists` that the policy's own list is not in, that are not from many steps to
    few, or that need options which count the steps of one list."""
    lists = objective.lists
    if not lists:
        return
    if policy.timesteps not in lists:
        raise ValueError(
            f"rollout.timesteps {list(policy.timesteps)}, which the student is exported with, must be one of lists: "
            "add it to objective.lists, or change it"
        )
    lengths = [len(levels) for levels in lists]
    if lengths != sorted(set(lengths), reverse=True):
        raise ValueError(f"lists must go from many steps to few, each with fewer than the one before; got {lengths}")
    if objective.condition_on_stop or objective.renoise_range != "all":
        raise ValueError(
            "condition_on_stop and renoise_range tell the steps of one list apart, and lists has several: leave them "
            "out, or leave out lists"
        )
    try:
        policies(policy, lists)
    except ValidationError as error:
        raise ValueError(f"lists: {error.errors()[0]['msg']}") from None


def drawn_list(batch: Batch, shares: tuple[float, ...]) -> int:
    """The index of the list of this update, with these shares, which add up to 1. It is the same on all processes."""
    place = batch.integer("list", 1 << 20) / (1 << 20)
    return bisect.bisect_right([*itertools.accumulate(shares)][:-1], place)


def levels_of(lists: StepLists) -> tuple[float, ...]:
    """All levels of all lists, for `Objective.learned_levels`."""
    return tuple(sorted({level for levels in lists for level in levels}, reverse=True))
