"""LTX-2: flow matching on a video and its sound together, a Gemma 3 text encoder with connectors, and two VAEs.

The state is one tensor of tokens [B, N + A, C]: the N tokens of the video, each one latent (32 x 32 pixels of 8
frames), and after them the A tokens of the sound, each one latent moment with all its mel bins. One network denoises
both at one level, and their positions are told in seconds. Samples and rewards see the pictures; the sound is what
`sound_of` and an exported pipeline make of the same state.

Guidance is `uncond + scale (cond - uncond)` with one scale for both. The stock pipeline can add two more kinds, by
skipped attention and by networks that do not hear each other; fastgen has neither."""

import math
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.flow_image import FlowDenoiser
from fastgen.backbones.flow_levels import FlowLevels, FlowLevelsConfig
from fastgen.backbones.folder import read_json
from fastgen.backbones.loading import component_class, read_component
from fastgen.backbones.video import Video, VideoConfig, latent_grid
from fastgen.batch import Conditioning
from fastgen.denoiser import Inputs
from fastgen.registry import MOST_STEPS, MOST_WIDTH
from fastgen.rollout import RolloutPolicy

STOCK_LENGTH = 1024  # LTX2Pipeline's default max_sequence_length
SOUND_RATIO = 4  # moments and mel bins that make one of the sound's latents, in every AutoencoderKLLTX2Audio
PLAIN = "audio_guidance_scale=1, stg_scale=0, audio_stg_scale=0, modality_scale=1, audio_modality_scale=1"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LTX2Config(VideoConfig, FlowLevelsConfig):
    """height, width: multiples of 32. num_frames: 8 k + 1. fps: the network is told it, and it sets how long the sound
    is. The defaults are those of the stock pipeline. max_sequence_length: number of Gemma tokens, a multiple of the
    connectors' registers (128)."""

    name: Literal["ltx2"] = "ltx2"
    height: int = Field(default=512, ge=16, le=MOST_WIDTH)
    width: int = Field(default=768, ge=16, le=MOST_WIDTH)
    num_frames: int = Field(default=121, ge=1, le=MOST_STEPS)
    fps: int = Field(default=24, ge=1, le=MOST_STEPS)
    max_sequence_length: int = Field(default=STOCK_LENGTH, ge=1, le=STOCK_LENGTH)

    pipelines: ClassVar[tuple[str, ...]] = ("LTX2Pipeline",)
    takes_added_inputs: ClassVar[bool] = False  # they would reach the video's time embedder, and not the sound's
    encodes_data: ClassVar[bool] = False  # data have no sound

    def check(self) -> None:
        """Also raises ValueError for VAEs and networks whose tokens do not fit each other, and for a number of text
        tokens that the connectors do not take."""
        super().check()
        folder = self.local_folder()
        if folder is None:
            return
        if any(flags(read_json(folder / "vae/config.json").get("decoder_inject_noise", False))):
            raise ValueError("path: its VAE adds noise while it decodes (decoder_inject_noise)")
        connectors = read_json(folder / "connectors/config.json")
        for part in ("video", "audio"):
            registers = connectors.get(f"{part}_connector_num_learnable_registers", 128)
            if registers and self.max_sequence_length % registers:
                raise ValueError(
                    f"max_sequence_length must be a multiple of {registers}, got {self.max_sequence_length}"
                )

    def build(self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES) -> "LTX2":
        return LTX2(self, device, dtype, roles)


def flags(value: bool | list[bool]) -> list[bool]:
    return value if isinstance(value, list) else [value]


class LTX2Denoiser(FlowDenoiser):
    """An unmodified LTX2VideoTransformer3DModel behind the contract, x_t [B, N + A, C]. grid: frames, height and width
    of the video's N latents. sound: A. fps: frames per second.

    Features are the video's tokens."""

    def __init__(self, network: Any, grid: tuple[int, int, int], sound: int, fps: int):
        super().__init__(network, network.config.num_attention_heads * network.config.attention_head_dim)
        self.grid, self.sound, self.fps = grid, sound, fps

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        frames, height, width = self.grid
        video, sound = x_t.to(self.weight_dtype).tensor_split([math.prod(self.grid)], dim=1)
        timestep = self.timestep(t, inputs)
        outputs = self.network(
            hidden_states=video,
            audio_hidden_states=sound,
            encoder_hidden_states=cond["prompt_embeds"].to(video.dtype),
            audio_encoder_hidden_states=cond["sound_embeds"].to(video.dtype),
            timestep=timestep,
            sigma=timestep,
            encoder_attention_mask=cond["mask"],
            audio_encoder_attention_mask=cond["mask"],
            num_frames=frames,
            height=height,
            width=width,
            fps=float(self.fps),
            audio_num_frames=self.sound,
            use_cross_timestep=True,  # as in the stock call; both parts have one level, so that it changes nothing
            return_dict=False,
        )
        return torch.cat(outputs, dim=1)

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time_embed.emb  # of the video; the sound has its own

    def feature_tokens(self, output: Tensor | tuple[Tensor, ...]) -> Tensor:
        return output[0]  # a block returns the tokens of the video, then those of the sound


class LTX2(Video, FlowLevels):
    """The backbone of recipes with `backbone: {name: ltx2, path: ...}`."""

    config: LTX2Config
    network_class = "LTX2VideoTransformer3DModel"
    head_keys = ()  # its second stream, of sound, has heads and a width of its own
    vae_class = "AutoencoderKLLTX2Video"

    def wrap(self, network: Any) -> LTX2Denoiser:
        return LTX2Denoiser(network, self.grid, self.num_moments, self.config.fps)

    @property
    def call(self) -> str:  # type: ignore[override]
        length = self.config.max_sequence_length
        more = "" if length == STOCK_LENGTH else f" max_sequence_length={length},"
        return f"""from diffusers.pipelines.ltx2.export_utils import encode_video

torch.manual_seed(0)  # the scheduler draws from the global generator, not from `generator=`
video, sound = pipeline(
    "a prompt", {self.call_sizes}, frame_rate={self.config.fps},{more}
    num_inference_steps={{num_steps}}, guidance_scale=1, {PLAIN},
    output_type="np", return_dict=False,
)
encode_video(
    video[0], fps={self.config.fps}, audio=sound[0].float().cpu(),
    audio_sample_rate=pipeline.vocoder.config.output_sampling_rate, output_path="video.mp4",
)"""

    def plain_call(self, policy: RolloutPolicy, adapter: bool) -> str:
        """The stock call also guides by skipped attention and by networks that do not hear each other."""
        return super().plain_call(policy, adapter).replace(" instead of 1.**", " instead of 1, and more guidance.**")

    @property
    def needed_classes(self) -> dict[str, str]:
        return super().needed_classes | {"audio_vae": "AutoencoderKLLTX2Audio", "connectors": "LTX2TextConnectors"}

    # --- sizes

    @property
    def halvings(self) -> int:
        """Of each axis by the VAE, if its config does not say by how much it shrinks them."""
        scaled = self.vae_config.get("spatio_temporal_scaling", True)
        return sum(scaled) if isinstance(scaled, list | tuple) else 4 * scaled

    @property
    def frames_per_latent(self) -> int:
        config = self.vae_config
        return config.get("temporal_compression_ratio") or config.get("patch_size_t", 1) * 2**self.halvings

    @property
    def pixels_per_latent(self) -> int:
        config = self.vae_config
        return config.get("spatial_compression_ratio") or config.get("patch_size", 4) * 2**self.halvings

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        """Frames, height and width of the video's latents. Raises ValueError for a network whose tokens are of several
        latents: none was published."""
        keys = ("patch_size", "patch_size_t", "audio_patch_size", "audio_patch_size_t")
        sizes = [self.network_config.get(key, 1) for key in keys]
        if sizes != [1, 1, 1, 1]:
            raise ValueError(f"path: its transformer has {', '.join(keys)} {sizes}; those of LTX-2 are 1")
        return latent_grid(self.config, self.frames_per_latent, self.pixels_per_latent, (1, 1))

    @cached_property
    def sound_config(self) -> dict[str, Any]:
        """config.json of the sound's VAE."""
        return self.component_config("AutoencoderKLLTX2Audio", "audio_vae")

    @property
    def num_moments(self) -> int:
        """The number of the sound's tokens."""
        config = self.sound_config
        rate = config.get("sample_rate", 16000) / config.get("mel_hop_length", 160) / float(SOUND_RATIO)
        return round(self.config.num_frames / self.config.fps * rate)

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """[N + A, C]. Raises ValueError if the tokens of video and sound have different widths."""
        config = self.sound_config
        widths = self.latent_channels, config.get("latent_channels", 8) * (config.get("mel_bins", 64) // SOUND_RATIO)
        taken = tuple(self.network_config.get(key, 128) for key in ("in_channels", "audio_in_channels"))
        if len({*widths, *taken}) > 1:
            raise ValueError(
                f"path: tokens of its video and sound VAEs have {widths} numbers and its transformer takes {taken}; "
                "fastgen needs all of one width, as those of LTX-2"
            )
        return (self.num_tokens + self.num_moments, widths[0])

    @property
    def latent_channels(self) -> int:
        return self.vae_config.get("latent_channels", 128)

    @property
    def num_tokens(self) -> int:
        """Those of the video alone set the shift, as in the stock pipeline."""
        return math.prod(self.grid)

    # --- frames and sound

    def latent_moments(self) -> tuple[Tensor, Tensor]:
        """Each [C, 1, 1], stored with the weights of the VAE."""
        mean, std = self.vae.latents_mean[:, None, None], self.vae.latents_std[:, None, None]
        return mean, std / self.vae.config.scaling_factor

    def encode(self, pixels: Tensor) -> Tensor:
        """Raises ValueError: there is no sound to go with them."""
        raise ValueError("LTX-2 denoises a video with its sound, and data have no sound; choose another objective")

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        video = latents[:, : self.num_tokens].unflatten(1, self.grid).movedim(-1, 2)
        return super().decode(video, clamp)

    def vae_decode(self, z: Tensor) -> Tensor:
        """One video at a time, at level 0 for a VAE that is told a timestep."""
        told = z.new_zeros(1) if self.vae.config.timestep_conditioning else None
        return torch.cat([self.vae.decode(video, told, return_dict=False)[0] for video in z.split(1)])

    @cached_property
    def sound_parts(self) -> tuple[Any, Any]:
        """The sound's VAE and vocoder."""
        parts = [
            read_component(component_class(*self.components[name]), self.source, name, self.options)
            for name in ("audio_vae", "vocoder")
        ]
        vae, vocoder = (part.to(self.device).requires_grad_(False).eval() for part in parts)
        return vae, vocoder

    @torch.no_grad()
    def sound_of(self, latents: Tensor) -> Tensor | None:
        """Waveforms [B, channels, samples] in [-1, 1]; None for a folder without a vocoder."""
        if (self.components.get("vocoder") or [None])[0] is None:
            return None
        vae, vocoder = self.sound_parts
        tokens = latents[:, self.num_tokens :].to(vae.dtype) * vae.latents_std + vae.latents_mean
        spectrogram = tokens.unflatten(2, (vae.config.latent_channels, -1)).transpose(1, 2)
        return vocoder(vae.decode(spectrogram, return_dict=False)[0])

    @property
    def sound_rate(self) -> int:
        return self.sound_parts[1].config.output_sampling_rate

    # --- prompts

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """prompt_embeds and sound_embeds [B, L, D], which the connectors make of Gemma's hidden states, and mask
        [B, L], 1 where there is a token or a register."""
        pipeline = self.text_pipeline
        states, tokens, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
            device=self.device,
        )
        embeds, sound, mask = pipeline.connectors(states, tokens, padding_side=pipeline.tokenizer.padding_side)
        return Conditioning({"prompt_embeds": embeds, "sound_embeds": sound, "mask": mask.to(embeds.dtype)})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        length, config = self.config.max_sequence_length, self.component_config("LTX2TextConnectors", "connectors")
        widths = [
            config.get(f"{part}_connector_num_attention_heads", 30)
            * config.get(f"{part}_connector_attention_head_dim", 128)
            for part in ("video", "audio")
        ]
        return {"prompt_embeds": (length, widths[0]), "sound_embeds": (length, widths[1]), "mask": (length,)}
