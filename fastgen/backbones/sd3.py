"""Stable Diffusion 3 and 3.5: flow matching, an MMDiT, three text encoders. Also loads the embedded digits teacher."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import Backbone, BackboneConfig
from fastgen.backbones.sd3_attention import FoldedJointAttnProcessor, fold_repeats
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, ExtraInputs
from fastgen.pipelines.schedulers import flow_match_config
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule

TABLE_BYTES = 1 << 30  # prompt embeddings kept in memory; beyond it they are encoded anew
PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SD3Config(BackboneConfig):
    """path: a local diffusers folder (relative to the working directory, else to the project), or a hub id "org/name",
    the only thing here that uses the network. resolution: pixels of a side; the transformer's own by default.
    max_sequence_length: T5 tokens, the stock pipeline's 256 by default."""

    path: str
    name: Literal["sd3"] = "sd3"
    resolution: int | None = Field(default=None, ge=16)
    max_sequence_length: int = Field(default=256, ge=1, le=512)

    def check(self) -> None:
        """Raises ValueError if the path is neither a diffusers SD3 folder nor a hub id."""
        folder = self.local_folder()
        if folder is None:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.path):
                raise ValueError(f"path: {self.path!r} is neither a folder nor a hub id like org/name")
            return
        index = folder / "model_index.json"
        if not index.is_file():
            raise ValueError(f"path: {folder} is not a diffusers pipeline: it has no model_index.json")
        found = json.loads(index.read_text())["_class_name"]
        if found != "StableDiffusion3Pipeline":
            raise ValueError(f"path: {folder} holds a {found}; backbone sd3 loads a StableDiffusion3Pipeline")

    def check_export(self, policy: RolloutPolicy) -> None:
        flow_match_config(policy)

    def local_folder(self) -> Path | None:
        """The folder `path` names, if there is one."""
        for candidate in (Path(self.path), PROJECT / self.path):
            if candidate.is_dir():
                return candidate
        return None

    def build(self, device: torch.device, dtype: torch.dtype, seed: int) -> "SD3":
        return SD3(self, device, dtype)


class SD3Denoiser(Denoiser):
    """An unmodified SD3Transformer2DModel behind the contract; features are the image tokens after each block."""

    network: SD3Transformer2DModel

    def __init__(self, network: SD3Transformer2DModel):
        super().__init__(network, FlowSchedule(), "flow_prediction")
        self.feature_dim = network.inner_dim

    def call_network(self, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        folded = {"context_log_repeats": cond["log_repeats"]} if "log_repeats" in cond else None
        return self.network(
            hidden_states=x_t.to(self.network.dtype),
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled"],
            timestep=timestep,
            joint_attention_kwargs=folded,
            return_dict=False,
        )[0]

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time_text_embed

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.time_text_embed = module

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        return list(self.network.transformer_blocks)


class SD3(Backbone):
    """The backbone of recipes with `backbone: {name: sd3, path: ...}`."""

    output = "pixels"

    def __init__(self, config: SD3Config, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.schedule = FlowSchedule()
        folder = config.local_folder()
        self.source = str(folder or config.path)
        self.options: dict[str, Any] = {
            "use_safetensors": True, "local_files_only": folder is not None, "torch_dtype": dtype,
        }  # fmt: skip
        self._rows: dict[str, int] = {}
        self._prompt_embeds, self._pooled, self._folded = torch.empty(0), torch.empty(0), Conditioning()

    @cached_property
    def transformer_config(self) -> dict[str, Any]:
        return SD3Transformer2DModel.load_config(self.source, subfolder="transformer",
                                                 local_files_only=self.options["local_files_only"])  # fmt: skip

    @cached_property
    def vae(self) -> AutoencoderKL:
        vae = AutoencoderKL.from_pretrained(self.source, subfolder="vae", **self.options)
        return vae.to(self.device).requires_grad_(False).eval()

    @cached_property
    def text_pipeline(self) -> StableDiffusion3Pipeline:
        """The stock pipeline without its transformer and VAE: its own prompt encoding."""
        pipeline = StableDiffusion3Pipeline.from_pretrained(self.source, transformer=None, vae=None, **self.options)
        return pipeline.to(self.device)

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        size = self.transformer_config["sample_size"]
        if self.config.resolution is not None:
            size, rest = divmod(self.config.resolution, self.pixels_per_latent)
            if rest or size % self.transformer_config["patch_size"]:
                unit = self.pixels_per_latent * self.transformer_config["patch_size"]
                raise ValueError(f"backbone.resolution must be a multiple of {unit}, got {self.config.resolution}")
        return (self.transformer_config["in_channels"], size, size)

    @property
    def image_size(self) -> int:  # type: ignore[override]
        return self.latent_shape[-1] * self.pixels_per_latent

    @property
    def time_dim(self) -> int:  # type: ignore[override]
        return self.transformer_config["num_attention_heads"] * self.transformer_config["attention_head_dim"]

    def load(self, role: str) -> Denoiser:
        network = SD3Transformer2DModel.from_pretrained(self.source, subfolder="transformer", **self.options)
        return self.wrap(network, trainable=role != "teacher")

    def load_exported(self, folder: Path) -> Denoiser:
        options = self.options | {"local_files_only": True}
        return self.wrap(
            SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer", **options), trainable=False
        )

    def wrap(self, network: SD3Transformer2DModel, trainable: bool) -> SD3Denoiser:
        network.set_attn_processor(FoldedJointAttnProcessor())
        network.to(self.device)
        return SD3Denoiser(network.requires_grad_(trainable).train(trainable))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds [B, L, D], pooled [B, P] and log_repeats [B, L] (see sd3_attention); each prompt is encoded
        once and kept, up to a gigabyte."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._rows]
        if new:
            self.extend_table(new, set(prompts))
        index = torch.tensor([self._rows[p] for p in prompts], device=self.device)
        return self._folded.select(index)

    def extend_table(self, new: list[str], wanted: set[str]) -> None:
        """Encodes prompts and appends them to the table, which is emptied first when it would grow too large."""
        if self._prompt_embeds.nbytes > TABLE_BYTES:
            new, self._rows = sorted(wanted), {}
            self._prompt_embeds, self._pooled = torch.empty(0), torch.empty(0)
        embeds, pooled = [], []
        for start in range(0, len(new), 32):
            chunk = new[start : start + 32]
            out = self.text_pipeline.encode_prompt(
                prompt=chunk, prompt_2=chunk, prompt_3=chunk, device=self.device,
                do_classifier_free_guidance=False, max_sequence_length=self.config.max_sequence_length,
            )  # fmt: skip
            embeds.append(out[0])
            pooled.append(out[2])
        for prompt in new:
            self._rows[prompt] = len(self._rows)
        old = [self._prompt_embeds] if self._prompt_embeds.numel() else []
        self._prompt_embeds = torch.cat([*old, *embeds])
        self._pooled = torch.cat([*([self._pooled] if old else []), *pooled])
        folded, log_repeats = fold_repeats(self._prompt_embeds)
        self._folded = Conditioning({"prompt_embeds": folded, "pooled": self._pooled, "log_repeats": log_repeats})

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to the mode of the posterior, (z - shift) * scale."""
        z = self.vae.encode(pixels.to(self.device, self.dtype) * 2 - 1).latent_dist.mode()
        return (z - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        z = latents.to(self.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def teacher_policy(self, num_steps: int) -> RolloutPolicy:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
            self.source, subfolder="scheduler", local_files_only=self.options["local_files_only"]
        )
        scheduler.set_timesteps(num_steps)
        transition: Literal["renoise", "ode"] = "renoise" if scheduler.config.stochastic_sampling else "ode"
        told = scheduler.config.num_train_timesteps / 1000
        told = told if num_steps == 1 and told != 1 else None
        return RolloutPolicy(tuple(scheduler.sigmas[:-1].tolist()), transition, told)

    def save_pipeline(self, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
        """A StableDiffusion3Pipeline with the student as transformer and the policy in its scheduler."""
        if isinstance(student.time_embedding, ExtraInputs):
            raise ValueError("a network with extra time inputs does not fit StableDiffusion3Pipeline")
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            self.source,
            transformer=student.network,
            scheduler=FlowMatchEulerDiscreteScheduler(**flow_match_config(policy)),
            **self.options,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
