"""What all families of diffusers pipelines share: checks of the folder, loading, encoded prompts, and export."""

import inspect
import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from fastgen.backbones.base import DEFAULT_ROLES, Backbone, RoleOptions
from fastgen.backbones.encoders import load_text_pipeline, on_device
from fastgen.backbones.folder import (
    read_index,
    read_json,
    stock_class,
    weight_files,
)
from fastgen.backbones.loading import diffusers_class, read_component, read_network
from fastgen.backbones.names_read import names_read
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.backbones.prompt_table import PromptTable
from fastgen.backbones.starts import check_settings
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser
from fastgen.modules.kept_blocks import Kept, check_places, keep_blocks
from fastgen.modules.kept_heads import Width, keep_heads
from fastgen.modules.sharding import WeightMap, WeightsError, gathered
from fastgen.modules.tensor_file import TensorFile
from fastgen.rollout import RolloutPolicy

FEW_STEP_NAMES = ("turbo", "lightning", "lcm", "hyper-", "schnell", "dmd", "few-step", "distill")
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "SCMScheduler")


class PipelineBackbone(Backbone):
    """A diffusers pipeline. Families define which networks it has and how they are called; this class loads them.

    `network_class` and `subfolder` name the denoising network; `wrap` puts it behind the contract."""

    config: PipelineConfig
    network_class: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]] = (
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
    # list of blocks in the network -> the key of its length in config.json; {}: it has none to choose from
    block_lists: ClassVar[Mapping[str, str]] = {"transformer_blocks": "num_layers"}
    last_differs: ClassVar[bool] = False  # whether the last block of a list is unlike the others
    # keys in config.json of the number of attention heads; (): the network cannot be made narrower by its heads
    head_keys: ClassVar[tuple[str, ...]] = ("num_attention_heads",)
    width_keys: ClassVar[tuple[str, ...]] = ()  # and of the width, which is all heads together
    loader: str = "DiffusionPipeline"  # the class of diffusers by which a user loads the original pipeline
    # how an export is called, for its model card
    call: str = """torch.manual_seed(0)  # the scheduler draws from the global generator, not from `generator=`
image = pipeline("a prompt", num_inference_steps={num_steps}, guidance_scale=1).images[0]"""

    def __init__(
        self, config: PipelineConfig, device: torch.device, dtype: torch.dtype, roles: RoleOptions = DEFAULT_ROLES
    ):
        super().__init__(config, device, dtype, roles)
        folder = config.local_folder()
        self.source = str(folder or config.path)
        self.options: dict[str, Any] = {
            "use_safetensors": True,
            "local_files_only": folder is not None,
            "torch_dtype": dtype,
        }
        self.vae_lock = threading.RLock()  # a VAE of videos remembers frames while it works
        self.prompts = PromptTable(
            lambda prompts: self.encode_chunk(prompts),
            lambda table: self.finish_table(table),
            device,
            dtype,
            lambda: self.encoding(),
        )

    # --- networks

    @abstractmethod
    def wrap(self, network: Any) -> Denoiser:
        """The network behind the contract."""

    @property
    def subfolders(self) -> tuple[str, ...]:
        """The folders of the denoising networks: one, or one per expert from high noise to low."""
        return (self.subfolder,)

    def join(self, parts: list[Denoiser]) -> Denoiser:
        """Joins the denoisers of `subfolders` into one."""
        return parts[0]

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """config.json of the network, without its weights."""
        return self.component_config(self.network_class, self.subfolder)

    def component_config(self, class_name: str, name: str) -> dict[str, Any]:
        """config.json of a component. A local one is read without diffusers, which takes seconds to import."""
        if self.options["local_files_only"]:
            return read_json(Path(self.source) / name / "config.json")
        return diffusers_class(class_name).load_config(self.source, subfolder=name)

    def make(self, role: str, dtype: torch.dtype) -> Denoiser:
        if self.roles.deferred:
            denoiser = self.make_empty(dtype)
        else:
            denoiser = self.read_networks(self.source, **self.options | {"torch_dtype": dtype})
        if heads := self.roles.heads.get(role):
            denoiser = self.narrowed(denoiser, heads)
        if kept := self.roles.kept.get(role):
            for part in denoiser.members:
                keep_blocks(part.network, kept, self.kept_settings(kept), self.last_differs)
        return denoiser

    def narrowed(self, denoiser: Denoiser, heads: int) -> Denoiser:
        """A denoiser that keeps the first heads of the networks of the given one. Raises WeightsError if they cannot
        be cut so."""
        try:
            settings, own = self.head_settings(heads), self.network_config[self.head_keys[0]]
            width = Width(self.inner_width, self.inner_width // own * heads)
            networks = [keep_heads(part.network, settings, width) for part in denoiser.members]
        except ValueError as error:
            raise WeightsError(str(error)) from None
        joined = self.join([self.wrap(network) for network in networks])
        return joined if self.roles.deferred else joined.to(self.device)

    def head_settings(self, heads: int) -> dict[str, Any]:
        """The settings in config.json that a network with this number of heads has in the place of the original ones.
        Raises ValueError if a student of this network cannot have this number."""
        if not self.head_keys:
            raise ValueError(
                f"student_heads: {self.network_class} cannot be made narrower by leaving out heads; leave it out"
            )
        config, width = self.network_config, self.inner_width
        own = config[self.head_keys[0]]
        if not 1 <= heads < own:
            raise ValueError(f"student_heads: the network has {own} heads; give a number from 1 to {own - 1}")
        expected = dict.fromkeys(self.head_keys, (own, heads)) | dict.fromkeys(
            self.width_keys, (width, width // own * heads)
        )
        present = {key: pair for key, pair in expected.items() if config.get(key) is not None}
        for key, (whole, _) in present.items():
            if config[key] != whole:
                raise ValueError(
                    f"student_heads: {key} of this network is {config[key]} instead of {whole}, so that it cannot be "
                    "made narrower by leaving out heads; leave it out"
                )
        return {key: fewer for key, (_, fewer) in present.items()}

    @property
    def inner_width(self) -> int:
        """The number of channels of a token in the network: those of all heads."""
        return self.network_config[self.head_keys[0]] * self.network_config["attention_head_dim"]

    @property
    def time_dim(self) -> int:  # type: ignore[override]
        return self.time_width(self.network_config)

    def time_dim_of(self, denoiser: Denoiser) -> int:
        return self.time_width(denoiser.root.members[0].network.config)

    @abstractmethod
    def time_width(self, config: Mapping[str, Any]) -> int:
        """The width of the time embedding of a network with this config.json."""

    def check_kept(self, kept: Kept) -> None:
        """Raises ValueError if a student of this network cannot keep these blocks."""
        for name, places in kept.items():
            if name not in self.block_lists:
                raise ValueError(
                    f"student_blocks: {self.network_class} has no list of blocks {name} to keep some of; "
                    f"{'it has ' + ', '.join(self.block_lists) if self.block_lists else 'leave it out'}"
                )
            count = self.network_config.get(self.block_lists[name])
            if count is not None:  # else it is the default of the class, and is known when weights load
                check_places(name, places, count, self.last_differs)

    def kept_settings(self, kept: Kept) -> dict[str, Any]:
        """The settings in config.json that a network with these blocks has in the place of the original ones."""
        return {self.block_lists[name]: len(places) for name, places in kept.items()}

    @property
    def student_config(self) -> dict[str, Any]:
        """config.json of the student's network."""
        heads = self.config.kept_heads
        fewer = {} if heads is None else self.head_settings(heads)
        return self.network_config | self.kept_settings(self.config.kept_blocks) | fewer

    def read_networks(self, source: str | Path, **options: Any) -> Denoiser:
        """The denoiser of a pipeline folder or hub id."""
        networks = [read_network(self.network_class, source, name, options) for name in self.subfolders]
        parts = [self.wrap(network) for network in networks]
        return self.join(parts).to(self.device)

    @property
    def needed_classes(self) -> dict[str, str]:
        """component -> the class that this family needs there."""
        return dict.fromkeys(self.subfolders, self.network_class) | {"vae": self.vae_class}

    def make_empty(self, dtype: torch.dtype = torch.float32) -> Denoiser:
        """The denoiser with its parameters on the meta device, where they have sizes but take no memory."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            cls = diffusers_class(self.network_class)
            networks = [cls.from_config(self.network_config) for _ in self.subfolders]
        for network in networks:  # cast as from_pretrained does: some layers stay in float32
            kept = tuple(network._keep_in_fp32_modules or ()) if dtype.itemsize < 4 else ()
            for name, tensor in network.state_dict(keep_vars=True).items():
                if tensor.is_floating_point() and not any(part in name.split(".") for part in kept):
                    tensor.data = tensor.data.to(dtype)
        return self.join([self.wrap(network) for network in networks])

    def weights(self) -> WeightMap:
        """parameter or buffer -> (file, name in the file), in the order of the files. Those of a hub id are
        downloaded."""
        folder = Path(self.source)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            files = [f"{name}/*.{kind}" for name in self.subfolders for kind in ("safetensors", "json")]
            ignored = ["*.fp16.*", "*non_ema*", "*.index.fp16.json"]  # one variant is enough
            folder = Path(snapshot_download(self.source, allow_patterns=files, ignore_patterns=ignored))
        found: dict[str, tuple[Path, str]] = {}
        for i, name in enumerate(self.subfolders):
            prefix = f"experts.{i}.network." if len(self.subfolders) > 1 else "network."
            for path in weight_files(folder / name):
                with safe_open(path, framework="pt") as file:
                    names = names_read(folder / name, file.keys())
                found |= {prefix + read: (path, key) for read, key in names.items()}
        return found

    @cached_property
    def stored_dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of most of the denoising network's weights; a few layers may be stored in another."""
        counts = Counter[torch.dtype]()
        for path in {path for path, _ in self.weights().values()}:
            for spec in TensorFile(path).specs.values():
                counts[spec.dtype] += spec.nbytes if spec.dtype.is_floating_point else 0
        return counts.most_common(1)[0][0]

    def folder(self) -> Path:
        """The folder of the whole pipeline; that of a hub id is downloaded if it is not there."""
        if self.options["local_files_only"]:
            return Path(self.source)
        return Path(self.pipeline_class.download(self.source, use_safetensors=True))

    def load_exported(self, folder: Path) -> Denoiser:
        from fastgen.backbones.saving import load_student  # with diffusers

        student = load_student(self, folder)
        student.tell(self.guidance_told("student"))
        return student

    def load_start(self, folder: Path) -> Denoiser:
        student = self.load_exported(folder)
        parameters = inspect.signature(diffusers_class(self.network_class)).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        try:
            for part in student.members:
                check_settings(folder, part.network.config, self.student_config, defaults)
        except ValueError as error:
            raise WeightsError(f"init_from: {error}") from None
        return student

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """config.json of the VAE, without its weights."""
        return self.component_config(self.vae_class, "vae")

    @cached_property
    def vae(self) -> Any:
        vae = read_component(diffusers_class(self.vae_class), self.source, "vae", self.options)
        self.set_up_vae(vae)
        return vae.to(self.device).requires_grad_(False).eval()

    def set_up_vae(self, vae: Any) -> None:
        """Sets how the VAE goes through samples: all at once, one by one, or in tiles."""
        return None

    # --- prompts

    @cached_property
    def text_pipeline(self) -> Any:
        """The stock pipeline without the parts that make or check images. It encodes the prompts, inside
        `with self.encoding()`."""
        dtype = self.config.encoder_dtype
        options = self.options | ({"torch_dtype": getattr(torch, dtype)} if dtype else {})
        parts = self.constructor_parts()
        pipeline = load_text_pipeline(self.pipeline_class, self.source, self.components, options, parts)
        return pipeline if self.config.encoders == "offload" else pipeline.to(self.device)

    def constructor_parts(self) -> dict[str, Any]:
        """Components that the stock pipeline's constructor cannot do without, though encoding prompts can, without
        weights."""
        return {}

    def encoding(self) -> AbstractContextManager[None]:
        """The text encoders are on the device inside, if they are not there all the time (`encoders: offload`)."""
        return on_device(self.text_pipeline, self.device)

    @cached_property
    def components(self) -> dict[str, Any]:
        """model_index.json: component -> [library, class]."""
        if self.options["local_files_only"]:
            index = read_index(Path(self.source))
        else:
            index = dict(diffusers_class("DiffusionPipeline").load_config(self.source))
        return index | {"_class_name": stock_class(index["_class_name"])}

    @property
    def pipeline_class(self) -> Any:
        """The stock pipeline's own class, whose from_pretrained is used. DiffusionPipeline.from_pretrained would
        ignore a component that is passed to it, and load the stored one, if the class has a default for that component
        (as WanPipeline has for its transformers)."""
        return diffusers_class(self.components["_class_name"])

    def warnings(self) -> list[str]:
        """Warns if the teacher looks like a few-step student itself, by its name, its scheduler or a fastgen.json."""
        folder = self.config.local_folder()
        exported = folder is not None and (folder / "fastgen.json").is_file()
        named = any(word in Path(self.source).name.lower() for word in FEW_STEP_NAMES)
        if not (exported or named or self.is_distilled or self.components["scheduler"][1] in FEW_STEP_SCHEDULERS):
            return []
        return [
            f"{self.source} looks like a few-step student. Between its own steps, such a student is no longer a "
            "diffusion model, and training it further blurs it. Instead, name the original pipeline as "
            "backbone.path, and the folder of this one as init_from"
        ]

    @property
    def is_distilled(self) -> bool:
        """Whether the pipeline's index says that it was distilled to few steps."""
        return bool(self.components.get("is_distilled"))

    @property
    def stock_call(self) -> tuple[int, float]:
        """The steps and the scale of the stock pipeline's call without arguments, see `call_with`."""
        return self.call_with({})

    def call_with(self, said: Mapping[str, float]) -> tuple[int, float]:
        """The steps of a call of the stock pipeline with these arguments, and the scale w for which `signals.guided`
        does what its guidance does."""
        default = inspect.signature(self.pipeline_class.__call__).parameters["num_inference_steps"].default
        return int(said.get("num_inference_steps", default)), self.scale_with(said)

    def scale_with(self, said: Mapping[str, float]) -> float:
        """The second number of `call_with`."""
        default = inspect.signature(self.pipeline_class.__call__).parameters["guidance_scale"].default
        return said.get("guidance_scale", default)

    @abstractmethod
    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """The stock pipeline's own encoding of a few prompts."""

    @abstractmethod
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """For planning: key -> the shape of one prompt's conditioning, at its longest."""

    def image_shapes(self) -> dict[str, tuple[int, ...]]:
        """For planning: key -> the shape of what networks are told of one image; {} if the pipeline takes none."""
        return {}

    def finish_table(self, table: Conditioning) -> Conditioning:
        """Turns the rows of all prompts seen so far into what networks are given."""
        return table

    @property
    def negative_prompt(self) -> str:
        return self.config.negative_prompt

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return self.prompts.rows(prompts)

    # --- export

    def save_pipeline(self, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
        self.save_values(student, gathered(student), policy, folder)

    def save_values(
        self,
        student: Denoiser,
        values: Iterable[tuple[str, Tensor]],
        policy: RolloutPolicy,
        folder: Path,
        whole: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        from fastgen.backbones.saving import save_student  # with diffusers

        save_student(self, student, values, policy, folder, whole, dtype)

    @property
    def library(self) -> str:
        return "diffusers"

    def plain_call(self, policy: RolloutPolicy, adapter: bool) -> str:
        from fastgen.backbones.usage import plain_call  # with diffusers

        return plain_call(self, policy, adapter)

    def usage(self, policy: RolloutPolicy, folder: Path, adapter: bool) -> str:
        from fastgen.backbones.usage import pipeline_usage  # with diffusers

        return pipeline_usage(self, policy, folder, adapter)

    def student_components(self, student: Denoiser) -> dict[str, Any]:
        """The stock components that the student replaces, besides the scheduler. Raises ValueError if the pipeline has
        no place for the student's experts."""
        if len(student.members) != len(self.subfolders):
            raise ValueError(f"{self.components['_class_name']} has no place for {len(student.members)} experts")
        return {name: part.network for name, part in zip(self.subfolders, student.members, strict=True)}

    @abstractmethod
    def student_scheduler(self, policy: RolloutPolicy) -> Any:
        """A stock scheduler that stores the policy, or one of `pipelines.few_step`. Raises ValueError if none can."""

    def scheduler(self) -> Any:
        """The pipeline's own scheduler."""
        cls = diffusers_class(self.components["scheduler"][1])
        return cls.from_pretrained(
            self.source, subfolder="scheduler", local_files_only=self.options["local_files_only"]
        )
