"""Stable Diffusion 1.5, 2.1 and XL: a variance-preserving discrete diffusion, a UNet, epsilon or v prediction.

A UNet that was distilled from guidance, as a latent consistency model is (`time_cond_proj_dim`), is told a scale and
called once a step. `guidance` says which scale each role is told, by default that of the stock pipeline's call."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, Output, RoleOptions
from fastgen.backbones.discrete import Discrete, DiscreteConfig
from fastgen.backbones.pipeline_config import check_multiples
from fastgen.backbones.told_guidance import ToldGuidance, ToldGuidanceConfig
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.inputs import UNetExtraInputs
from fastgen.registry import MOST_WIDTH
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import PredictionType, VPSchedule

CLIP_TOKENS = 77


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SDConfig(ToldGuidanceConfig, DiscreteConfig):
    """resolution: side of an image in pixels, by default that of the UNet. SDXL is conditioned on it as original and
    target size, without cropping, as in the stock pipeline. guidance: of a UNet that is told a scale, as in
    `ToldGuidanceConfig`; the stock pipelines tell 7.5 and, of SDXL, 5."""

    name: Literal["sd"] = "sd"
    resolution: int | None = Field(default=None, ge=8, le=MOST_WIDTH)

    output: ClassVar[Output] = "pixels"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    prompt_keys: ClassVar[tuple[str, ...]] = ("resolution",)  # it is in SDXL's time_ids

    def check_export(self, policy: RolloutPolicy) -> None:
        """Also raises ValueError for inputs added to a UNet that is told a guidance scale."""
        super().check_export(policy)
        if policy.inputs and self.local_folder() is not None and self.read().is_told:
            raise ValueError(
                f"no pipeline gives {' and '.join(policy.inputs)} to a UNet that is told a guidance scale "
                "(time_cond_proj_dim); leave out rollout.two_time, embedded_guidance and embedded_steps"
            )

    def build(self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES) -> "SD":
        return SD(self, device, dtype, roles)


class SDDenoiser(Denoiser):
    """An unmodified UNet2DConditionModel behind the contract. Its features are the output of the middle block, which
    DMD2's discriminator reads (arXiv 2405.14867 Sec. 4.3)."""

    network: Any  # a UNet2DConditionModel
    extra_inputs = UNetExtraInputs

    def __init__(self, network: Any, schedule: VPSchedule, prediction_type: PredictionType):
        super().__init__(network, schedule, prediction_type)
        self.feature_dim = network.config.block_out_channels[-1]

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        guidance, inputs = self.told_guidance(t, inputs)
        timestep, extended = self.timestep(t, inputs), self.is_extended
        conditions = [timestep[:, 1:]] if extended else []
        if guidance is not None:
            conditions.append(guidance_waves(guidance, self.network.config.time_cond_proj_dim).to(self.weight_dtype))
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]} if "pooled" in cond else None
        return self.network(
            x_t.to(self.weight_dtype),
            timestep[:, 0] if extended else timestep,
            encoder_hidden_states=cond["prompt_embeds"].to(self.weight_dtype),
            timestep_cond=torch.cat(conditions, dim=1) if conditions else None,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time_embedding

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.time_embedding = module

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        if self.network.mid_block is None:
            raise ValueError("this UNet has no middle block to take features from; train without a discriminator")
        return [self.network.mid_block]

    @property
    def shard_modules(self) -> Sequence[nn.Module]:
        """Every residual and transformer block, and what else a down, middle or up block has."""
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        stages = [*self.network.down_blocks, self.network.mid_block, *self.network.up_blocks]
        stages = [stage for stage in stages if stage is not None]
        inside = [module for stage in stages for module in stage.modules()]
        return [*(m for m in inside if isinstance(m, BasicTransformerBlock | ResnetBlock2D)), *stages]


def guidance_waves(scale: Tensor, width: int) -> Tensor:
    """[B, width] float32: sines, then cosines, of 1000 (w - 1) f_j for the scales w [B], with frequencies f_j from 1
    to 1/10000 in equal ratios, as the stock pipelines' get_guidance_scale_embedding makes them."""
    half = width // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)  # in float32, as there: angles are in the thousands
    frequencies = torch.exp(torch.arange(half, device=scale.device, dtype=torch.float32) * -step)
    angles = 1000 * (scale.float() - 1)[:, None] * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


class SD(ToldGuidance, Discrete):
    """The backbone of recipes with `backbone: {name: sd, path: ...}`."""

    config: SDConfig
    network_class = "UNet2DConditionModel"
    block_lists: ClassVar[Mapping[str, str]] = {}
    head_keys: ClassVar[tuple[str, ...]] = ()
    subfolder = "unet"

    @property
    def call(self) -> str:  # type: ignore[override]
        """Unlike the flow-matching schedulers, LCMScheduler draws from the generator that it is given. The scale is
        what the student was told; it is no guidance in the sense of two network calls."""
        told = self.guidance_told("student") or 1.0
        size = f"height={self.image_size}, width={self.image_size}, " if self.config.resolution else ""
        return f"""generator = torch.manual_seed(0)
options = dict(num_inference_steps={{num_steps}}, guidance_scale={told:g}, {size}generator=generator{{eta}})
image = pipeline("a prompt", **options).images[0]"""

    @property
    def stock_guidance(self) -> float:  # type: ignore[override]
        return inspect.signature(self.pipeline_class.__call__).parameters["guidance_scale"].default

    def scale_with(self, said: Mapping[str, float]) -> float:
        """A UNet that is told a scale is called once a step."""
        return 1.0 if self.is_told else said.get("guidance_scale", self.stock_guidance)

    # --- noise

    def scheduler(self) -> Any:
        """The pipeline's own scheduler, with the settings that StableDiffusionPipeline forces on every scheduler."""
        scheduler = super().scheduler()
        if self.components["_class_name"] != "StableDiffusionPipeline":
            return scheduler
        forced = {"steps_offset": 1, "clip_sample": False}
        return scheduler.from_config(scheduler.config, **{k: v for k, v in forced.items() if k in scheduler.config})

    # --- network

    @property
    def is_xl(self) -> bool:
        return self.components["_class_name"] == "StableDiffusionXLPipeline"

    def time_width(self, config: Mapping[str, Any]) -> int:
        return config.get("time_embedding_dim") or 4 * config["block_out_channels"][0]

    def wrap(self, network: Any) -> Denoiser:
        self.check()
        return SDDenoiser(network, self.schedule, self.scheduler().config.prediction_type)

    # --- prompts

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """prompt_embeds [B, L, D]; for SDXL also pooled [B, P] and time_ids [B, 6]: original height and width, crop
        offsets, target height and width. SDXL's empty prompt is all zeros if it is in the stock pipeline
        (force_zeros_for_empty_prompt)."""
        pipeline: Any = self.text_pipeline
        out = pipeline.encode_prompt(
            prompt=prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if not self.is_xl:
            return Conditioning({"prompt_embeds": out[0]})
        embeds, pooled = out[0], out[2]
        if pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([prompt == "" for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        size = float(self.image_size)
        sizes = [size, size, 0, 0, size, size]
        time_ids = embeds.new_tensor(sizes, dtype=self.dtype).expand(len(prompts), 6)
        return Conditioning({"prompt_embeds": embeds, "pooled": pooled, "time_ids": time_ids})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.network_config["cross_attention_dim"]
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (CLIP_TOKENS, width)}
        if not self.is_xl:
            return shapes
        sizes = 6 * self.network_config["addition_time_embed_dim"]
        pooled = self.network_config["projection_class_embeddings_input_dim"] - sizes
        return shapes | {"pooled": (pooled,), "time_ids": (6,)}

    # --- images

    @cached_property
    def vae(self) -> Any:
        """The VAE, in float32 where float16 would overflow, as in the stock SDXL pipeline."""
        vae = super().vae
        overflows = self.is_xl and self.dtype == torch.float16 and vae.config.force_upcast
        return vae.float() if overflows else vae

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        size, rest = self.network_config["sample_size"], 0
        if self.config.resolution is not None:
            size, rest = divmod(self.config.resolution, self.pixels_per_latent)
        if rest:
            unit = self.pixels_per_latent
            raise ValueError(f"backbone.resolution must be a multiple of {unit}, got {self.config.resolution}")
        if not isinstance(size, int):
            raise ValueError(f"the UNet's sample_size is {size}, not one number; give backbone.resolution")
        return (self.network_config["in_channels"], size, size)

    @property
    def size_unit(self) -> int:
        """What the sides of pictures are multiples of."""
        return self.pixels_per_latent

    def latent_shape_of(self, size: tuple[int, int]) -> tuple[int, ...]:
        check_multiples(size, self.size_unit)
        return (self.latent_shape[0], *(side // self.pixels_per_latent for side in size))

    def told_size(self, cond: Conditioning, size: tuple[int, int]) -> Conditioning:
        """SDXL is told the size before and after cropping, as in the stock call."""
        if not self.is_xl:
            return cond
        sizes = cond["time_ids"].new_tensor([*size, 0, 0, *size])
        return Conditioning({**cond, "time_ids": sizes.expand_as(cond["time_ids"])})

    @property
    def image_size(self) -> int:  # type: ignore[override]
        return self.latent_shape[-1] * self.pixels_per_latent

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to the mode of the posterior, normalised."""
        with self.vae_lock:
            z = self.vae.encode(pixels.to(self.device, self.vae.dtype) * 2 - 1).latent_dist.mode()
        mean, std = self.latent_moments(z)
        return ((z - mean) / std).to(self.dtype)

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        with self.vae_lock:
            z = latents.to(self.vae.dtype)
            mean, std = self.latent_moments(z)
            pixels = self.vae.decode(z * std + mean, return_dict=False)[0] / 2 + 0.5
        return pixels.clamp(0, 1) if clamp else pixels

    def latent_moments(self, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and std of the VAE's latents, as the pipelines take them from its config: 0 and 1 / scaling_factor. If
        SDXL's config has values per channel, the mean is latents_mean and the std latents_std / scaling_factor."""
        config, like = self.vae.config, torch.empty(0) if like is None else like
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if not self.is_xl or mean is None or std is None:
            return like.new_tensor(0.0), like.new_tensor(1 / config.scaling_factor)
        mean, std = (like.new_tensor(value).view(1, -1, 1, 1) for value in (mean, std))
        return mean, std / config.scaling_factor
