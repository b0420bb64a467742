"""An export of fastgen, as it is read to be written in another form."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.backbones import BACKBONES
from fastgen.backbones.base import BackboneConfig
from fastgen.backbones.folder import read_json
from fastgen.registry import build_section, current_names
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import read_metadata


@dataclass(frozen=True)
class Student:
    """folder: the export. backbone: that of the original pipeline. adapter: whether the export is an adapter of it."""

    folder: Path
    backbone: Any  # a PipelineBackbone
    policy: RolloutPolicy
    adapter: bool

    @property
    def networks(self) -> list[dict[str, Any]]:
        """config.json of each of the student's networks, from high noise to low."""
        if self.adapter:
            return [self.backbone.component_config(self.backbone.network_class, name) for name in self.parts]
        return [read_json(self.folder / name / "config.json") for name in self.parts]

    @property
    def parts(self) -> tuple[str, ...]:
        """The components that are its networks. A student of two experts may come from a pipeline of one network."""
        both = ("transformer", "transformer_2")
        return both if (self.folder / both[1]).is_dir() else self.backbone.subfolders

    @property
    def boundary(self) -> float | None:
        """The level from which on the first of two networks is called."""
        if len(self.parts) == 1:
            return None
        return (
            self.backbone.boundary if self.adapter else read_json(self.folder / "model_index.json")["boundary_ratio"]
        )


def read_student(folder: Path) -> Student:
    """Raises ValueError if this is not an export."""
    import torch

    metadata = read_metadata(folder)
    policy = RolloutPolicy(**current_names("rollout", metadata["policy"]))
    config = build_section("backbone", metadata["backbone"], BACKBONES, BackboneConfig)
    return Student(folder, config.build(torch.device("cpu"), torch.float32, 0), policy, bool(metadata.get("lora")))
