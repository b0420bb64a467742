"""Recipes: each is one complete YAML file, which is checked before anything heavy loads.

Sections are frozen pydantic dataclasses. `backbone`, `objective`, `data` and each entry of `rewards.parts` name their
class, and the fields of that class are their keys.
Every refusal gives the full path of the key and, if the key is misspelt, the nearest valid spelling.

text.py      YAML and overrides
problems.py  gathers mistakes, so that all of them are said at once
sections.py  the sections that name a class
checks.py    whether the sections fit each other
stored.py    a recipe as it is stored, and compared

A recipe is checked in stages, and each names all mistakes that it finds. The first ones, up to the values of the
sections that name no class and the path of a pipeline, do without torch, which takes seconds to import.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgen.backbones.folder import check_source
from fastgen.config.problems import Problems
from fastgen.config.text import apply_override, home_expanded, read_recipe
from fastgen.recipe import Recipe
from fastgen.registry import (
    NAMED_SECTIONS,
    PIPELINES,
    RecipeError,
    check_keys,
    check_name,
    current_names,
    shipped,
    validated,
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and checks a recipe. overrides: "dotted.key=value", where the value is read as YAML.

    If there is nothing at the path, for example at recipes/digits_dmd2_4step.yaml in an empty folder, this reads the
    recipe with that path that ships with fastgen. Raises RecipeError for anything that is wrong with the recipe."""
    raw = read_recipe(Path(path) if os.path.exists(path) else shipped(path), path)
    for text in overrides:
        apply_override(raw, text)
    return build_recipe(raw)


def load_stored(path: Path) -> Recipe:
    """The recipe stored in a run or an export. Keys that had another name in an earlier version are renamed. Files
    that only training needs, such as images or `init_from`, may have moved since."""
    raw = read_recipe(path, path)
    for section, values in raw.items():
        if isinstance(values, dict):
            raw[section] = current_names(section, values)
    return build_recipe(raw, files=False)


def build_recipe(raw: Mapping[str, Any], files: bool = True) -> Recipe:
    """Checks names, keys, types and ranges of all sections, then whether the sections fit each other. files: whether
    the files that training needs must be there. Raises RecipeError."""
    values = home_expanded(dict(raw))
    recipe = build_plain(values)
    from fastgen.config.checks import check_recipe  # these two import torch
    from fastgen.config.sections import with_named

    recipe = with_named(recipe, values)
    check_recipe(recipe, files)
    return recipe


def build_plain(values: Mapping[str, Any]) -> Recipe:
    """The recipe with the sections that name no class; the others are still what YAML gave, except that their names
    are known. Raises RecipeError with all mistakes in these sections and names."""
    problems, known = Problems(), {field.name for field in dataclasses.fields(Recipe)}
    with problems.noting():
        check_keys(values, Recipe, "")
    for section, names in NAMED_SECTIONS.items():
        with problems.noting():
            if section not in values:
                raise RecipeError(f"missing key {section}: add it with a name, one of {', '.join(names)}")
            check_name(section, values[section], names)
    with problems.noting("backbone"):
        check_path(values.get("backbone"))
    with problems.noting():
        given = {key: value for key, value in values.items() if key in known}
        recipe = validated(Recipe, dict.fromkeys(NAMED_SECTIONS) | given, "")
    if any(line.startswith("unknown key") for line in problems.lines):  # pydantic says that too, in worse words
        problems.lines = [line for line in problems.lines if ": Unexpected keyword argument" not in line]
    problems.refuse()
    return recipe


def check_path(backbone: Any) -> None:
    """Raises ValueError if a pipeline is not where its section says."""
    if isinstance(backbone, dict) and backbone.get("name") in PIPELINES and isinstance(backbone.get("path"), str):
        check_source(backbone["path"])
