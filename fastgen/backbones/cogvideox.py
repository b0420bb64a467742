"""CogVideoX 2B and 5B: a discrete diffusion that predicts v and ends without signal, a transformer on video patches,
prompts encoded by T5.

The pipeline's own schedulers shift the noise and then rescale it, so that no signal is left at t = 1. The same table
of alphas is handed to stock DDIMScheduler and LCMScheduler as their betas. The published pipelines call their
scheduler at linspace's steps, or sample with a multi-step solver; the teacher is sampled by DDIM with trailing steps
and the same noise instead, as that of backbone sd."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.discrete import Discrete, DiscreteConfig
from fastgen.backbones.flow_image import TransformerDenoiser
from fastgen.backbones.pipeline import diffusers_class
from fastgen.backbones.video import Video, VideoConfig, latent_grid
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.inputs import UNetExtraInputs
from fastgen.pipelines.schedulers import table_noise
from fastgen.registry import MOST_STEPS, MOST_WIDTH
from fastgen.schedule import PredictionType, VPSchedule

STOCK_LENGTH = 226  # CogVideoXPipeline's default max_sequence_length


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CogVideoXConfig(VideoConfig, DiscreteConfig):
    """height, width, num_frames: the defaults are those that 2B and 5B were trained at, 8 frames a second. num_frames
    is 8 k + 1: the VAE decodes two latent frames at once, and one more at the beginning."""

    name: Literal["cogvideox"] = "cogvideox"
    width: int = Field(default=720, ge=16, le=MOST_WIDTH)
    num_frames: int = Field(default=49, ge=1, le=MOST_STEPS)
    fps: int = Field(default=8, ge=1, le=MOST_STEPS)

    pipelines: ClassVar[tuple[str, ...]] = ("CogVideoXPipeline",)
    prompt_keys: ClassVar[tuple[str, ...]] = ()

    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "CogVideoX":
        return CogVideoX(self, device, dtype, roles)


class CogVideoXDenoiser(TransformerDenoiser):
    """An unmodified CogVideoXTransformer3DModel behind the contract, x_t [B, F, C, H, W]."""

    extra_inputs = UNetExtraInputs  # its time embedding is that of a UNet

    def __init__(self, network: Any, schedule: VPSchedule, prediction_type: PredictionType):
        width = network.config.num_attention_heads * network.config.attention_head_dim
        super().__init__(network, width, schedule, prediction_type)

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        timestep, extended = self.timestep(t, inputs), self.is_extended
        rotary = self.network.config.use_rotary_positional_embeddings
        return self.network(
            hidden_states=x_t.to(self.weight_dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(self.weight_dtype),
            timestep=timestep[:, 0] if extended else timestep,
            timestep_cond=timestep[:, 1:] if extended else None,
            image_rotary_emb=rotary_positions(self.network.config, x_t) if rotary else None,
            return_dict=False,
        )[0]

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time_embedding

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.time_embedding = module

    def feature_tokens(self, output: Tensor | tuple[Tensor, ...]) -> Tensor:
        return output[0]  # a block returns the tokens of the video, then those of the text


def rotary_positions(config: Any, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for the tokens of x_t [B, F, C, H, W], as the stock pipeline makes them: of CogVideoX 1.0 by
    resizing the grid that the network was trained at, of 1.5 (`patch_size_t`) without."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    side, deep = config.patch_size, config.patch_size_t
    grid = (x_t.shape[-2] // side, x_t.shape[-1] // side)
    trained = (config.sample_height // side, config.sample_width // side)
    common = {"embed_dim": config.attention_head_dim, "grid_size": grid, "device": x_t.device}
    if deep is None:
        crop = get_resize_crop_region_for_grid(grid, trained[1], trained[0])
        return get_3d_rotary_pos_embed(crops_coords=crop, temporal_size=x_t.shape[1], **common)
    frames = -(-x_t.shape[1] // deep)
    return get_3d_rotary_pos_embed(
        crops_coords=None, temporal_size=frames, grid_type="slice", max_size=trained, **common
    )


class CogVideoX(Video, Discrete):
    """The backbone of recipes with `backbone: {name: cogvideox, path: ...}`."""

    config: CogVideoXConfig
    network_class = "CogVideoXTransformer3DModel"
    vae_class = "AutoencoderKLCogVideoX"

    def check(self) -> None:
        """Also raises ValueError for a network that is given an image, or told of one."""
        config = self.network_config
        if config.get("in_channels", 16) != self.latent_channels or config.get("ofs_embed_dim"):
            raise ValueError(
                f"path: its transformer has in_channels {config.get('in_channels')}, and the VAE makes "
                f"{self.latent_channels}: it is given an image, and backbone cogvideox has text alone"
            )
        if config.get("patch_size_t") not in (None, 2):
            raise ValueError(
                f"path: its transformer has patch_size_t {config['patch_size_t']}, which must be 2 or none"
            )
        super().check()

    def wrap(self, network: Any) -> Denoiser:
        self.check()
        return CogVideoXDenoiser(network, self.schedule, self.scheduler().config.prediction_type)

    def scheduler(self) -> Any:
        """The pipeline's own scheduler; one of CogVideoX's own classes as a DDIMScheduler with the same noise."""
        own = super().scheduler()
        if not type(own).__name__.startswith("CogVideoX"):
            return own
        spacing = own.config.timestep_spacing
        return diffusers_class("DDIMScheduler")(
            **table_noise(own.alphas_cumprod, own.config.prediction_type),
            clip_sample=own.config.clip_sample,
            set_alpha_to_one=own.config.set_alpha_to_one,
            steps_offset=own.config.steps_offset,
            timestep_spacing="trailing" if spacing == "linspace" else spacing,
        )

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """An odd number of frames, and `padding` before them."""
        pair, patch = 2 * self.frames_per_latent, (self.patch_size, self.patch_size)
        pairs, height, width = latent_grid(self.config, pair, self.pixels_per_latent, patch)
        return (2 * pairs - 1 + self.padding, self.latent_channels, height, width)

    @property
    def padding(self) -> int:
        """Latent frames before the first, which are made and not shown: one for CogVideoX 1.5, whose network takes two
        frames as one token."""
        return 1 if self.network_config.get("patch_size_t") == 2 else 0

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The padding is the first frame again, as in the authors' training code (THUDM/CogVideo, finetune)."""
        z = super().encode(pixels)
        return torch.cat([z[:, : self.padding], z], dim=1)

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        return super().decode(latents[:, self.padding :], clamp)

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    def head_settings(self, heads: int) -> dict[str, Any]:
        """A learned table of positions is no parameter, and would be made anew for a narrower network."""
        if self.network_config.get("use_learned_positional_embeddings"):
            raise ValueError("student_heads: the positions of this network are learned, and not cut; leave it out")
        return super().head_settings(heads)

    def time_width(self, config: Mapping[str, Any]) -> int:
        return config.get("time_embed_dim", 512)

    @property
    def text_length(self) -> int:
        """The number of T5 tokens, which the network's positions count with."""
        return self.network_config.get("max_text_seq_length", STOCK_LENGTH)

    @property
    def call(self) -> str:  # type: ignore[override]
        length = "" if self.text_length == STOCK_LENGTH else f"max_sequence_length={self.text_length}, "
        return f"""from diffusers.utils import export_to_video

generator = torch.manual_seed(0)
options = dict(num_inference_steps={{num_steps}}, guidance_scale=1, {length}generator=generator{{eta}})
video = pipeline("a prompt", {self.call_sizes}, **options).frames[0]
export_to_video(video, "video.mp4", fps={self.config.fps})"""

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """prompt_embeds [B, L, D], whose padding the network sees."""
        embeds, _ = self.text_pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
            device=self.device,
        )
        return Conditioning({"prompt_embeds": embeds})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_length, self.network_config.get("text_embed_dim", 4096))}
