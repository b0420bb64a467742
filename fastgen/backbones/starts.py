"""Pipeline folders that a student may start from: few-step models that others have made of the same pipeline.

Their networks must be the backbone's own, with other weights."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastgen.backbones.folder import check_weights, read_json, weight_files
from fastgen.backbones.names_read import names_read

SIZES = ("sample_size",)  # settings of a network that change nothing that it computes
OWN = ("_", "inner_", "segment_")  # these begin the keys that are not the stock network's


def check_same_networks(folder: Path, source: Path, subfolders: Iterable[str]) -> None:
    """Compares the networks of two local pipelines: settings, names and shapes of tensors, prediction type. Raises
    ValueError, naming what differs, unless they are the same. Loads no weights."""
    for name in subfolders:
        settings = [read_json(parent / name / "config.json") for parent in (folder, source)]
        check_settings(folder / name, *settings)
        given, own = tensor_shapes(folder / name), tensor_shapes(source / name)
        if differing := sorted(key for key in given.keys() | own.keys() if given.get(key) != own.get(key)):
            raise ValueError(
                f"{folder / name} and {source / name} are different networks; they differ in "
                f"{', '.join(differing[:4])}{' ...' if len(differing) > 4 else ''}"
            )
    types = [read_json(f / "scheduler/scheduler_config.json").get("prediction_type") for f in (folder, source)]
    if None not in types and types[0] != types[1]:
        raise ValueError(f"the network of {folder} predicts {types[0]}, and that of {source} predicts {types[1]}")


def check_settings(
    folder: Path, given: Mapping[str, Any], own: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Raises ValueError if two networks have different settings. defaults: of the settings that only one of the two
    gives; if they are not known, such settings are not compared."""
    for key in sorted(given.keys() | own.keys()):
        if key.startswith(OWN) or key in SIZES or not (defaults or key in given.keys() & own.keys()):
            continue
        values = [json.dumps(config.get(key, (defaults or {}).get(key))) for config in (given, own)]
        if values[0] != values[1]:
            raise ValueError(f"{folder} has {key} {values[0]}, and the network of this recipe has {values[1]}")


def tensor_shapes(part: Path) -> dict[str, tuple[int, ...]]:
    """name -> shape of every tensor of a network. Raises ValueError if a file of it cannot be read whole."""
    stored = {
        name: tuple(entry["shape"]) for file in weight_files(part) for name, entry in check_weights(file).items()
    }
    return {name: stored[key] for name, key in names_read(part, stored).items()}
