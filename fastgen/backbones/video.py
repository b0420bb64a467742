"""What families of videos share: the sizes of their latents [B, F, C, H, W], and the way through their VAE."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.backbones.base import DEFAULT_ROLES, Output, RoleOptions
from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.registry import MOST_STEPS, MOST_WIDTH
from fastgen.sampling.video import check_writer


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class VideoConfig(PipelineConfig):
    """height, width: in pixels. num_frames: one more than a multiple of the frames that make a latent one. fps: frames
    per second of written videos. The defaults are those of the family's stock pipeline."""

    height: int = Field(default=480, ge=16, le=MOST_WIDTH)
    width: int = Field(default=832, ge=16, le=MOST_WIDTH)
    num_frames: int = Field(default=81, ge=1, le=MOST_STEPS)
    fps: int = Field(default=16, ge=1, le=MOST_STEPS)

    output: ClassVar[Output] = "frames"

    def check(self) -> None:
        """Also raises ValueError for a size that does not fit, and if videos cannot be written."""
        super().check()
        check_writer()
        if self.local_folder() is not None:
            _ = self.build(torch.device("cpu"), torch.float32, 0).latent_shape


def latent_grid(config: Any, temporal: int, spatial: int, patch: Sequence[int]) -> tuple[int, int, int]:
    """The number of frames, the height and the width of the latents. temporal, spatial: frames and pixels that make
    one of the latents. patch: the latent rows and columns of one token of the network.

    Raises ValueError for sizes that cannot be divided into the VAE's latents and the network's patches."""
    if rest := (config.num_frames - 1) % temporal:
        below = config.num_frames - rest
        near = f"the nearest are {below} and {below + temporal}"
        raise ValueError(f"num_frames must be {temporal} k + 1, got {config.num_frames}; {near}")
    for side, pixels, unit in (
        ("height", config.height, spatial * patch[0]),
        ("width", config.width, spatial * patch[1]),
    ):
        if pixels % unit:
            raise ValueError(f"{side} must be a multiple of {unit}, got {pixels}")
    return (config.num_frames - 1) // temporal + 1, config.height // spatial, config.width // spatial


class Video(PipelineBackbone):
    """The part of a backbone that families of videos have in common. Inside diffusers latents are [B, C, F, H, W]."""

    config: Any
    image_size = None

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype, roles: RoleOptions = DEFAULT_ROLES):
        super().__init__(config, device, dtype, roles)
        self.fps = config.fps

    # --- sizes, from the configs of the VAE and the network, in which values that are defaults may be missing

    @property
    def frames_per_latent(self) -> int:
        return self.vae_config.get("temporal_compression_ratio", 4)

    @property
    def pixels_per_latent(self) -> int:
        return self.vae_config.get("spatial_compression_ratio", 8)

    @property
    def patch_size(self) -> int:
        """The side in latents of what the network takes as one token of a frame."""
        return self.network_config.get("patch_size", 2)

    @property
    def latent_channels(self) -> int:
        return self.vae_config.get("latent_channels", 16)

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        patch = (self.patch_size, self.patch_size)
        frames, height, width = latent_grid(self.config, self.frames_per_latent, self.pixels_per_latent, patch)
        return (frames, self.latent_channels, height, width)

    def time_width(self, config: Mapping[str, Any]) -> int:
        return config["num_attention_heads"] * config["attention_head_dim"]

    @property
    def call_sizes(self) -> str:
        """The sizes of videos, as arguments of the stock call."""
        return f"height={self.config.height}, width={self.config.width}, num_frames={self.config.num_frames}"

    # --- frames

    def set_up_vae(self, vae: Any) -> None:
        """One video at a time."""
        vae.enable_slicing()

    def latent_moments(self) -> tuple[Any, Any]:
        """Mean and standard deviation of the VAE's latents: numbers, or tensors that broadcast over
        [B, F, C, H, W]."""
        return 0.0, 1 / self.vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Frames [B, F, 3, H, W] in [0, 1] to the mode of the posterior, (z - mean) / std: [B, F', C, h, w], in the
        dtype of the VAE, also under autocast.

        Raises ValueError for images."""
        if pixels.dim() != 5:
            raise ValueError(
                f"a video model encodes frames [B, F, 3, H, W], got {list(pixels.shape)}; images do not fit"
            )
        with torch.autocast(self.device.type, enabled=False), self.vae_lock:
            video = pixels.to(self.device, self.vae.dtype).transpose(1, 2) * 2 - 1
            z = self.vae.encode(video).latent_dist.mode().transpose(1, 2)
        mean, std = self.latent_moments()
        return (z - mean) / std

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """In the dtype of the VAE, also under autocast."""
        with torch.autocast(self.device.type, enabled=False), self.vae_lock:
            mean, std = self.latent_moments()
            z = (latents.to(self.vae.dtype) * std + mean).transpose(1, 2)
            video = self.vae_decode(z).transpose(1, 2)
        video = video / 2 + 0.5
        return video.clamp(0, 1) if clamp else video

    def restart(self, latents: Tensor) -> Tensor:
        return self.encode(self.decode(latents)[:, -1:]).to(latents.dtype)

    def vae_decode(self, z: Tensor) -> Tensor:
        """The frames of the VAE's own latents, [B, 3, F, H, W], in [-1, 1] up to overshoot."""
        return self.vae.decode(z, return_dict=False)[0]
