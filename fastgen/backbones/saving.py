"""Saves and loads a student as a diffusers folder: a whole pipeline, an adapter, or a pipeline class of our own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from fastgen.backbones.folder import FLOW_MAP, STREAMING
from fastgen.denoiser import Denoiser
from fastgen.modules.lora import LoraDenoiser
from fastgen.pipelines import flow_map
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import Schedule

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
    @property
    def variant(self) -> str | None: ...
    @property
    def absent_components(self) -> dict[str, None]: ...
    @property
    def pipeline_class(self) -> type[DiffusionPipeline]: ...
    @property
    def time_dim(self) -> int: ...
    def read_networks(self, source: str | Path, **options: Any) -> Denoiser: ...
    def student_components(self, student: Denoiser) -> dict[str, Any]: ...
    def student_scheduler(self, policy: RolloutPolicy) -> Any: ...


def save_student(backbone: Pipeline, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
    """Saves a student that works in chunks as a streaming pipeline, one with added inputs as a flow-map folder, an
    adapter as a LoRA folder, and any other student as the stock pipeline, with the student as its network and the
    policy in its scheduler."""
    if policy.chunks is not None:
        save_streaming(backbone, student.merged(), policy, folder)
    elif student.is_extended:
        save_flow_map(backbone, student.merged(), policy, folder)
    elif isinstance(student, LoraDenoiser):
        save_lora(backbone, student, policy, folder)
    else:
        save_whole(backbone, student, policy, folder)


def save_whole(backbone: Pipeline, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
    replaced = backbone.student_components(student) | {"scheduler": backbone.student_scheduler(policy)}
    replaced |= backbone.absent_components
    options = backbone.options | ({"variant": backbone.variant} if backbone.variant else {})
    pipeline = backbone.pipeline_class.from_pretrained(backbone.source, **replaced, **options)
    pipeline.save_pretrained(folder, safe_serialization=True)


def save_flow_map(backbone: Pipeline, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
    """Saves a pipeline of `pipelines.flow_map`: the stock pipeline without the inputs that were added to its networks,
    and these inputs in a separate file."""
    embeddings: list[Any] = [part.time_embedding for part in student.members]
    name, inputs = backbone.components["_class_name"], list(embeddings[0].tables)
    if inputs != list(policy.inputs):
        raise ValueError(
            f"a network with the extra time inputs {inputs} does not fit {name}, whose sampler gives it "
            f"{list(policy.inputs)}"
        )
    for part, embedding in zip(student.members, embeddings, strict=True):
        part.set_time_embedding(embedding.embedding)
    try:
        save_whole(backbone, student, policy, folder)
    finally:
        for part, embedding in zip(student.members, embeddings, strict=True):
            part.set_time_embedding(embedding)
    flow_map.save_inputs(embeddings, policy, backbone.schedule, folder)
    rename_class(folder, FLOW_MAP)


def save_streaming(backbone: Pipeline, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
    """Saves a pipeline of `pipelines.streaming`: the stock one, whose scheduler stores the chunks."""
    if student.is_extended:
        raise ValueError("a student that works in chunks cannot be exported with added inputs (rollout.two_time)")
    save_whole(backbone, student, policy, folder)
    rename_class(folder, STREAMING)


def rename_class(folder: Path, prefix: str) -> None:
    """Makes model_index.json name our own pipeline class, which plain diffusers does not know."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"_class_name": prefix + index["_class_name"]}, indent=2) + "\n")


def save_lora(backbone: Pipeline, student: LoraDenoiser, policy: RolloutPolicy, folder: Path) -> None:
    """Saves the adapter as diffusers' `load_lora_weights` reads it, and the scheduler. B is multiplied by
    alpha / rank, so that a reader that does not look for alpha gets the same network."""
    assert student.role is not None
    config = student.shared.configs[student.role]
    factor = (config.alpha or config.rank) / config.rank
    folder.mkdir(parents=True, exist_ok=True)
    files = lora_files(backbone.subfolders)
    for i, file in enumerate(files):
        prefix = f"experts.{i}.network." if len(files) > 1 else "network."
        layers = {
            f"{backbone.subfolder}.{name.removeprefix(prefix)}": p.detach() * (factor if ".lora_B." in name else 1.0)
            for name, p in student.named_parameters()
            if name.startswith(prefix)
        }
        save_file({name: p.cpu().contiguous() for name, p in layers.items()}, folder / file)
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
        student.add_inputs({}, backbone.time_dim, inputs["names"])
        for part, tables in zip(student.members, weights, strict=True):
            part.time_embedding.tables.load_state_dict(tables)
        student.to(backbone.device, backbone.dtype)
    return student.requires_grad_(False).eval()


def lora_files(subfolders: Sequence[str]) -> list[str]:
    """One file per network. In each file, diffusers expects the layers under the name of the first network."""
    return [LORA_WEIGHTS, *(LORA_WEIGHTS.replace(".", f"_{name}.") for name in subfolders[1:])]
