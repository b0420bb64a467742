"""Finds a scorer's published files and loads them strictly: no tensor may be missing or left over."""

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.registry import here_or_shipped

TOKENIZER = (  # the files that transformers reads a tokenizer from
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja"),
)


def check_path(value: str, key: str, example: str) -> Path | None:
    """The local folder or file that a key names, which may be one that ships with fastgen, or None for a hub id
    `org/name`. Only a hub id leads to downloads. Raises ValueError if the value is neither."""
    path = here_or_shipped(value)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value):
        raise ValueError(
            f"{key}: {value!r} is neither a local folder nor a hub id; give a folder in the published "
            f"format, or an id such as {example}"
        )
    return None


def check_files(value: str, key: str, example: str, *needed: Sequence[str]) -> None:
    """Raises ValueError unless the local folder `value` has a file for each entry of `needed`. An entry lists
    alternative names, of which one is enough. A hub id is not looked up."""
    folder = check_path(value, key, example)
    if folder is None:
        return
    if not folder.is_dir():
        raise ValueError(f"{key}: {value} is a file; give its folder, with the layout of {example}")
    for names in needed:
        if not any(list(folder.glob(name)) for name in names):
            raise ValueError(
                f"{key}: {folder} has no {' or '.join(names)}; give a folder with the layout of {example}"
            )


def check_package(package: str, reward: str, extra: str) -> None:
    """Raises ValueError if a package that a scorer needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{reward} needs the package {package}: pip install 'fastgen-distill[{extra}]'")


def find(value: str, *names: str) -> Path:
    """The first of these files in a local folder or a hub repository. A file of the hub is downloaded once."""
    folder = here_or_shipped(value)
    if folder.is_dir():
        return next(found for name in names for found in sorted(folder.glob(name)))
    from huggingface_hub import hf_hub_download, list_repo_files

    available = set(list_repo_files(value)) if len(names) > 1 else set(names)
    found = next((name for name in names if name in available), None)
    if found is None:
        raise ValueError(f"{value} has no {' or '.join(names)}")
    return Path(hf_hub_download(value, found))


def snapshot(value: str, *patterns: str) -> Path:
    """A local folder as it is, or a folder with the matching files of a hub repository, which are downloaded once."""
    if (folder := here_or_shipped(value)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(value, allow_patterns=list(patterns)))


def present(folder: Path, *names: str) -> list[Path]:
    """Those of these files that the folder has."""
    return [folder / name for name in names if (folder / name).is_file()]


def read_tensors(file: Path) -> dict[str, Any]:
    """The content of a .safetensors, .pt or .pth file. Only tensors and plain values are read, and no code is run."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def load_strictly(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: object,
    ignored: Sequence[str] = (),
    assign: bool = False,
) -> None:
    """Loads every parameter and persistent buffer of the module from the checkpoint. Every tensor of the checkpoint
    must be used, except those whose names start with one of `ignored`. assign: use the checkpoint's tensors
    themselves, for a module that was created without memory.

    Raises ValueError with the names of tensors that are missing, left over or of another shape."""
    kept = (
        {name: t for name, t in tensors.items() if not name.startswith(tuple(ignored))} if ignored else dict(tensors)
    )
    wanted = module.state_dict()
    report_keys(source, wanted.keys() - kept.keys(), kept.keys() - wanted.keys())
    for name, tensor in kept.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{source}: {name} has the shape {list(tensor.shape)}, but the network needs "
                f"{list(wanted[name].shape)}; the checkpoint is of another architecture"
            )
    module.load_state_dict(kept, assign=assign)


def report_keys(source: object, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises ValueError unless a checkpoint has exactly the tensors of its network."""
    problems = []
    for what, names in (
        ("lacks", sorted(missing)),
        ("has tensors that the network does not have,", sorted(unexpected)),
    ):
        if names:
            rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{what} {', '.join(names[:5])}{rest}")
    if problems:
        raise ValueError(
            f"{source} {'; it '.join(problems)}: a scorer whose weights are partly random is useless; give "
            "the complete published checkpoint"
        )


def pretrained(cls: Any, path: str, **options: Any) -> Any:
    """A transformers network from the safetensors of a folder or hub id, in float32. Raises ValueError unless the
    files have exactly the network's tensors."""
    model, info = cls.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
    )
    # Old checkpoints store position_ids, which are just 0, 1, 2, ...
    extra = {key for key in info["unexpected_keys"] if not key.endswith(".position_ids")}
    report_keys(path, info["missing_keys"], extra)
    if info["mismatched_keys"]:
        raise ValueError(f"{path}: {sorted(info['mismatched_keys'])[0]} does not fit the network's config.json")
    return model


def freeze(module: nn.Module, device: torch.device) -> Any:
    return module.to(device).eval().requires_grad_(False)


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises ValueError if there is none."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must contain a mapping, got {type(content).__name__}")
    return content
