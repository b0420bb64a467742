"""The files of a diffusers pipeline folder: its index, its components, and whether they are complete."""

import json
from pathlib import Path
from typing import Any

WEIGHTLESS = ("scheduler", "tokenizer", "feature_extractor", "image_processor")  # components without weights


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a diffusers pipeline. Raises ValueError if it is missing or unreadable."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(f"path: {folder} is not a diffusers pipeline: it has no model_index.json")
    try:
        index = json.loads(path.read_text())
        index["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"path: {path} is not a diffusers index; download the pipeline again") from None
    return index


def check_components(folder: Path, index: dict[str, Any]) -> None:
    """Raises ValueError if a component in the index is missing, or lacks its config or safetensors weights."""
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        part = folder / name
        if not part.is_dir():
            raise ValueError(f"path: {folder} is incomplete: it has no folder {name}; download it again")
        if name.startswith(WEIGHTLESS):
            continue
        if not (part / "config.json").is_file():
            raise ValueError(f"path: {part} has no config.json; download it again")
        missing = missing_weights(part)
        if missing:
            raise ValueError(f"path: {part} has no {missing}; download the safetensors weights")


def missing_weights(part: Path) -> str:
    """The first weight file that is missing, by the index of the shards if there is one; '' if none is missing."""
    for index in sorted(part.glob("*.safetensors.index.json")):
        wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return next((w for w in wanted if not (part / w).is_file()), "")
    return "" if any(part.glob("*.safetensors")) else "safetensors weights"


def weight_files(part: Path) -> list[Path]:
    """The safetensors files of a component: those in its index, or its single file."""
    for index in sorted(part.glob("*.safetensors.index.json")):
        return [part / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(part.glob("*.safetensors"))[:1]


def boundaries_in(part: Path) -> tuple[float, ...]:
    """The boundaries between the experts in one component, from its config.json; () for one network or a hub id."""
    path = part / "config.json"
    return tuple(json.loads(path.read_text()).get("boundaries", ())) if path.is_file() else ()
