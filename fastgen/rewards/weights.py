"""Where a scorer's published files lie, and loading them so that nothing is missing and nothing is left over."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def check_path(value: str, key: str, example: str) -> Path | None:
    """The local folder or file a key names; None for a hub id `org/name`, which is the only thing that uses the
    network. Raises ValueError for what is neither."""
    path = Path(value)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value):
        raise ValueError(
            f"{key}: {value!r} is neither a local folder nor a hub id; give a folder of the published "
            f"format, or an id such as {example}"
        )
    return None


def check_files(value: str, key: str, example: str, *needed: Sequence[str]) -> None:
    """Raises ValueError unless each of `needed`, a list of names of which one will do, lies in the local folder that
    `value` names. A hub id is not looked up."""
    folder = check_path(value, key, example)
    if folder is None:
        return
    if not folder.is_dir():
        raise ValueError(f"{key}: {value} is a file; give the folder that holds it, as {example} publishes it")
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
    """The first of these files that a local folder holds, or the first that a hub repository does, downloaded once."""
    folder = Path(value)
    if folder.is_dir():
        return next(found for name in names for found in sorted(folder.glob(name)))
    from huggingface_hub import hf_hub_download, list_repo_files

    there = set(list_repo_files(value)) if len(names) > 1 else set(names)
    found = next((name for name in names if name in there), None)
    if found is None:
        raise ValueError(f"{value} has no {' or '.join(names)}")
    return Path(hf_hub_download(value, found))


def snapshot(value: str, *patterns: str) -> Path:
    """A local folder as it is, or the files of a hub repository that match, downloaded once."""
    if Path(value).is_dir():
        return Path(value)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(value, allow_patterns=list(patterns)))


def read_tensors(file: Path) -> dict[str, Any]:
    """A checkpoint: safetensors, or a foreign .pt or .pth, of which nothing but tensors and plain values is read."""
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
    """Every parameter and persistent buffer of the module from the checkpoint, and every tensor of the checkpoint into
    the module, but those whose names start with one of `ignored`. assign: the tensors themselves, for a module that
    was made without memory.

    Raises ValueError with names for what is missing, left over or of another shape."""
    kept = (
        {name: t for name, t in tensors.items() if not name.startswith(tuple(ignored))} if ignored else dict(tensors)
    )
    wanted = module.state_dict()
    report_keys(source, wanted.keys() - kept.keys(), kept.keys() - wanted.keys())
    for name, tensor in kept.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{source}: {name} has the shape {list(tensor.shape)}, and the network "
                f"{list(wanted[name].shape)}; the checkpoint is of another architecture"
            )
    module.load_state_dict(kept, assign=assign)


def report_keys(source: object, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises ValueError if a checkpoint has not exactly the tensors of its network."""
    problems = []
    for what, names in (("lacks", sorted(missing)), ("has, and the network does not,", sorted(unexpected))):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{what} {', '.join(names[:5])}{more}")
    if problems:
        raise ValueError(
            f"{source} {'; it '.join(problems)}: a scorer with a part at random is no scorer; give the "
            "published checkpoint, whole"
        )


def pretrained(cls: Any, path: str, **options: Any) -> Any:
    """A transformers network from a folder or hub id: safetensors alone, float32, every tensor accounted for."""
    model, info = cls.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
    )
    extra = {key for key in info["unexpected_keys"] if not key.endswith(".position_ids")}  # old checkpoints' 0, 1, 2
    report_keys(path, info["missing_keys"], extra)
    if info["mismatched_keys"]:
        raise ValueError(f"{path}: {sorted(info['mismatched_keys'])[0]} does not fit the network's config.json")
    return model


def freeze(module: nn.Module, device: torch.device) -> Any:
    return module.to(device).eval().requires_grad_(False)


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is no JSON mapping."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a mapping, got {type(content).__name__}")
    return content


@lru_cache(maxsize=64)
def sha256(file: Path) -> str:
    """Of a file's bytes, read a piece at a time; once a process."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()
