"""Saves and loads a student as a diffusers folder: a whole pipeline, an adapter, or a pipeline class of our own."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgen.backbones.folder import FLOW_MAP, STREAMING
from fastgen.backbones.pipeline_files import write_pipeline
from fastgen.backbones.student_tensors import base_of, whole_tensors
from fastgen.denoiser import Denoiser
from fastgen.modules.lora import LoraDenoiser
from fastgen.modules.sharding import WeightMap
from fastgen.pipelines import flow_map
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import Schedule
from fastgen.streaming.actions import FILE as ACTIONS
from fastgen.streaming.actions import load_actions, save_actions
from fastgen.streaming.memory_file import MEMORY, load_memory, save_memory
from fastgen.streaming.sound import FILE as SOUND
from fastgen.streaming.sound import load_sound, save_sound

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


class Pipeline(Protocol):
    """The part of a `PipelineBackbone` that is used here. Its attributes are explained there."""

    source: str
    options: dict[str, Any]
    schedule: Schedule
    subfolder: ClassVar[str]
    device: torch.device
    dtype: torch.dtype

    @property
    def subfolders(self) -> tuple[str, ...]: ...
    @property
    def components(self) -> dict[str, Any]: ...
    def time_dim_of(self, denoiser: Denoiser) -> int: ...
    def folder(self) -> Path: ...
    def weights(self) -> WeightMap: ...
    def read_networks(self, source: str | Path, **options: Any) -> Denoiser: ...
    def student_components(self, student: Denoiser) -> dict[str, Any]: ...
    def student_scheduler(self, policy: RolloutPolicy) -> Any: ...


def save_student(
    backbone: Pipeline,
    student: Denoiser,
    values: Iterable[tuple[str, Tensor]],
    policy: RolloutPolicy,
    folder: Path,
    whole: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Saves a student that works in chunks as a streaming pipeline, one with added inputs as a flow-map folder, an
    adapter as a LoRA folder, and any other student as the stock pipeline, with the student as its network and the
    policy in its scheduler.

    values: name in `student.state_dict()` -> tensor; the student's own values are not read. whole: an adapter is
    added into the weights of its base. dtype: of the student's tensors; None: that of the original network, and for
    an adapter its own."""
    if student.is_adapter and not (whole or student.is_extended or policy.chunks is not None):
        save_lora(backbone, student, values, policy, folder, dtype)
        return
    name, added = backbone.components["_class_name"], list(base_inputs(student))
    if added and added != list(policy.inputs):
        raise ValueError(
            f"a network with the extra time inputs {added} does not fit {name}, whose sampler gives it "
            f"{list(policy.inputs)}"
        )
    tables = save_whole(backbone, student, values, policy, folder, dtype)
    if memory := taken(tables, r"\d+\.\d+\..*"):  # of a layer
        save_memory(memory, folder)
    if told := taken(tables, r"\d+\.actions\..*"):
        save_actions(told, student.members[0].network.actions.period, folder)
    if sound := taken(tables, r"\d+\.sound\..*"):
        save_sound(sound, folder)
    if added:
        flow_map.save_inputs(tables, policy, backbone.schedule, folder)
    if added or policy.chunks is not None:
        rename_class(folder, FLOW_MAP if policy.chunks is None else STREAMING)


def taken(tables: dict[str, Tensor], pattern: str) -> dict[str, Tensor]:
    """Those of the tensors whose names have this pattern, which leave the dict."""
    return {name: tables.pop(name) for name in list(tables) if re.fullmatch(pattern, name)}


def base_inputs(student: Denoiser) -> Iterable[str]:
    """The names of a student's added inputs; none if it is not extended."""
    embedding: Any = student.members[0].time_embedding
    return embedding.tables if student.is_extended else ()


def save_whole(
    backbone: Pipeline,
    student: Denoiser,
    values: Iterable[tuple[str, Tensor]],
    policy: RolloutPolicy,
    folder: Path,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Saves a whole pipeline, and returns the weights that have no place in it: of the student's added inputs, of its
    linear memory, of its actions and its sound."""
    components, tables = backbone.student_components(base_of(student)), dict[str, Tensor]()
    source, own = backbone.folder(), backbone.subfolders
    networks = [name for name, value in components.items() if isinstance(value, nn.Module)]
    originals = {name: source / (name if name in own else own[0]) for name in networks}
    weights = backbone.weights() if student.is_adapter else {}
    tensors = whole_tensors(student, values, components, weights, tables)
    replaced = components | {"scheduler": backbone.student_scheduler(policy)}
    write_pipeline(folder, source, backbone.components, replaced, tensors, originals, dtype)
    return tables


def rename_class(folder: Path, prefix: str) -> None:
    """Makes model_index.json name our own pipeline class, which plain diffusers does not know."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"_class_name": prefix + index["_class_name"]}, indent=2) + "\n")


def save_lora(
    backbone: Pipeline,
    student: Denoiser,
    values: Iterable[tuple[str, Tensor]],
    policy: RolloutPolicy,
    folder: Path,
    dtype: torch.dtype | None,
) -> None:
    """Saves the adapter as diffusers' `load_lora_weights` reads it, and the scheduler. B is multiplied by
    alpha / rank, so that a reader that does not look for alpha gets the same network."""
    assert isinstance(student, LoraDenoiser) and student.role is not None
    config, adapter = student.shared.configs[student.role], dict(values)
    factor = (config.alpha or config.rank) / config.rank
    folder.mkdir(parents=True, exist_ok=True)
    files = lora_files(backbone.subfolders)
    for i, file in enumerate(files):
        prefix = f"experts.{i}.network." if len(files) > 1 else "network."
        layers = {
            f"{backbone.subfolder}.{name.removeprefix(prefix)}": p.detach() * (factor if ".lora_B." in name else 1.0)
            for name, p in adapter.items()
            if name.startswith(prefix)
        }
        save_file({name: p.to("cpu", dtype or p.dtype).contiguous() for name, p in layers.items()}, folder / file)
    backbone.student_scheduler(policy).save_pretrained(folder / "scheduler")


def load_student(backbone: Pipeline, folder: Path) -> Denoiser:
    """The network that `save_student` wrote into this folder, frozen and in evaluation mode."""
    if (folder / LORA_WEIGHTS).is_file():
        student = backbone.read_networks(backbone.source, **backbone.options)
        for part, file in zip(student.members, lora_files(backbone.subfolders), strict=True):
            part.network.load_lora_adapter(str(folder), weight_name=file, prefix=backbone.subfolder)
        return student.to(backbone.device).requires_grad_(False).eval()
    student = backbone.read_networks(folder, **backbone.options | {"local_files_only": True})
    if (folder / flow_map.INPUTS).is_file():
        inputs, weights = flow_map.read_inputs(folder)
        student.add_inputs({}, backbone.time_dim_of(student), inputs["names"])
        for part, tables in zip(student.members, weights, strict=True):
            part.time_embedding.tables.load_state_dict(tables)
        student.to(backbone.device, backbone.dtype)
    if (folder / MEMORY).is_file():
        load_memory([part.network for part in student.members], folder)
    if (folder / ACTIONS).is_file():
        load_actions([part.network for part in student.members], folder)
    if (folder / SOUND).is_file():
        load_sound([part.network for part in student.members], folder)
    return student.requires_grad_(False).eval()


def lora_files(subfolders: Sequence[str]) -> list[str]:
    """One file per network. In each file, diffusers expects the layers under the name of the first network."""
    return [LORA_WEIGHTS, *(LORA_WEIGHTS.replace(".", f"_{name}.") for name in subfolders[1:])]
