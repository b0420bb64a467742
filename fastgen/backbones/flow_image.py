"""What flow-matching text-to-image families share: sizes and the VAE.

A family states what is its own: its pipeline and network classes, how prompts are encoded, how the network is called
(packing, position ids, masks), and which levels its pipeline asks the scheduler for."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import Output
from fastgen.backbones.flow_levels import FlowLevels, FlowLevelsConfig
from fastgen.backbones.pipeline_config import check_multiples
from fastgen.denoiser import Denoiser
from fastgen.registry import MOST_WIDTH
from fastgen.schedule import FlowSchedule, PredictionType, Schedule


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FlowImageConfig(FlowLevelsConfig):
    """resolution: side of an image in pixels; the default is that of the family's stock pipeline."""

    resolution: int | None = Field(default=None, ge=16, le=MOST_WIDTH)

    output: ClassVar[Output] = "pixels"


class FlowImage(FlowLevels):
    """The part of a backbone that families of flow-matching images have in common."""

    config: Any
    default_size: ClassVar[int] = 1024  # of the stock pipeline, in pixels

    # --- sizes

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def patch_size(self) -> int:
        """The side in latents of what the network takes as one token."""
        return 2

    @property
    def latent_channels(self) -> int:
        return self.vae_config["latent_channels"]

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Raises ValueError for a resolution that is no whole number of tokens."""
        size = self.config.resolution or self.default_size
        unit = self.pixels_per_latent * self.patch_size
        if size % unit:
            raise ValueError(f"backbone.resolution must be a multiple of {unit}, got {size}")
        return self.latent_shape_of((size, size))

    def latent_shape_of(self, size: tuple[int, int]) -> tuple[int, ...]:
        check_multiples(size, self.pixels_per_latent * self.patch_size)
        return (self.latent_channels, *(side // self.pixels_per_latent for side in size))

    @property
    def image_size(self) -> int:  # type: ignore[override]
        return self.latent_shape[-1] * self.pixels_per_latent

    def time_width(self, config: Mapping[str, Any]) -> int:
        return config["num_attention_heads"] * config["attention_head_dim"]

    @property
    def num_tokens(self) -> int:
        return self.latent_shape[-2] * self.latent_shape[-1] // self.patch_size**2

    # --- images

    def latent_moments(self) -> tuple[Any, Any]:
        """Mean and standard deviation of the VAE's latents: numbers, or tensors that broadcast over [B, C, H, W]."""
        return self.vae.config.get("shift_factor") or 0.0, 1 / self.vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to the mode of the posterior, (z - mean) / std."""
        with self.vae_lock:
            z = self.vae_encode(pixels.to(self.device, self.dtype) * 2 - 1)
        mean, std = self.latent_moments()
        return (z - mean) / std

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        with self.vae_lock:
            mean, std = self.latent_moments()
            pixels = self.vae_decode(latents.to(self.dtype) * std + mean) / 2 + 0.5
        return pixels.clamp(0, 1) if clamp else pixels

    def vae_encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] to the mode of the VAE's posterior, [B, *latent_shape]."""
        return self.vae.encode(pixels).latent_dist.mode()

    def vae_decode(self, z: Tensor) -> Tensor:
        """The pixels of the VAE's own latents, [B, 3, H, W], in [-1, 1] up to overshoot."""
        return self.vae.decode(z, return_dict=False)[0]


class TransformerDenoiser(Denoiser):
    """An unmodified transformer of diffusers behind the contract, x_t [B, C, H, W]. Its features are the image tokens
    after the block at half depth, the one at three quarters, and the last."""

    network: Any

    def __init__(self, network: Any, feature_dim: int, schedule: Schedule, prediction_type: PredictionType):
        super().__init__(network, schedule, prediction_type)
        self.feature_dim = feature_dim

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks whose outputs contain the image tokens, from first to last."""
        return list(self.network.transformer_blocks)

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        count = len(self.blocks)
        return [self.blocks[i] for i in sorted({count // 2, 3 * count // 4, count - 1})]

    @property
    def shard_modules(self) -> Sequence[nn.Module]:
        return self.blocks


class FlowDenoiser(TransformerDenoiser):
    """One that predicts the velocity. time_scale: what the network is given at t = 1."""

    def __init__(self, network: Any, feature_dim: int, time_scale: int = 1000):
        super().__init__(network, feature_dim, FlowSchedule(time_scale), "flow_prediction")


def to_tokens(latents: Tensor) -> Tensor:
    """[B, C, H, W] to tokens of 2 x 2 latents, [B, H W / 4, 4 C], in the order of diffusers' _pack_latents."""
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, H/2, 2, W/2, 2]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_tokens(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Undoes `to_tokens`. shape: [..., H, W] of the latents."""
    height, width = shape[-2] // 2, shape[-1] // 2
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height, width))  # [B, H/2, W/2, C, 2, 2]
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def grid_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[height width, 3]: (0, row, column) of every token, for rotary embeddings."""
    ids = torch.zeros(height, width, 3, device=device, dtype=dtype)
    ids[..., 1] += torch.arange(height, device=device)[:, None]
    ids[..., 2] += torch.arange(width, device=device)
    return ids.flatten(0, 1)
