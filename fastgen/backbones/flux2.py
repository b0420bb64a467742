"""FLUX.2 dev and klein: flow matching, an MMDiT, prompts encoded by layers of Mistral 3 (dev) or Qwen3 (klein).

A latent is a patch of 2 x 2 latents of the VAE, normalised by the statistics of its batch norm. dev is told a guidance
scale, as FLUX.1 dev is (`guidance`). klein is told none; its base models are guided by two network calls, and its
distilled ones are not guided. An exported klein is marked as distilled, so that the stock call does not guide it."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.flow_image import FlowImage, FlowImageConfig, grid_ids
from fastgen.backbones.flux import BLOCK_LISTS, FluxDenoiser
from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.backbones.told_guidance import ToldGuidance, ToldGuidanceConfig
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs

DEV, KLEIN = "Flux2Pipeline", "Flux2KleinPipeline"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Flux2Config(ToldGuidanceConfig, FlowImageConfig):
    """max_sequence_length: number of text tokens. The network sees their padding, so that another number gives other
    pictures. guidance: for dev, as in `ToldGuidanceConfig`; the stock pipeline tells 4."""

    name: Literal["flux2"] = "flux2"
    max_sequence_length: int = Field(default=512, ge=1, le=512)
    pipelines: ClassVar[tuple[str, ...]] = (DEV, KLEIN)

    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "Flux2":
        return Flux2(self, device, dtype, roles)


class Flux2Denoiser(FluxDenoiser):
    """An unmodified Flux2Transformer2DModel behind the contract; its features are those of the two-stream blocks."""

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        dtype, (height, width) = self.weight_dtype, x_t.shape[-2:]
        prompts = cond["prompt_embeds"].to(dtype)
        guidance, inputs = self.told_guidance(t, inputs)
        tokens = self.network(
            hidden_states=x_t.flatten(2).mT.to(dtype),
            encoder_hidden_states=prompts,
            timestep=self.timestep(t, inputs),
            img_ids=F.pad(grid_ids(height, width, x_t.device, torch.int64), (0, 1)),  # (0, row, column, 0)
            txt_ids=F.pad(torch.arange(prompts.shape[1], device=x_t.device)[:, None], (3, 0)),  # (0, 0, 0, place)
            guidance=guidance,
            return_dict=False,
        )[0]
        return tokens.mT.unflatten(2, (height, width))

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time_guidance_embed

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.time_guidance_embed = module


class Flux2(ToldGuidance, FlowImage):
    """The backbone of recipes with `backbone: {name: flux2, path: ...}`."""

    config: Flux2Config
    network_class = "Flux2Transformer2DModel"
    block_lists: ClassVar[Mapping[str, str]] = BLOCK_LISTS
    vae_class = "AutoencoderKLFlux2"
    stock_guidance = 4.0
    patch_size = 1  # a latent is a token

    def head_settings(self, heads: int) -> dict[str, Any]:
        """The halves of its gated layers are `mlp_ratio` widths."""
        if (ratio := self.network_config.get("mlp_ratio", 3.0)) % 1:
            raise ValueError(f"student_heads: the mlp_ratio of this network is {ratio}, no whole number; leave it out")
        return super().head_settings(heads)

    @property
    def lora_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        """to_out is a layer in the one-stream blocks, and a list with a layer in the two-stream ones."""
        single = range(self.network_config["num_single_layers"])
        outlets = (f"single_transformer_blocks.{i}.attn.to_out" for i in single)
        return (*PipelineBackbone.lora_targets, "linear_in", "linear_out", "to_qkv_mlp_proj", *outlets)

    def wrap(self, network: Any) -> Flux2Denoiser:
        return Flux2Denoiser(network)

    @property
    def is_klein(self) -> bool:
        return self.components["_class_name"] == KLEIN

    @property
    def call(self) -> str:  # type: ignore[override]
        """The first argument of the stock call are images."""
        told, side = self.guidance_told("student") or 1.0, self.image_size
        size = f", height={side}, width={side}" if self.config.resolution else ""
        given = f"guidance_scale={told:g}, max_sequence_length={self.config.max_sequence_length}{size}"
        return super().call.replace('"a prompt"', 'prompt="a prompt"').replace("guidance_scale=1", given)

    def scale_with(self, said: Mapping[str, float]) -> float:
        """Only klein's base models are guided by two network calls."""
        guided = self.is_klein and not self.is_distilled
        return said.get("guidance_scale", self.stock_guidance) if guided else 1.0

    def student_components(self, student: Denoiser) -> dict[str, Any]:
        return super().student_components(student) | ({"is_distilled": True} if self.is_klein else {})

    def level_shift(self, config: Mapping[str, Any], num_steps: int) -> float:
        """mu depends on the number of steps too."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(self.latent_shape[-2] * self.latent_shape[-1], num_steps)

    # --- latents: patches of the VAE's own

    @property
    def pixels_per_latent(self) -> int:
        return 2 * super().pixels_per_latent

    @property
    def latent_channels(self) -> int:
        return 4 * super().latent_channels

    def latent_moments(self) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        mean, variance = (value.view(-1, 1, 1).to(self.dtype) for value in (norm.running_mean, norm.running_var))
        return mean, torch.sqrt(variance + self.vae.config.batch_norm_eps)

    def vae_encode(self, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(super().vae_encode(pixels), 2)

    def vae_decode(self, z: Tensor) -> Tensor:
        return super().vae_decode(F.pixel_shuffle(z, 2))

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        length = self.config.max_sequence_length
        embeds, _ = self.text_pipeline.encode_prompt(prompts, self.device, max_sequence_length=length)
        return Conditioning({"prompt_embeds": embeds})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.config.max_sequence_length, self.network_config["joint_attention_dim"])}
