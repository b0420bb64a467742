"""The files of an exported pipeline: those of the original one, with the student's networks and scheduler.

The student's tensors are written one by one into files like those that the original network is stored in, in the same
shards. Components that the student does not change are copied as files."""

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from fastgen.backbones.folder import (
    OPTIONAL,
    STEMS,
    VARIANTS,
    WEIGHTLESS,
    component_entries,
    variant_of,
    weight_files,
    weight_names,
)
from fastgen.backbones.names_read import names_read
from fastgen.backbones.student_tensors import Named
from fastgen.modules.inputs import plain_names
from fastgen.modules.kept_blocks import KeptBlocks
from fastgen.modules.kept_heads import kept_width
from fastgen.modules.stored_name import stored_name
from fastgen.modules.tensor_file import Spec, TensorFile, TensorWriter

STEM = STEMS["diffusers"]
ADDED = ("fusion.", "segment_head.")  # weights that our classes add to a network; they go into the last file
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data")  # file types


def write_pipeline(
    folder: Path,
    source: Path,
    index: Mapping[str, Any],
    replaced: Mapping[str, Any],
    tensors: Iterable[Named],
    originals: Mapping[str, Path],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a pipeline folder. source: the folder of the original pipeline, and index its model_index.json.

    replaced: component -> the student's network, whose values come from `tensors`, or its scheduler; other values
    replace entries of the index. originals: component of the student -> the folder of the network it was made from.
    dtype: of the student's networks; None: as the tensors of the original network are stored."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = component_entries(source, dict(index))
    written = {k: v if k in entries or not isinstance(v, list) else [None, None] for k, v in index.items()}
    for name, (library, _) in entries.items():
        if name not in replaced:
            copy_component(source / name, folder / name, name, library)
    for name, value in replaced.items():
        written[name] = class_entry(value) if hasattr(value, "save_config") else value
        if hasattr(value, "save_config"):
            value.save_config(folder / name)
    write_networks(folder, replaced, tensors, originals, dtype)
    written["_diffusers_version"] = diffusers.__version__
    written.pop("_name_or_path", None)
    (folder / "model_index.json").write_text(json.dumps(written, indent=2) + "\n")


def class_entry(value: Any) -> list[str]:
    """[library, class] of a component, as model_index.json names it."""
    module = type(value).__module__
    return ["diffusers" if module.startswith("diffusers.") else module, type(value).__name__]


def write_networks(
    folder: Path,
    replaced: Mapping[str, Any],
    tensors: Iterable[Named],
    originals: Mapping[str, Path],
    dtype: torch.dtype | None,
) -> None:
    """Writes the tensors of all networks, as they come, each into its place."""
    with ExitStack() as closing:
        writers: dict[tuple[str, str], TensorWriter] = {}
        for name, network in replaced.items():
            if isinstance(network, nn.Module):
                shards = shards_of(network, originals[name], dtype)
                files = write_index(folder / name, shards)
                for file, specs in zip(files, shards, strict=True):
                    writer = closing.enter_context(TensorWriter(folder / name / file, specs))
                    writers |= {(name, key): writer for key in specs}
        for component, key, tensor in tensors:
            writers[component, key].put(key, tensor)


def shards_of(network: Any, original: Path, dtype: torch.dtype | None) -> list[dict[str, Spec]]:
    """The tensors of each file of a student's network: those of the original network's files, or, if the network
    consists of experts, those files once for each expert; and what an inner flow or a segment head
    adds."""
    files = [TensorFile(file).specs for file in weight_files(original)]
    stored = [{name: specs[key] for name, key in names_read(original, specs).items()} for specs in files]
    experts = [f"experts.{i}." for i in range(len(network.experts))] if hasattr(network, "experts") else [""]
    kept = tuple(network._keep_in_fp32_modules or ())

    def spec(name: str, spec: Spec) -> Spec:
        if dtype is None or not spec.dtype.is_floating_point:
            return spec
        wide = any(part in name.split(".") for part in kept)  # diffusers has these in float32, in any precision
        return Spec(torch.promote_types(dtype, torch.float32) if wide else dtype, spec.shape)

    if kept_width(network) or any(isinstance(module, KeptBlocks) for module in network.modules()):
        one = network.experts[0] if hasattr(network, "experts") else network
        stored = [kept_specs(one, specs) for specs in stored]
    shards = [{prefix + name: spec(name, s) for name, s in specs.items()} for prefix in experts for specs in stored]
    wide = next(s for specs in stored for s in specs.values() if s.dtype.is_floating_point)
    added = {n: Spec(wide.dtype, tuple(p.shape)) for n, p in network.named_parameters() if n.startswith(ADDED)}
    shards[-1] |= {name: spec(name, s) for name, s in added.items()}
    return shards


def kept_specs(network: nn.Module, stored: Mapping[str, Spec]) -> dict[str, Spec]:
    """Those of the tensors that a network with fewer blocks or heads has, by the names and with the shapes that they
    have in it."""
    tensors = network.state_dict()
    own = {stored_name(network, full): (name, tensors[full].shape) for name, full in plain_names(tensors).items()}
    kept = {own[name]: spec.dtype for name, spec in stored.items() if name in own}
    return {name: Spec(dtype, tuple(shape)) for (name, shape), dtype in kept.items()}


def write_index(folder: Path, shards: list[dict[str, Spec]]) -> list[str]:
    """The name of each shard's file, as diffusers names them. Writes the index of shards if there are several."""
    if len(shards) == 1:
        return [f"{STEM}.safetensors"]
    names = [f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total = sum(spec.nbytes for specs in shards for spec in specs.values())
    files = {key: name for name, specs in zip(names, shards, strict=True) for key in specs}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")
    return names


def copy_component(part: Path, target: Path, name: str, library: str) -> None:
    """Copies the files of a component that diffusers reads: of weights only the safetensors ones, without the infix of
    a variant, so that they are found without asking for it. An optional component may have other weights."""
    readable = any((part / file).is_file() for v in VARIANTS for file in weight_names(library, v))
    if name.startswith(WEIGHTLESS) or (name in OPTIONAL and not readable):
        shutil.copytree(part, target)
        return
    variant, weights = variant_of(part, library), weight_files(part, library)
    infix = f".{variant}" if variant else ""
    target.mkdir()
    for file in part.iterdir():
        is_index = ".index." in file.name
        if file.is_file() and not is_index and (file in weights or not file.name.endswith(WEIGHTS)):
            shutil.copyfile(file, target / file.name.replace(infix, "", 1))
    if len(weights) > 1:
        stem = STEMS.get(library, STEMS["transformers"])
        index = json.loads((part / f"{stem}.safetensors.index{infix}.json").read_text())
        index["weight_map"] = {key: str(file).replace(infix, "", 1) for key, file in index["weight_map"].items()}
        (target / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
