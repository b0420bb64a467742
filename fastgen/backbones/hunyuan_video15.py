"""HunyuanVideo 1.5, text to video: flow matching, an MMDiT on video tokens, and two text encoders, each with a mask.

Qwen2.5-VL reads the prompt inside the stock pipeline's instruction, and ByT5 reads what a prompt has in quotation
marks, the glyphs. The network also takes the latents of a given image and what an image encoder says of it; a text has
neither, and gets zeros. The stock pipeline is guided by a component of its own, the guider, which an export stores at
scale 1."""

from collections.abc import Mapping
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
from fastgen.backbones.pipeline import diffusers_class
from fastgen.backbones.video import Video, VideoConfig
from fastgen.batch import Conditioning, known_mask
from fastgen.denoiser import Denoiser, Inputs
from fastgen.registry import MOST_STEPS, MOST_WIDTH

STOCK_LENGTH, GLYPHS = 1000, 256  # the stock pipeline's numbers of tokens of the two encoders
PLAIN_GUIDER = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class HunyuanVideo15Config(VideoConfig, FlowLevelsConfig):
    """height, width, num_frames: 4 k + 1; the defaults are those of the 480p checkpoint in the stock call.
    max_sequence_length: number of Qwen tokens after the instruction, by default the stock pipeline's 1000. Padding is
    hidden from the network, so a smaller number saves memory where all prompts are short."""

    name: Literal["hunyuan_video15"] = "hunyuan_video15"
    width: int = Field(default=848, ge=16, le=MOST_WIDTH)
    num_frames: int = Field(default=121, ge=1, le=MOST_STEPS)
    fps: int = Field(default=24, ge=1, le=MOST_STEPS)
    max_sequence_length: int = Field(default=STOCK_LENGTH, ge=1, le=STOCK_LENGTH)

    pipelines: ClassVar[tuple[str, ...]] = ("HunyuanVideo15Pipeline",)

    def check(self) -> None:
        """Also raises ValueError for a network without the inputs of an image, and for a guider of another rule."""
        super().check()
        folder = self.local_folder()
        if folder is not None:
            check_network(read_json(folder / "transformer/config.json"), read_json(folder / "vae/config.json"))
            check_guider(read_json(folder / "guider/guider_config.json"))

    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "HunyuanVideo15":
        return HunyuanVideo15(self, device, dtype, roles)


def check_network(network: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Raises ValueError for a network that is not given latents, those of an image, and a mask."""
    channels, wanted = network.get("in_channels", 65), 2 * vae.get("latent_channels", 32) + 1
    if channels != wanted:
        raise ValueError(
            f"path: its transformer has in_channels {channels}, and HunyuanVideo15Pipeline gives {wanted}"
        )


def check_guider(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a guider whose rule is not `uncond + scale (cond - uncond)` at every step."""
    if other := sorted(key for key, value in PLAIN_GUIDER.items() if config.get(key, value) != value):
        raise ValueError(
            f"path: guider/guider_config.json sets {', '.join(f'{key}: {config[key]}' for key in other)}, and fastgen "
            f"guides at every step by uncond + scale (cond - uncond); set {PLAIN_GUIDER}"
        )


class HunyuanVideo15Denoiser(FlowDenoiser):
    """An unmodified HunyuanVideo15Transformer3DModel behind the contract, x_t [B, F, C, H, W].

    The stock pipeline gives it 729 tokens of an image that are all masked; here there are none of them."""

    def __init__(self, network: Any):
        super().__init__(network, network.config.num_attention_heads * network.config.attention_head_dim)

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        x = x_t.transpose(1, 2).to(self.weight_dtype)
        return self.network(
            hidden_states=torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[:, :1])], dim=1),
            timestep=self.timestep(t, inputs).to(x.dtype),  # in which the time embedding is computed
            encoder_hidden_states=cond["prompt_embeds"].to(x.dtype),
            encoder_attention_mask=known_mask(cond["prompt_mask"]),
            encoder_hidden_states_2=cond["glyph_embeds"].to(x.dtype),
            encoder_attention_mask_2=known_mask(cond["glyph_mask"]),
            image_embeds=torch.zeros(len(x), 0, self.network.config.image_embed_dim, device=x.device, dtype=x.dtype),
            return_dict=False,
        )[0].transpose(1, 2)

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time_embed

    def set_time_embedding(self, module: nn.Module) -> None:
        """The refiner of the text is given the timestep too; it gets it without the added inputs."""
        self.network.time_embed = module
        self.network.context_embedder.register_forward_pre_hook(without_inputs)

    def feature_tokens(self, output: Tensor | tuple[Tensor, ...]) -> Tensor:
        return output[0]  # a block returns the tokens of the video, then those of the text


def without_inputs(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The refiner's arguments, text, timestep [B, 1 + n] and mask, with the timestep [B]."""
    text, timestep, *rest = arguments
    return (text, timestep[:, 0], *rest)


class HunyuanVideo15(Video, FlowLevels):
    """The backbone of recipes with `backbone: {name: hunyuan_video15, path: ...}`."""

    config: HunyuanVideo15Config
    network_class = "HunyuanVideo15Transformer3DModel"
    vae_class = "AutoencoderKLHunyuanVideo15"
    stores_adapters = False  # the stock pipeline loads none

    def wrap(self, network: Any) -> HunyuanVideo15Denoiser:
        check_network(network.config, self.vae_config)
        return HunyuanVideo15Denoiser(network)

    @property
    def needed_classes(self) -> dict[str, str]:
        return super().needed_classes | {"guider": "ClassifierFreeGuidance"}

    @property
    def call(self) -> str:  # type: ignore[override]
        length = self.config.max_sequence_length
        shorter = "" if length == STOCK_LENGTH else f"\npipeline.tokenizer_max_length = {length}"
        return f"""from diffusers.utils import export_to_video

torch.manual_seed(0)  # the scheduler draws from the global generator, not from `generator=`
pipeline.vae.enable_tiling(){shorter}
video = pipeline("a prompt", {self.call_sizes}, num_inference_steps={{num_steps}}).frames[0]
export_to_video(video, "video.mp4", fps={self.config.fps})"""

    def set_up_vae(self, vae: Any) -> None:
        """In tiles of 256 x 256 pixels, as diffusers' documentation has it: at 480p, the mask of the VAE's attention
        would have 49,290 rows and columns."""
        super().set_up_vae(vae)
        vae.enable_tiling()

    def scale_with(self, said: Mapping[str, float]) -> float:
        """The guider's, which the call does not change."""
        return self.guider.guidance_scale

    @cached_property
    def guider(self) -> Any:
        """The pipeline's own."""
        cls, local = diffusers_class("ClassifierFreeGuidance"), self.options["local_files_only"]
        return cls.from_pretrained(self.source, subfolder="guider", local_files_only=local)

    @property
    def pixels_per_latent(self) -> int:
        return self.vae_config.get("spatial_compression_ratio", 16)

    @property
    def patch_size(self) -> int:
        return self.network_config.get("patch_size", 1)

    @property
    def num_tokens(self) -> int:
        frames, _, height, width = self.latent_shape
        return frames * height * width // self.patch_size**2

    def student_components(self, student: Denoiser) -> dict[str, Any]:
        """The student's guider calls it once a step."""
        return super().student_components(student) | {"guider": diffusers_class("ClassifierFreeGuidance")(1.0)}

    # --- prompts

    def constructor_parts(self) -> dict[str, Any]:
        """It reads sizes of the VAE."""
        from accelerate import init_empty_weights

        with init_empty_weights():
            return {"vae": diffusers_class(self.vae_class).from_config(self.vae_config)}

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """prompt_embeds [B, L, D] with prompt_mask [B, L], and glyph_embeds [B, 256, E] with glyph_mask [B, 256]."""
        pipeline = self.text_pipeline
        pipeline.tokenizer_max_length = self.config.max_sequence_length
        embeds, mask, glyphs, glyph_mask = pipeline.encode_prompt(prompts, self.device, batch_size=len(prompts))
        found = {"prompt_embeds": embeds, "prompt_mask": mask.bool()}
        return Conditioning(found | {"glyph_embeds": glyphs, "glyph_mask": glyph_mask.bool()})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        length, config = self.config.max_sequence_length, self.network_config
        return {
            "prompt_embeds": (length, config.get("text_embed_dim", 3584)),
            "prompt_mask": (length,),
            "glyph_embeds": (GLYPHS, config.get("text_embed_2_dim", 1472)),
            "glyph_mask": (GLYPHS,),
        }
