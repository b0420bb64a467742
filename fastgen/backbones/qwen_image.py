"""Qwen-Image: flow matching, an MMDiT on 2 x 2 patches, prompts encoded by Qwen2.5-VL, the latents of a video VAE.

Guidance needs two network calls (`true_cfg_scale` of the stock pipeline) and keeps the norm of each token's velocity
(`QwenImageDenoiser.guide`). Prompts are padded to one length, and a mask hides the padding from the network."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.flow_image import FlowDenoiser, FlowImage, FlowImageConfig, from_tokens, to_tokens
from fastgen.batch import Conditioning
from fastgen.denoiser import Inputs
from fastgen.schedule import PredictionType

STOCK_GUIDANCE = 4.0  # QwenImagePipeline's default true_cfg_scale


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class QwenImageConfig(FlowImageConfig):
    """max_sequence_length: number of text tokens, by default the stock pipeline's 512. Prompts are padded or cut to
    it, so a smaller number saves time where all are short."""

    name: Literal["qwen_image"] = "qwen_image"
    max_sequence_length: int = Field(default=512, ge=1, le=1024)

    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)

    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "QwenImage":
        return QwenImage(self, device, dtype, roles)


class QwenImageDenoiser(FlowDenoiser):
    """An unmodified QwenImageTransformer2DModel behind the contract."""

    def __init__(self, network: Any):
        super().__init__(network, network.inner_dim, time_scale=1)  # the network multiplies by 1000 itself

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        dtype, images = self.weight_dtype, self.images(x_t, cond)
        tokens = self.network(
            hidden_states=torch.cat([to_tokens(image).to(dtype) for image in images], dim=1),
            timestep=self.timestep(t, inputs),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_hidden_states_mask=cond["prompt_mask"],
            img_shapes=[[(1, image.shape[-2] // 2, image.shape[-1] // 2) for image in images]] * len(x_t),
            return_dict=False,
        )[0]
        return from_tokens(tokens[:, : x_t.shape[-2] * x_t.shape[-1] // 4], x_t.shape)

    def images(self, x_t: Tensor, cond: Conditioning) -> list[Tensor]:
        """The latents that the network sees as image tokens, of which it predicts the velocity of the first."""
        return [x_t]

    def guide(
        self, on: Tensor, off: Tensor, scale: Tensor, x_t: Tensor, t: Tensor, predict: PredictionType = "sample"
    ) -> Tensor:
        """The mixed velocity, with the norm that the conditional one has in each token of 2 x 2 latents.

            v = off + scale (on - off),   result = v |on| / |v|                (diffusers' QwenImagePipeline)

        For x0 predictions the rule is the same with x_t - x0, which is t times the velocity. Raises ValueError for
        other types of predictions."""
        if predict not in ("sample", "flow_prediction"):
            raise ValueError(f"Qwen-Image is guided as sample or flow_prediction, not as {predict}")
        origin = x_t if predict == "sample" else torch.zeros_like(x_t)
        mixed = to_tokens(super().guide(on, off, scale, x_t, t, predict) - origin)
        wanted = to_tokens(on - origin).norm(dim=-1, keepdim=True)
        norm = mixed.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(mixed.dtype).tiny)  # at t = 0 both are zero
        return origin + from_tokens(mixed * (wanted / norm), x_t.shape)

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time_text_embed

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.time_text_embed = module


class QwenImage(FlowImage):
    """The backbone of recipes with `backbone: {name: qwen_image, path: ...}`."""

    config: QwenImageConfig
    network_class = "QwenImageTransformer2DModel"
    vae_class = "AutoencoderKLQwenImage"

    def wrap(self, network: Any) -> QwenImageDenoiser:
        return QwenImageDenoiser(network)

    @property
    def call(self) -> str:  # type: ignore[override]
        size = f"height={self.image_size}, width={self.image_size}, true_cfg_scale=1"
        return super().call.replace(
            "guidance_scale=1", f"{size}, max_sequence_length={self.config.max_sequence_length}"
        )

    def scale_with(self, said: Mapping[str, float]) -> float:
        """true_cfg_scale, which acts in a stock call that also has a negative prompt."""
        return said.get("true_cfg_scale", STOCK_GUIDANCE)

    # --- images: videos of one frame for the VAE

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** len(self.vae_config["temperal_downsample"])

    @property
    def latent_channels(self) -> int:
        return self.vae_config["z_dim"]

    def latent_moments(self) -> tuple[Tensor, Tensor]:
        values = self.vae.config.latents_mean, self.vae.config.latents_std
        mean, std = (torch.tensor(v, device=self.device).view(-1, 1, 1).to(self.dtype) for v in values)
        return mean, std

    def vae_encode(self, pixels: Tensor) -> Tensor:
        return super().vae_encode(pixels[:, :, None])[:, :, 0]

    def vae_decode(self, z: Tensor) -> Tensor:
        return super().vae_decode(z[:, :, None])[:, :, 0]

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """prompt_embeds [B, L, D], zero where the mask prompt_mask [B, L] is false."""
        length = self.config.max_sequence_length
        embeds, mask = self.text_pipeline.encode_prompt(prompts, self.device, max_sequence_length=length)
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        end = (0, length - embeds.shape[1])
        return Conditioning({"prompt_embeds": F.pad(embeds, (0, 0, *end)), "prompt_mask": F.pad(mask.bool(), end)})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.config.max_sequence_length
        return {"prompt_embeds": (length, self.network_config["joint_attention_dim"]), "prompt_mask": (length,)}
