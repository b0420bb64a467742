"""A recipe as it is stored in runs and exports, and compared with the one a run is continued with."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastgen.config.sections import SECTIONS
from fastgen.recipe import Recipe
from fastgen.registry import flatten

# Keys that may change when a run is continued, because they do not alter what has already been computed.
MUTABLE_KEYS = (
    "output_dir",
    "train.steps",
    "train.log_every",
    "train.trackers",
    "train.sample_every",
    "train.num_samples",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.checkpoint_async",
    "train.resume_from",
    "train.strategy",
    "train.shard_group",
    "train.reduce_gradients",
    "train.num_processes",
    "train.device",
    "train.batch_size",
    "train.accumulate",
    "train.prefetch",
    "train.readers",
    "train.gradient_checkpointing",
    "train.compile",
    "health",
    "eval",
    "init_from",  # a folder that may have moved; the checkpoint holds what came from it
    "data.folder",
    "data.shards",
    "data.controls",
    "data.sounds",
)


def to_dict(value: Any) -> Any:
    """A recipe or a section as plain YAML types, with all defaults. Classes from elsewhere are named by their path."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple(base for _, base in SECTIONS.values())):
            result["name"] = registered_name(type(value))
        return result
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def registered_name(cls: type) -> str:
    """The name by which a recipe chooses this class."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    entries = [item for names, _ in SECTIONS.values() for item in names.items()]
    return next((name for name, entry in entries if entry == path), path)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML. load_recipe reads it back to an equal recipe, but for train.resume_from: that is
    said to one start of the program, and whoever starts the stored recipe does not go back again."""
    values = to_dict(recipe)
    values["train"]["resume_from"] = None
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=119, allow_unicode=True)


def changed_keys(before: Recipe, after: Recipe) -> list[str]:
    """The dotted keys that differ between a run's first recipe and the one it is continued with, but must not."""
    a, b = flatten(to_dict(before)), flatten(to_dict(after))
    differing = [k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
    return [k for k in differing if not any(k == m or k.startswith(m + ".") for m in MUTABLE_KEYS)]
