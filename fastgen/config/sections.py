"""The sections of a recipe that name a class, whose fields are then their keys. Importing these imports torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastgen.backbones.base import BackboneConfig
from fastgen.config.problems import Problems
from fastgen.data.base import DataSource
from fastgen.objectives.base import Objective
from fastgen.recipe import Recipe
from fastgen.registry import (
    BACKBONES,
    DATA,
    NAMED_SECTIONS,
    OBJECTIVES,
    REWARDS,
    RecipeError,
    build_section,
    check_keys,
    import_name,
    validated,
)
from fastgen.rewards import Composite, Reward

SECTIONS: dict[str, tuple[Mapping[str, str], type]] = {  # section -> its names and its base class
    "backbone": (BACKBONES, BackboneConfig),
    "data": (DATA, DataSource),
    "objective": (OBJECTIVES, Objective),
    "rewards": (REWARDS, Reward),
}


def with_named(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with the sections that name classes, built from what YAML gave for them. Raises RecipeError with all
    mistakes in them."""
    problems, built = Problems(), dict[str, Any]()
    for section in NAMED_SECTIONS:
        with problems.noting():
            built[section] = build_section(section, values[section], *SECTIONS[section])
    if recipe.rewards is not None:
        with problems.noting():
            built["rewards"] = build_rewards(recipe.rewards)
    problems.refuse()
    return dataclasses.replace(recipe, **built)


def build_rewards(given: Any) -> Composite:
    """The section `rewards`."""
    if not isinstance(given, dict):
        raise RecipeError(f"rewards: a section with parts is needed, got {str(given)[:80]!r}")
    check_keys(given, Composite, "rewards.")
    values = given | {"parts": build_parts(given.get("parts"))}
    if given.get("held_out"):
        values["held_out"] = build_parts(given["held_out"], "held_out")
    return validated(Composite, values, "rewards.")


def build_parts(value: Any, key: str = "parts") -> tuple[Reward, ...]:
    """The rewards of `rewards.parts` or `rewards.held_out`. A name that imports a function, or another callable that
    is no class, gives a FunctionReward of it."""
    if not isinstance(value, list) or not value:
        raise RecipeError(f"rewards.{key} must be a list of rewards, each with a name, one of {', '.join(REWARDS)}")
    parts = []
    for i, part in enumerate(value):
        section = f"rewards.{key}.{i}"
        name = part.get("name") if isinstance(part, dict) else None
        if isinstance(name, str) and ":" in name and not isinstance(import_name(section, name), type):
            if "function" in part:
                raise RecipeError(f"{section}.function: the name, {name}, is already the function; leave this key out")
            part = part | {"name": "function", "function": name}
        parts.append(build_section(section, part, REWARDS, Reward))
    return tuple(parts)
