"""LTX-Video: flow matching, a transformer on tokens of one latent each (32 x 32 pixels of 8 frames), T5 with a mask.

Positions are told in seconds and pixels, so that the network knows the frame rate (`fps`). A VAE that is told a
timestep (0.9.5 and later) decodes at level 0 without noise, as the stock call does by default."""

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.flow_image import FlowDenoiser
from fastgen.backbones.flow_levels import FlowLevels, FlowLevelsConfig
from fastgen.backbones.folder import read_json
from fastgen.backbones.video import Video, VideoConfig
from fastgen.batch import Conditioning
from fastgen.denoiser import Inputs
from fastgen.modules.inputs import FlatInputs
from fastgen.registry import MOST_STEPS, MOST_WIDTH

STOCK_LENGTH = 128  # LTXPipeline's default max_sequence_length


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LTXConfig(VideoConfig, FlowLevelsConfig):
    """height, width: multiples of 32. num_frames: 8 k + 1. fps: the network is told it. The defaults are those of the
    stock pipeline. max_sequence_length: number of T5 tokens."""

    name: Literal["ltx"] = "ltx"
    height: int = Field(default=512, ge=16, le=MOST_WIDTH)
    width: int = Field(default=704, ge=16, le=MOST_WIDTH)
    num_frames: int = Field(default=161, ge=1, le=MOST_STEPS)
    fps: int = Field(default=25, ge=1, le=MOST_STEPS)
    max_sequence_length: int = Field(default=STOCK_LENGTH, ge=1, le=512)

    pipelines: ClassVar[tuple[str, ...]] = ("LTXPipeline",)

    def check(self) -> None:
        """Also raises ValueError for a VAE that draws random numbers."""
        super().check()
        folder = self.local_folder()
        if folder is not None and any(read_json(folder / "vae/config.json").get("decoder_inject_noise", ())):
            raise ValueError(
                "path: its VAE adds noise while it decodes (decoder_inject_noise), as that of LTX-Video 0.9.1 does, "
                "so that a video is not the same twice; use LTX-Video 0.9.0, or 0.9.5 and later"
            )

    def build(self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES) -> "LTX":
        return LTX(self, device, dtype, roles)


class LTXDenoiser(FlowDenoiser):
    """An unmodified LTXVideoTransformer3DModel behind the contract, x_t [B, F, C, H, W]. scale: the seconds of a
    latent frame, and its height and width in pixels."""

    extra_inputs = FlatInputs

    def __init__(self, network: Any, scale: tuple[float, int, int]):
        super().__init__(network, network.config.num_attention_heads * network.config.attention_head_dim)
        self.scale = scale

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        frames, _, height, width = x_t.shape[1:]
        tokens = self.network(
            hidden_states=x_t.movedim(2, -1).flatten(1, 3).to(self.weight_dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(self.weight_dtype),
            timestep=self.timestep(t, inputs),
            encoder_attention_mask=cond["mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=self.scale,
            return_dict=False,
        )[0]
        return tokens.unflatten(1, (frames, height, width)).movedim(-1, 2)

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time_embed.emb

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.time_embed.emb = module


class LTX(Video, FlowLevels):
    """The backbone of recipes with `backbone: {name: ltx, path: ...}`."""

    config: LTXConfig
    network_class = "LTXVideoTransformer3DModel"
    width_keys = ("cross_attention_dim",)
    vae_class = "AutoencoderKLLTXVideo"

    def wrap(self, network: Any) -> LTXDenoiser:
        side = self.pixels_per_latent
        return LTXDenoiser(network, (self.frames_per_latent / self.config.fps, side, side))

    @property
    def call(self) -> str:  # type: ignore[override]
        length = self.config.max_sequence_length
        more = "" if length == STOCK_LENGTH else f" max_sequence_length={length},"
        return f"""from diffusers.utils import export_to_video

torch.manual_seed(0)  # the scheduler draws from the global generator, not from `generator=`
video = pipeline(
    "a prompt", {self.call_sizes}, frame_rate={self.config.fps},{more}
    num_inference_steps={{num_steps}}, guidance_scale=1,
).frames[0]
export_to_video(video, "video.mp4", fps={self.config.fps})"""

    # --- sizes

    @property
    def scaling(self) -> int:
        """The factor by which the VAE's blocks shrink each axis."""
        return 2 ** sum(self.vae_config.get("spatio_temporal_scaling", (True, True, True, False)))

    @property
    def frames_per_latent(self) -> int:
        config = self.vae_config
        return config.get("temporal_compression_ratio") or config.get("patch_size_t", 1) * self.scaling

    @property
    def pixels_per_latent(self) -> int:
        config = self.vae_config
        return config.get("spatial_compression_ratio") or config.get("patch_size", 4) * self.scaling

    @property
    def patch_size(self) -> int:
        """Raises ValueError for a network whose tokens are of several latents: none was published."""
        sizes = [self.network_config.get(key, 1) for key in ("patch_size", "patch_size_t")]
        if sizes != [1, 1]:
            raise ValueError(f"path: its transformer has patch_size and patch_size_t {sizes}; those of LTX are 1")
        return 1

    @property
    def latent_channels(self) -> int:
        return self.vae_config.get("latent_channels", 128)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.latent_shape) // self.latent_channels

    # --- frames

    def latent_moments(self) -> tuple[Tensor, Tensor]:
        """Each [C, 1, 1], stored with the weights of the VAE."""
        mean, std = self.vae.latents_mean[:, None, None], self.vae.latents_std[:, None, None]
        return mean, std / self.vae.config.scaling_factor

    def vae_decode(self, z: Tensor) -> Tensor:
        """One video at a time, which the VAE itself does only if it is told no timestep."""
        told = z.new_zeros(1) if self.vae.config.timestep_conditioning else None
        return torch.cat([self.vae.decode(video, told, return_dict=False)[0] for video in z.split(1)])

    # --- prompts

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """prompt_embeds [B, L, D], and mask [B, L], 1 where there is a token."""
        embeds, mask, _, _ = self.text_pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
            device=self.device,
        )
        return Conditioning({"prompt_embeds": embeds, "mask": mask.to(embeds.dtype)})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.config.max_sequence_length
        return {"prompt_embeds": (length, self.network_config.get("caption_channels", 4096)), "mask": (length,)}
