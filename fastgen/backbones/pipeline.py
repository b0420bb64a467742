"""What every family of diffusers pipelines shares: the folder's checks, loading, and a table of encoded prompts."""

import importlib
import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from fastgen.backbones.base import Backbone, BackboneConfig
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, ExtraInputs
from fastgen.rollout import RolloutPolicy

TABLE_BYTES = 1 << 30  # prompt embeddings kept in memory; beyond it they are encoded anew
PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PipelineConfig(BackboneConfig):
    """path: a local diffusers folder (relative to the working directory, else to the project), or a hub id "org/name",
    the only thing here that uses the network."""

    path: str

    pipelines: ClassVar[tuple[str, ...]]  # class names in model_index.json that this family loads

    def check(self) -> None:
        """Raises ValueError if the path is neither a complete pipeline folder of this family nor a hub id."""
        folder = self.local_folder()
        if folder is None:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.path):
                raise ValueError(f"path: {self.path!r} is neither a folder nor a hub id like org/name")
            return
        index = read_index(folder)
        if index["_class_name"] not in self.pipelines:
            expected = " or ".join(self.pipelines)
            raise ValueError(
                f"path: {folder} holds a {index['_class_name']}; backbone {self.name} loads a {expected}"
                f"{other_family(index['_class_name'])}"
            )
        check_components(folder, index)

    def local_folder(self) -> Path | None:
        """The folder `path` names, if there is one."""
        for candidate in (Path(self.path), PROJECT / self.path):
            if candidate.is_dir():
                return candidate
        return None


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


def other_family(class_name: str) -> str:
    """'; backbone ... does', where another family loads this pipeline."""
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


def check_components(folder: Path, index: dict[str, Any]) -> None:
    """Raises ValueError if a component the index names has no config, or a network no complete safetensors weights."""
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        part = folder / name
        if not part.is_dir():
            raise ValueError(f"path: {folder} is incomplete: it has no folder {name}; download it again")
        if name.startswith(("scheduler", "tokenizer", "feature_extractor", "image_processor")):
            continue
        if not (part / "config.json").is_file():
            raise ValueError(f"path: {part} has no config.json; download it again")
        missing = missing_weights(part)
        if missing:
            raise ValueError(f"path: {part} has no {missing}; download the safetensors weights")


def missing_weights(part: Path) -> str:
    """The first weight file that is not there, by the shards' index where there is one; '' if none is missing."""
    for index in sorted(part.glob("*.safetensors.index.json")):
        wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return next((w for w in wanted if not (part / w).is_file()), "")
    return "" if any(part.glob("*.safetensors")) else "safetensors weights"


class PipelineBackbone(Backbone):
    """A diffusers pipeline. Families say which networks it has and how they are called; this class loads them.

    `network_class` and `subfolder` name the denoising network; `wrap` puts it behind the contract."""

    config: PipelineConfig
    network_class: ClassVar[str]
    subfolder: ClassVar[str] = "transformer"
    vae_class: ClassVar[str] = "AutoencoderKL"

    def __init__(self, config: PipelineConfig, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        folder = config.local_folder()
        self.source = str(folder or config.path)
        self.options: dict[str, Any] = {
            "use_safetensors": True, "local_files_only": folder is not None, "torch_dtype": dtype,
        }  # fmt: skip
        self._rows: dict[str, int] = {}
        self._table: Conditioning | None = None
        self._ready: Conditioning | None = None

    # --- networks

    @abstractmethod
    def wrap(self, network: ModelMixin) -> Denoiser:
        """The network behind the contract."""

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """config.json of the network, without its weights."""
        cls = getattr(diffusers, self.network_class)
        return cls.load_config(
            self.source, subfolder=self.subfolder, local_files_only=self.options["local_files_only"]
        )

    def make(self, role: str) -> Denoiser:
        network = getattr(diffusers, self.network_class).from_pretrained(
            self.source, subfolder=self.subfolder, **self.options
        )
        return self.wrap(network).to(self.device)

    def make_empty(self) -> Denoiser:
        """The denoiser with its parameters on the meta device: sizes without memory."""
        with init_empty_weights(include_buffers=False):
            network = getattr(diffusers, self.network_class).from_config(self.network_config)
        return self.wrap(network)

    def load_exported(self, folder: Path) -> Denoiser:
        options = self.options | {"local_files_only": True}
        network = getattr(diffusers, self.network_class).from_pretrained(folder, subfolder=self.subfolder, **options)
        return self.wrap(network).to(self.device).requires_grad_(False).eval()

    @cached_property
    def vae(self) -> Any:
        vae = getattr(diffusers, self.vae_class).from_pretrained(self.source, subfolder="vae", **self.options)
        return vae.to(self.device).requires_grad_(False).eval()

    # --- prompts

    @cached_property
    def text_pipeline(self) -> DiffusionPipeline:
        """The stock pipeline without its denoising networks and VAE: its own prompt encoding."""
        absent = {name: None for name in ("transformer", "transformer_2", "unet", "vae") if name in self.parts}
        pipeline = DiffusionPipeline.from_pretrained(self.source, **absent, **self.options)
        return pipeline.to(self.device)

    @cached_property
    def parts(self) -> dict[str, Any]:
        """model_index.json: component -> [library, class]."""
        local = self.options["local_files_only"]
        return DiffusionPipeline.load_config(self.source, local_files_only=local)

    @abstractmethod
    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """The stock pipeline's own encoding of a few prompts."""

    def finish_table(self, table: Conditioning) -> Conditioning:
        """What networks are given, from the rows of all prompts seen so far."""
        return table

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Each prompt is encoded once and kept, up to a gigabyte."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._rows]
        if new:
            self.extend_table(new, set(prompts))
        assert self._ready is not None
        return self._ready.select(torch.tensor([self._rows[p] for p in prompts], device=self.device))

    def extend_table(self, new: list[str], wanted: set[str]) -> None:
        """Encodes prompts and appends them to the table, which is emptied first when it would grow too large."""
        if self._table is not None and sum(v.nbytes for v in self._table.values()) > TABLE_BYTES:
            new, self._rows, self._table = sorted(wanted), {}, None
        chunks = [self.encode_chunk(new[i : i + 32]) for i in range(0, len(new), 32)]
        self._table = Conditioning.cat([*([self._table] if self._table else []), *chunks])
        self._ready = self.finish_table(self._table)
        for prompt in new:
            self._rows[prompt] = len(self._rows)

    # --- export

    def save_pipeline(self, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
        """The stock pipeline with the student as its network and the policy in its scheduler."""
        if isinstance(student.time_embedding, ExtraInputs):
            raise ValueError(f"a network with extra time inputs does not fit {self.parts['_class_name']}")
        replaced = {self.subfolder: student.network, "scheduler": self.student_scheduler(policy)}
        pipeline = DiffusionPipeline.from_pretrained(self.source, **replaced, **self.options)
        pipeline.save_pretrained(folder, safe_serialization=True)

    @abstractmethod
    def student_scheduler(self, policy: RolloutPolicy) -> Any:
        """A stock scheduler that holds the policy. Raises ValueError if none can."""

    def scheduler(self) -> Any:
        """The pipeline's own scheduler."""
        cls = getattr(diffusers, self.parts["scheduler"][1])
        return cls.from_pretrained(
            self.source, subfolder="scheduler", local_files_only=self.options["local_files_only"]
        )
