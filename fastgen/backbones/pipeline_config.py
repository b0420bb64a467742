"""The `backbone:` section of the families of diffusers pipelines: its keys, and the checks of the folder it names.

Nothing here loads weights."""

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fastgen.backbones.base import BackboneConfig
from fastgen.backbones.folder import (
    WITH_INPUTS,
    check_components,
    check_present,
    check_source,
    local_folder,
    read_index,
)
from fastgen.backbones.starts import check_same_networks
from fastgen.modules.kept_blocks import Kept
from fastgen.policy import INPUT_KEYS
from fastgen.registry import MOST_STEPS
from fastgen.rollout import RolloutPolicy

CPU = torch.device("cpu")
StudentBlocks = dict[str, Annotated[list[Annotated[int, Field(ge=0, le=MOST_STEPS)]], Field(min_length=1)]]
CONFIGS = Path(__file__).with_name("configs")  # of well-known hub ids


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PipelineConfig(BackboneConfig):
    """path: a diffusers folder, in the working directory or else among the files that ship with fastgen; or a hub id
    "org/name". Only a hub id needs network access.

    negative_prompt: what guidance leads away from, wherever the teacher is guided: in training, in its ODE pairs and
    in evaluation. The empty one means what the stock pipeline does without a negative prompt.

    encoder_dtype: of the text encoders. By default they have that of the run (train.dtype), so that prompts are
    encoded as the stock pipeline does in that precision; bfloat16 halves the memory of float32, and changes embeddings
    by its rounding. encoders: whether they stay on the device, or are there only while prompts are encoded.

    student_blocks: list of blocks in the network -> the places of those that the student keeps, from 0. It begins with
    their weights, and its export is a smaller pipeline. Teacher and fake score keep all blocks.

    student_heads: the number of attention heads that the student's network keeps, each with as many channels as
    before. Its width is that of its heads, so that all layers become narrower. It begins with the teacher's first
    heads and channels, and its export is a smaller pipeline. Both keys may be given together."""

    path: str
    negative_prompt: str = ""
    encoder_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    encoders: Literal["device", "offload"] = "device"
    student_blocks: StudentBlocks | None = None
    student_heads: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None

    pipelines: ClassVar[tuple[str, ...]]  # class names in model_index.json that this family loads
    encodes_together: ClassVar[bool] = False  # whether every prompt is encoded together with the image that is given
    prompt_keys: ClassVar[tuple[str, ...]] = ("max_sequence_length",)  # fields that the encoding of prompts depends on
    oldest_diffusers: ClassVar[tuple[int, int]] = (0, 38)  # whose pipeline is as this family needs it

    def check(self) -> None:
        """Raises ValueError if the path is neither a complete pipeline folder of this family nor a hub id, or if the
        installed diffusers is too old."""
        installed, oldest = version("diffusers"), self.oldest_diffusers
        if tuple(int(part) for part in installed.split(".")[:2]) < oldest:
            raise ValueError(
                f"backbone {self.name} needs diffusers {oldest[0]}.{oldest[1]} or newer, and {installed} is installed"
            )
        check_source(self.path)
        folder = self.local_folder()
        if folder is None:
            return
        index = self.read_family_index(folder)
        backbone: Any = self.build(CPU, torch.float32, 0)  # a PipelineBackbone
        check_present(folder, index, backbone.needed_classes)
        check_components(folder, index, backbone.needed_classes)
        backbone.check_kept(self.kept_blocks)
        if self.student_heads is not None:
            backbone.head_settings(self.student_heads)

    @property
    def kept_blocks(self) -> Kept:
        return self.student_blocks or {}

    @property
    def kept_heads(self) -> int | None:
        return self.student_heads

    def check_export(self, policy: RolloutPolicy) -> None:
        """Raises ValueError for a student with added inputs, if no pipeline gives them to the network of this family.
        Families also check that a scheduler can store the levels."""
        if policy.inputs and not set(self.pipelines) <= set(WITH_INPUTS):
            raise ValueError(
                f"no pipeline can sample a student of backbone {self.name} with "
                f"{' and '.join(INPUT_KEYS[name] for name in policy.inputs)}, which is added to its network; leave it "
                "out, or use one of the backbones sd, sd3 and wan, whose exports have it"
            )

    def even_levels(self, steps: int, shift: float, transition: str) -> tuple[float, ...]:
        """A list of levels that an export can store: s u / (1 + (s - 1) u) of evenly spaced u, with this shift s.
        Families that cannot shift, or that round, have the list that is nearest to these."""
        return tuple(round(shift * u / (1 + (shift - 1) * u), 8) for u in (1 - i / steps for i in range(steps)))

    @classmethod
    def loads(cls, index: Mapping[str, Any]) -> bool:
        """Whether this family loads the pipeline with this model_index.json."""
        return index["_class_name"] in cls.pipelines

    def read_family_index(self, folder: Path) -> dict[str, Any]:
        """model_index.json. Raises ValueError if it is that of another family."""
        index = read_index(folder)
        if not self.loads(index):
            expected = " or ".join(self.pipelines)
            raise ValueError(
                f"path: {folder} holds a {index['_class_name']}; backbone {self.name} loads a {expected}"
                f"{other_family(index['_class_name'])}"
            )
        return index

    def check_start(self, folder: Path) -> None:
        for key, kind in {"student_blocks": "blocks", "student_heads": "heads"}.items():
            if getattr(self, key):
                raise ValueError(
                    f"the student keeps some {kind} of its network (backbone.{key}), and {folder} has all; name a run "
                    f"or an export with the same {kind}"
                )
        index = self.read_family_index(folder)
        other, source = dataclasses.replace(self, path=str(folder)), self.local_folder()
        given: Any = other.build(CPU, torch.float32, 0)
        own: Any = self.build(CPU, torch.float32, 0)
        networks = {name: index.get(name) for name in given.subfolders}
        check_components(folder, networks, given.needed_classes)
        if source is None:
            return  # the networks of a hub id are compared when they are loaded
        if given.subfolders != own.subfolders or other.own_boundaries() != self.own_boundaries():
            raise ValueError(
                f"{folder} has the networks {', '.join(given.subfolders)} with the boundaries "
                f"{other.own_boundaries()}, and {source} has {', '.join(own.subfolders)} with {self.own_boundaries()}"
            )
        check_same_networks(folder, source, own.subfolders)

    def local_folder(self) -> Path | None:
        """The folder that `path` names, in the working directory or shipped with fastgen; None if there is none."""
        return local_folder(self.path)

    def unloaded(self) -> "PipelineConfig":
        """For a hub id, the section with the configs that ship with fastgen (configs/README.md) as its path."""
        if self.local_folder() is not None:
            return self
        folder = CONFIGS / self.path
        if not folder.is_dir():
            known = ", ".join(str(p.parent.relative_to(CONFIGS)) for p in sorted(CONFIGS.glob("*/*/model_index.json")))
            raise ValueError(
                f"path: the configs of {self.path} are not known without network access; download the pipeline and "
                f"give its folder, or name one whose configs ship with fastgen: {known}"
            )
        return dataclasses.replace(self, path=str(folder))


def check_multiples(size: tuple[int, int], unit: int) -> None:
    """Raises ValueError unless height and width of pictures are multiples of `unit`."""
    if size[0] % unit or size[1] % unit:
        raise ValueError(f"height and width must be multiples of {unit}, got {size[0]} x {size[1]}")


def other_family(class_name: str) -> str:
    """The end of a message: '; backbone ... does', if another family loads this pipeline."""
    name = next((n for n, c in family_configs() if class_name in c.pipelines), None)
    return f"; backbone {name} does" if name else ""


def family_configs() -> Iterator[tuple[str, type[PipelineConfig]]]:
    """name -> config class of every family of pipelines."""
    from fastgen.backbones import BACKBONES

    for name, entry in BACKBONES.items():
        module, _, attribute = entry.partition(":")
        cls = vars(importlib.import_module(module))[attribute]
        if issubclass(cls, PipelineConfig):
            yield name, cls
