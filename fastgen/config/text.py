"""The text of a recipe: YAML with some limits, and overrides. Nothing is checked here but the form."""

import os
from pathlib import Path
from typing import Any

import yaml

from fastgen.registry import RecipeError

MOST_BYTES = 1 << 20  # of a recipe; the shipped ones have two thousand
MOST_VALUES = 20_000  # the shipped ones have a hundred; more take seconds to read


class RecipeLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML itself would silently keep the last one, and a text
    of more than MOST_VALUES values. Those behind an alias count wherever it stands: a few lines of aliases of aliases
    would fill the memory.

    Only true and false are booleans, as in YAML 1.2: `mixed_precision: no` is the text "no"."""

    def __init__(self, text: str):
        super().__init__(text)
        self._count, self._sizes = 0, dict[int, int]()  # of values so far; of values in each node that is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        before, alias = self._count, self.check_event(yaml.AliasEvent)  # type: ignore[no-untyped-call]
        self._count += 1
        node = super().compose_node(parent, index)
        if not alias:
            self._sizes[id(node)] = self._count - before
        elif (size := self._sizes.get(id(node))) is None:
            raise RecipeError("has a value that contains itself")
        else:
            self._count += size
        if self._count > MOST_VALUES:
            raise RecipeError(f"has more than {MOST_VALUES:,} values; keep long lists, such as prompts, in a file")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[Any]()
        for key in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            name = self.construct_object(key, deep=True)  # type: ignore[no-untyped-call]
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} is given twice", node.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


RecipeLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or letter in "tTfF"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text. Raises RecipeError, which begins with `what`, for one that is not valid."""
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{what} is not valid YAML: {error}") from None
    except RecipeError as error:
        raise RecipeError(f"{what} {error}") from None
    except (ValueError, TypeError) as error:  # such as 2024-13-45, which looks like a date, or a list as a key
        raise RecipeError(f"{what} is not valid YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{what} is nested too deeply to be a recipe") from None


def read_recipe(file: Path, name: str | Path) -> dict[str, Any]:
    """The YAML of a recipe, not checked yet. name: the path as the user gave it, for messages."""
    try:
        if file.exists() and not file.is_file():
            raise RecipeError(f"{name} is not a file; give the recipe's YAML file")
        if file.stat().st_size > MOST_BYTES:
            raise RecipeError(f"{name} has {file.stat().st_size:,} bytes, which is no recipe; give a YAML file")
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {name}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or a text that is not UTF-8
        raise RecipeError(f"cannot read the recipe {name}: {error}") from None
    raw = parse_yaml(text, str(name))
    if not isinstance(raw, dict):
        raise RecipeError(f"{name} must hold a mapping of sections, got {type(raw).__name__}")
    return raw


def apply_override(raw: dict[str, Any], text: str) -> None:
    """Sets one dotted key in place. Raises RecipeError if the text is no override, or if a parent is not a section."""
    key, equals, value = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise RecipeError(f"{text!r} is not an override; write dotted.key=value")
    *parents, last = key.split(".")
    node = raw
    for i, part in enumerate(parents):
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise RecipeError(f"cannot set {key}: {'.'.join(parents[: i + 1])} is not a section")
    node[last] = parse_yaml(value, f"the value of {key}")


def home_expanded(value: Any) -> Any:
    """The same values, with a leading ~/ of a text replaced by the user's home folder, as a shell does it."""
    if isinstance(value, dict):
        return {key: home_expanded(sub) for key, sub in value.items()}
    if isinstance(value, list):
        return [home_expanded(sub) for sub in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value
