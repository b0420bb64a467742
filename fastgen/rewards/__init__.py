"""Rewards by name, as `rewards.parts` in a recipe lists them. A class is imported only when it is chosen."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fastgen.registry import REWARDS, SCORERS, imported
from fastgen.rewards.base import Reward, Score
from fastgen.rewards.composite import Composite, Scorer


def make_reward(name: str, keys: Mapping[str, Any]) -> Reward:
    """The registered reward `name` with these keys. Its files are not checked here, see `Reward.ready`. Raises
    ValueError with one line per error, each of which names the key."""
    try:
        return TypeAdapter(imported(REWARDS[name])).validate_python(dict(keys))
    except ValidationError as error:
        required = "required but not given; docs/rewards.md explains it"
        raise ValueError(
            "\n".join(
                f"{name}.{'.'.join(map(str, e['loc']))}: "
                f"{required if e['type'] == 'missing' else e['msg'].removeprefix('Value error, ')}"
                for e in error.errors()
            )
        ) from None


__all__ = ["REWARDS", "SCORERS", "Composite", "Reward", "Score", "Scorer", "make_reward"]
