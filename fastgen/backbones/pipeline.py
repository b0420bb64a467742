"""What every family of diffusers pipelines shares: the folder's checks, loading, and a table of encoded prompts."""

import dataclasses
import importlib
import inspect
import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import snapshot_download
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from safetensors.torch import save_file

from fastgen.backbones.base import Backbone, BackboneConfig
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser
from fastgen.modules.lora import LoraDenoiser
from fastgen.modules.sharding import WeightMap
from fastgen.pipelines import flow_map
from fastgen.rollout import RolloutPolicy

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
FEW_STEP_NAMES = ("turbo", "lightning", "lcm", "hyper-", "schnell", "dmd", "few-step", "distill")
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
TABLE_BYTES = 1 << 30  # prompt embeddings kept in memory; beyond it they are encoded anew
PROJECT = Path(__file__).resolve().parents[2]
CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # of well-known hub ids


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PipelineConfig(BackboneConfig):
    """path: a local diffusers folder (relative to the working directory, else to the project), or a hub id "org/name",
    the only thing here that uses the network."""

    path: str

    pipelines: ClassVar[tuple[str, ...]]  # class names in model_index.json that this family loads
    prompt_keys: ClassVar[tuple[str, ...]] = ("max_sequence_length",)  # fields that the encoding of prompts depends on

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

    @abstractmethod
    def build(self, device: torch.device, dtype: torch.dtype, seed: int) -> "PipelineBackbone": ...

    def local_folder(self) -> Path | None:
        """The folder `path` names, if there is one."""
        for candidate in (Path(self.path), PROJECT / self.path):
            if candidate.is_dir():
                return candidate
        return None

    def unloaded(self) -> "PipelineConfig":
        """Of a hub id, the configs that ship with fastgen (configs/README.md)."""
        if self.local_folder() is not None:
            return self
        folder = CONFIGS / self.path
        if not folder.is_dir():
            known = ", ".join(str(p.parent.relative_to(CONFIGS)) for p in sorted(CONFIGS.glob("*/*/model_index.json")))
            raise ValueError(f"path: the configs of {self.path} are not known without the network; download it and "
                             f"give the folder. Known are {known}")  # fmt: skip
        return dataclasses.replace(self, path=str(folder))


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


def weight_files(part: Path) -> list[Path]:
    """The safetensors files of a component: those of its index, or its one file."""
    for index in sorted(part.glob("*.safetensors.index.json")):
        return [part / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(part.glob("*.safetensors"))[:1]


def boundaries_in(part: Path) -> tuple[float, ...]:
    """The boundaries of the experts that one component holds, by its config.json; () for one network or a hub id."""
    path = part / "config.json"
    return tuple(json.loads(path.read_text()).get("boundaries", ())) if path.is_file() else ()


class PromptRows(Protocol):
    """Prompts encoded before, as `fastgen prepare` stores them."""

    def __contains__(self, prompt: str) -> bool: ...

    def read(self, prompts: Sequence[str]) -> Conditioning:
        """Rows of encode_chunk, on the CPU."""


class PipelineBackbone(Backbone):
    """A diffusers pipeline. Families say which networks it has and how they are called; this class loads them.

    `network_class` and `subfolder` name the denoising network; `wrap` puts it behind the contract."""

    config: PipelineConfig
    network_class: ClassVar[str]
    lora_targets = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "net.0.proj",
        "net.2",
    )  # attention and feed-forward layers, by diffusers' names
    subfolder: ClassVar[str] = "transformer"
    vae_class: ClassVar[str] = "AutoencoderKL"
    # how an export is called, for its card
    call: str = """torch.manual_seed(0)  # the scheduler draws from the global generator, not from `generator=`
image = pipeline("a prompt", num_inference_steps={num_steps}, guidance_scale=1).images[0]"""

    def __init__(self, config: PipelineConfig, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        folder = config.local_folder()
        self.source = str(folder or config.path)
        self.options: dict[str, Any] = {
            "use_safetensors": True, "local_files_only": folder is not None, "torch_dtype": dtype,
        }  # fmt: skip
        self.prepared: PromptRows | None = None  # read instead of encoding; set by prepared data
        self._rows: dict[str, int] = {}
        self._table: Conditioning | None = None
        self._ready: Conditioning | None = None

    # --- networks

    @abstractmethod
    def wrap(self, network: ModelMixin) -> Denoiser:
        """The network behind the contract."""

    @property
    def subfolders(self) -> tuple[str, ...]:
        """The folders of the denoising networks: several, from high noise to low, for a model of several experts."""
        return (self.subfolder,)

    def join(self, parts: list[Denoiser]) -> Denoiser:
        """One denoiser from those of `subfolders`."""
        return parts[0]

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """config.json of the network, without its weights."""
        cls = getattr(diffusers, self.network_class)
        return cls.load_config(
            self.source, subfolder=self.subfolder, local_files_only=self.options["local_files_only"]
        )

    def make(self, role: str, dtype: torch.dtype) -> Denoiser:
        if self.deferred:
            return self.make_empty(dtype)
        return self.read_networks(self.source, **self.options | {"torch_dtype": dtype})

    def read_networks(self, source: str | Path, **options: Any) -> Denoiser:
        """The denoiser of a pipeline folder or hub id."""
        cls = getattr(diffusers, self.network_class)
        parts = [self.wrap(cls.from_pretrained(source, subfolder=name, **options)) for name in self.subfolders]
        return self.join(parts).to(self.device)

    def make_empty(self, dtype: torch.dtype = torch.float32) -> Denoiser:
        """The denoiser with its parameters on the meta device: sizes without memory."""
        with init_empty_weights(include_buffers=False):
            cls = getattr(diffusers, self.network_class)
            networks = [cls.from_config(self.network_config) for _ in self.subfolders]
        for network in networks:  # as from_pretrained casts: some layers of a family stay in float32
            kept = tuple(network._keep_in_fp32_modules or ()) if dtype.itemsize < 4 else ()
            for name, tensor in network.state_dict(keep_vars=True).items():
                if tensor.is_floating_point() and not any(part in name.split(".") for part in kept):
                    tensor.data = tensor.data.to(dtype)
        return self.join([self.wrap(network) for network in networks])

    def weights(self) -> WeightMap:
        """parameter or buffer -> (file, name in the file); a hub id's files are downloaded."""
        folder = Path(self.source)
        if not folder.is_dir():
            folder = Path(snapshot_download(self.source, allow_patterns=[f"{name}/*" for name in self.subfolders]))
        found: dict[str, tuple[Path, str]] = {}
        for i, name in enumerate(self.subfolders):
            prefix = f"experts.{i}.network." if len(self.subfolders) > 1 else "network."
            for path in weight_files(folder / name):
                with safe_open(path, framework="pt") as file:
                    found |= {prefix + key: (path, key) for key in file.keys()}  # noqa: SIM118
        return found

    def load_exported(self, folder: Path) -> Denoiser:
        options = self.options | {"local_files_only": True}
        if not (folder / LORA_WEIGHTS).is_file():
            student = self.read_networks(folder, **options)
            if (folder / flow_map.INPUTS).is_file():
                self.read_inputs(student, folder)
            return student.requires_grad_(False).eval()
        student = self.read_networks(self.source, **self.options)
        for part, file in zip(student.parts, self.lora_files, strict=True):
            part.network.load_lora_adapter(str(folder), weight_name=file, prefix=self.subfolder)
        return student.to(self.device).requires_grad_(False).eval()

    def read_inputs(self, student: Denoiser, folder: Path) -> None:
        """Extends the network of an exported flow map by its inputs."""
        told, parts = flow_map.read_inputs(folder)
        student.add_inputs({}, self.time_dim, told["names"])
        for part, weights in zip(student.parts, parts, strict=True):
            part.time_embedding.tables.load_state_dict(weights)
        student.to(self.device, self.dtype)

    @property
    def lora_files(self) -> list[str]:
        """A file for each network; diffusers wants each under the name of the first."""
        return [LORA_WEIGHTS, *(LORA_WEIGHTS.replace(".", f"_{name}.") for name in self.subfolders[1:])]

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """config.json of the VAE, without its weights."""
        cls = getattr(diffusers, self.vae_class)
        return cls.load_config(self.source, subfolder="vae", local_files_only=self.options["local_files_only"])

    @cached_property
    def vae(self) -> Any:
        vae = getattr(diffusers, self.vae_class).from_pretrained(self.source, subfolder="vae", **self.options)
        return vae.to(self.device).requires_grad_(False).eval()

    # --- prompts

    @cached_property
    def text_pipeline(self) -> DiffusionPipeline:
        """The stock pipeline without what draws and judges images: its own prompt encoding."""
        unused = ("transformer", "transformer_2", "unet", "vae", "safety_checker", "image_encoder")
        absent: dict[str, Any] = {name: None for name in unused if name in self.parts}
        if "safety_checker" in absent:
            absent["requires_safety_checker"] = False  # nothing is drawn here
        pipeline = self.pipeline_class.from_pretrained(self.source, **absent, **self.options)
        return pipeline.to(self.device)

    @cached_property
    def parts(self) -> dict[str, Any]:
        """model_index.json: component -> [library, class]."""
        local = self.options["local_files_only"]
        index = dict(DiffusionPipeline.load_config(self.source, local_files_only=local))
        return index | {"_class_name": index["_class_name"].removeprefix(flow_map.PREFIX)}

    @property
    def pipeline_class(self) -> type[DiffusionPipeline]:
        """The stock pipeline's own class. DiffusionPipeline.from_pretrained ignores a component that is passed to it
        where the class has a default for it, as WanPipeline has for its transformers, and loads the stored one."""
        return getattr(diffusers, self.parts["_class_name"])

    def warnings(self) -> list[str]:
        """Whether the teacher looks like a few-step student itself, by its name, its scheduler or our card."""
        folder = self.config.local_folder()
        exported = folder is not None and (folder / "fastgen.json").is_file()
        named = any(word in Path(self.source).name.lower() for word in FEW_STEP_NAMES)
        if not (exported or named or self.parts["scheduler"][1] in FEW_STEP_SCHEDULERS):
            return []
        return [f"{self.source} looks like a few-step student. Between its own steps it is no diffusion model any "
                "more, and training it further blurs it. The anchored way: name the original pipeline as "
                "backbone.path, and this one as init_from"]  # fmt: skip

    @property
    def stock_call(self) -> tuple[int, float]:
        """num_inference_steps and guidance_scale of the stock pipeline's call, where it is given none."""
        parameters = inspect.signature(self.pipeline_class.__call__).parameters
        return parameters["num_inference_steps"].default, parameters["guidance_scale"].default

    @abstractmethod
    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """The stock pipeline's own encoding of a few prompts."""

    @abstractmethod
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one prompt's conditioning by key, at its longest, for planning."""

    def finish_table(self, table: Conditioning) -> Conditioning:
        """What networks are given, from the rows of all prompts seen so far."""
        return table

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Each prompt is encoded once and kept, up to a gigabyte. By itself, as the last bits depend on what
        shares its batch, and a run that continues meets prompts in other company."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._rows]
        if new:
            self.extend_table(new, set(prompts))
        assert self._ready is not None
        return self._ready.select(torch.tensor([self._rows[p] for p in prompts], device=self.device))

    def extend_table(self, new: list[str], wanted: set[str]) -> None:
        """Encodes prompts and appends them to the table, which is emptied first when it would grow too large."""
        if self._table is not None and sum(v.nbytes for v in self._table.values()) > TABLE_BYTES:
            new, self._rows, self._table = sorted(wanted), {}, None
        stored = [p for p in new if self.prepared is not None and p in self.prepared]
        new = list(dict.fromkeys([*stored, *new]))
        chunks = [self.read_chunk(stored)] if stored else []
        chunks += [self.encode_chunk([prompt]) for prompt in new[len(stored) :]]
        self._table = Conditioning.cat([*([self._table] if self._table else []), *chunks])
        self._ready = self.finish_table(self._table)
        for prompt in new:
            self._rows[prompt] = len(self._rows)

    def read_chunk(self, prompts: list[str]) -> Conditioning:
        """Rows of encode_chunk from the prepared prompts."""
        assert self.prepared is not None
        rows = self.prepared.read(prompts)
        return Conditioning({
            k: v.to(self.device, self.dtype if v.is_floating_point() else v.dtype) for k, v in rows.items()
        })  # fmt: skip

    # --- export

    def save_pipeline(self, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
        """The stock pipeline with the student as its network and the policy in its scheduler."""
        if student.is_extended:
            self.save_flow_map(student, policy, folder)
            return
        if isinstance(student, LoraDenoiser):
            self.save_lora(student, policy, folder)
            return
        replaced = self.student_parts(student) | {"scheduler": self.student_scheduler(policy)}
        pipeline = self.pipeline_class.from_pretrained(self.source, **replaced, **self.options)
        pipeline.save_pretrained(folder, safe_serialization=True)

    def save_flow_map(self, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
        """A pipeline of `flow_map`: the stock one without the further inputs of its networks, and those beside it. An
        adapter is added into the weights."""
        if isinstance(student, LoraDenoiser):
            student = student.shared.unload(student.role or "")
        parts = student.parts
        embeddings: list[Any] = [part.time_embedding for part in parts]
        if list(embeddings[0].tables) != list(policy.inputs):
            raise ValueError(f"a network with the extra time inputs {list(embeddings[0].tables)} does not fit "
                             f"{self.parts['_class_name']}, whose sampler gives it {list(policy.inputs)}")  # fmt: skip
        for part, embedding in zip(parts, embeddings, strict=True):
            part.set_time_embedding(embedding.embedding)
        try:
            self.save_pipeline(student, policy, folder)
        finally:
            for part, embedding in zip(parts, embeddings, strict=True):
                part.set_time_embedding(embedding)
        flow_map.save_inputs(embeddings, policy, self.schedule, folder)
        path = folder / "model_index.json"
        index = json.loads(path.read_text())
        path.write_text(json.dumps(index | {"_class_name": flow_map.PREFIX + index["_class_name"]}, indent=2) + "\n")

    def student_parts(self, student: Denoiser) -> dict[str, Any]:
        """What of the stock pipeline the student replaces, beside the scheduler. Raises ValueError for experts that it
        has no place for."""
        networks = [part.network for part in student.parts]
        if len(networks) != len(self.subfolders):
            raise ValueError(f"{self.parts['_class_name']} has no place for {len(networks)} experts")
        return dict(zip(self.subfolders, networks, strict=True))

    def save_lora(self, student: LoraDenoiser, policy: RolloutPolicy, folder: Path) -> None:
        """The adapter as diffusers' `load_lora_weights` reads it, and the scheduler. The factor alpha / rank is
        multiplied into B, so that readers which do not look for alpha agree."""
        assert student.role is not None
        config = student.shared.configs[student.role]
        factor = (config.alpha or config.rank) / config.rank
        folder.mkdir(parents=True, exist_ok=True)
        for i, file in enumerate(self.lora_files):
            prefix = f"experts.{i}.network." if len(self.lora_files) > 1 else "network."
            layers = {
                f"{self.subfolder}.{name.removeprefix(prefix)}": p.detach() * (factor if ".lora_B." in name else 1.0)
                for name, p in student.named_parameters()
                if name.startswith(prefix)
            }
            save_file({name: p.cpu().contiguous() for name, p in layers.items()}, folder / file)
        self.student_scheduler(policy).save_pretrained(folder / "scheduler")

    @abstractmethod
    def student_scheduler(self, policy: RolloutPolicy) -> Any:
        """A stock scheduler that holds the policy, or one of `few_step`. Raises ValueError if none can."""

    def scheduler(self) -> Any:
        """The pipeline's own scheduler."""
        cls = getattr(diffusers, self.parts["scheduler"][1])
        return cls.from_pretrained(
            self.source, subfolder="scheduler", local_files_only=self.options["local_files_only"]
        )
