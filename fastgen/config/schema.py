"""The JSON schema of a recipe, with which an editor completes keys, explains them and underlines mistakes.

It is made from the same classes that check a recipe (`fastgen schema` writes it), and says what holds for each key on
its own. What holds between keys is only checked when the recipe is read."""

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fastgen.config.sections import SECTIONS
from fastgen.recipe import Recipe
from fastgen.registry import imported
from fastgen.rewards import Composite

DIALECT = "https://json-schema.org/draft/2020-12/schema"
DEFS = "#/$defs/{model}"
IMPORTED = ":"  # a name with a colon is the import path of the user's own class, whose keys are not known here


def recipe_schema() -> dict[str, Any]:
    """The schema as plain JSON values."""
    found: dict[str, Any] = {}
    whole = described(Recipe, found)
    for section, (names, _) in SECTIONS.items():
        whole["properties"][section] = named(section, names, found)
    parts = whole["properties"]["rewards"]
    composite = described(Composite, found)
    composite["properties"] |= {key: {"type": "array", "items": parts} for key in ("parts", "held_out")}
    whole["properties"]["rewards"] = {"anyOf": [composite, {"type": "null"}]}
    whole["properties"]["optimizers"] |= {"description": "role -> its AdamW"}
    return {"$schema": DIALECT, "title": "A recipe of fastgen", **whole, "$defs": dict(sorted(found.items()))}


def recipe_schema_text() -> str:
    return json.dumps(recipe_schema(), indent=1, sort_keys=True) + "\n"


def is_schema(path: Path) -> bool:
    """Whether a file holds a JSON schema, which a newer one may replace."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "$schema" in content


def described(cls: type, found: dict[str, Any]) -> dict[str, Any]:
    """The schema of a section's class. Classes inside it go into `found`."""
    schema = TypeAdapter(cls).json_schema(ref_template=DEFS)
    for name, inner in schema.pop("$defs", {}).items():
        found[name] = inner
    if "$ref" in schema:  # a class that refers to itself
        schema = found[schema["$ref"].rpartition("/")[2]]
    return schema | {"additionalProperties": False, "description": page(cls)}


def page(cls: type) -> str:
    """What a class says about itself, or else its module. A dataclass without a docstring only repeats its fields."""
    own = cls.__doc__ or ""
    module = sys.modules[cls.__module__].__doc__ or ""
    return inspect.cleandoc(module if not own or own.startswith(f"{cls.__name__}(") else own)


def named(section: str, names: Mapping[str, str], found: dict[str, Any]) -> dict[str, Any]:
    """A section whose `name` chooses a class: each name with the keys of its class, under `if` and `then`, because
    editors then complain about the key that is wrong and not about the whole section."""
    choices = []
    for name, path in names.items():
        schema = described(imported(path), found)
        schema["properties"] = {**schema.get("properties", {}), "name": {"const": name}}
        found[f"{section}.{name}"] = schema
        chosen = {"required": ["name"], "properties": {"name": {"const": name}}}
        choices.append({"if": chosen, "then": {"$ref": f"#/$defs/{section}.{name}"}})
    known = {"anyOf": [{"enum": list(names)}, {"type": "string", "pattern": IMPORTED}]}
    return {"type": "object", "required": ["name"], "properties": {"name": known}, "allOf": choices}
