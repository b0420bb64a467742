"""Students as the pipelines that users of diffusers call."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgen.backbones import BACKBONES
from fastgen.backbones.base import BackboneConfig
from fastgen.backbones.folder import FLOW_MAP, ROUTED, STREAMING, read_index, read_json
from fastgen.backbones.saving import LORA_WEIGHTS
from fastgen.pipelines import few_step, flow_map, inner_flow, routed, segment_flow, streaming  # noqa: F401 - diffusers finds the imported ones
from fastgen.registry import build_section
from fastgen.sampling.sampler import METADATA, load_sampler, read_metadata, source_of


def load_pipeline(path: Path, options: Mapping[str, Any]) -> Any:
    """See `fastgen.api.load`."""
    from diffusers import DiffusionPipeline

    folder = source_of(path)
    if not (folder / METADATA).is_file():
        return DiffusionPipeline.from_pretrained(folder, **options)
    metadata = read_metadata(folder, several=True)
    if "path" not in metadata["backbone"]:
        if options:
            raise ValueError(f"{folder} is a student of points, which takes no options of diffusers")
        return load_sampler(folder)
    if metadata.get("lora"):
        return load_adapter(folder, metadata["backbone"], options)
    kinds = ((STREAMING, streaming), (FLOW_MAP, flow_map), (ROUTED, routed))
    name = read_index(folder)["_class_name"]
    for prefix, module in kinds:
        if name.startswith(prefix) and hasattr(module, name):
            return getattr(module, name).from_pretrained(folder, **options)
    return DiffusionPipeline.from_pretrained(folder, **options)


def load_adapter(folder: Path, section: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """The original pipeline with the adapters and the scheduler of the export: the lines of its model card. section:
    the recipe's `backbone:`."""
    import diffusers

    config = build_section("backbone", section, BACKBONES, BackboneConfig)
    loader = config.build(torch.device("cpu"), torch.float32, 0).loader
    pipeline = getattr(diffusers, loader).from_pretrained(config.path, **options)
    for i, file in enumerate(sorted(f.name for f in folder.glob(LORA_WEIGHTS.replace(".", "*.")))):
        more = {"load_into_transformer_2": True, "adapter_name": f"few_step_{i + 1}"} if i else {}
        pipeline.load_lora_weights(str(folder), weight_name=file, **more)
    name = read_json(folder / "scheduler/scheduler_config.json")["_class_name"]
    kind = getattr(few_step, name, None) or getattr(diffusers, name)
    pipeline.scheduler = kind.from_pretrained(folder, subfolder="scheduler")
    return pipeline
