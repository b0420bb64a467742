"""The keys of scorers, from the recipe's `eval:` section and from the command line."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def merged_scorers(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Merges the keys of each scorer. Where both have a key, `second` wins."""
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in {**first, **second}}


def scorer_keys(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The keys of scorers from command-line options, NAME=PATH or NAME.KEY=VALUE. The VALUE of a KEY is read as YAML.
    Raises ValueError for any other form."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name, _, key = name.partition(".")
        if not equals or not name or not value:
            raise ValueError(f"--scorer {text}: write NAME=PATH, or NAME.KEY=VALUE")
        found.setdefault(name, {})[key or "path"] = yaml.safe_load(value) if key else value
    return found
