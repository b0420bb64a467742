"""The recipe's `eval:` section, and the same keys from the command line."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def merged_scorers(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The keys of scorers, those of the second over those of the first, a scorer at a time."""
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in {**first, **second}}


def scorer_keys(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The keys of scorers as options of the command line: NAME=PATH, or NAME.KEY=VALUE, the value read as YAML.
    Raises ValueError for anything else."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name, _, key = name.partition(".")
        if not equals or not name or not value:
            raise ValueError(f"--scorer {text}: write NAME=PATH, or NAME.KEY=VALUE")
        found.setdefault(name, {})[key or "path"] = yaml.safe_load(value) if key else value
    return found
