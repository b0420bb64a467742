"""Qwen-Image-Edit: Qwen-Image with the latents of a given image behind its own tokens, and prompts that Qwen2.5-VL
encodes together with this image.

The image is a square of 1024 x 1024 pixels, the area to which the stock pipeline resizes it, whatever the resolution
of the result. The negative prompt is encoded with the image too, as in the stock pipeline."""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.given import to_picture
from fastgen.backbones.qwen_image import QwenImage, QwenImageConfig, QwenImageDenoiser
from fastgen.batch import Conditioning

SIDE = 1024  # of the given image in pixels: QwenImageEditPipeline resizes it to an area of 1024 x 1024


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class QwenImageEditConfig(QwenImageConfig):
    """max_sequence_length: number of tokens of a prompt together with its image, which is 1,369 of them. Prompts are
    padded or cut to it; the stock pipeline takes any length. The default is ours."""

    name: Literal["qwen_image_edit"] = "qwen_image_edit"  # type: ignore[assignment]
    max_sequence_length: int = Field(default=1664, ge=1, le=8192)

    takes_image: ClassVar[bool] = True
    encodes_together: ClassVar[bool] = True
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImageEditPipeline",)

    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "QwenImageEdit":
        return QwenImageEdit(self, device, dtype, roles)


class QwenImageEditDenoiser(QwenImageDenoiser):
    """A QwenImageTransformer2DModel that also sees cond["image_latents"] [B, C, H', W']."""

    def images(self, x_t: Tensor, cond: Conditioning) -> list[Tensor]:
        return [x_t, cond["image_latents"]]


class QwenImageEdit(QwenImage):
    """The backbone of recipes with `backbone: {name: qwen_image_edit, path: ...}`."""

    config: QwenImageEditConfig

    def wrap(self, network: Any) -> QwenImageEditDenoiser:
        return QwenImageEditDenoiser(network)

    @property
    def call(self) -> str:  # type: ignore[override]
        return f"""from diffusers.utils import load_image

torch.manual_seed(0)  # the scheduler draws from the global generator, not from `generator=`
image = pipeline(
    load_image("picture.png"), "a prompt", height={self.image_size}, width={self.image_size},
    num_inference_steps={{num_steps}}, true_cfg_scale=1,
).images[0]"""

    @property
    def picture_size(self) -> tuple[int, int]:
        return SIDE, SIDE

    def encode_image(self, pixels: Tensor) -> Conditioning:
        """image_latents [1, C, H', W'], and the image itself, with which prompts are encoded."""
        picture = (pixels[None] * 255).round().to(torch.uint8)
        return Conditioning({"image_latents": self.encode(pixels[None]), "image_pixels": picture})

    def encode_given(self, prompts: Any, images: Conditioning) -> Conditioning:
        """prompt_embeds [B, L, D], zero where prompt_mask [B, L] is false, and image_latents. Each prompt is encoded
        alone."""
        pairs = zip(prompts, images["image_pixels"], strict=True)
        rows = Conditioning.cat([self.encode_with(prompt, pixels) for prompt, pixels in pairs])
        return Conditioning({**rows, "image_latents": images["image_latents"]})

    @torch.no_grad()
    def encode_with(self, prompt: str, pixels: Tensor) -> Conditioning:
        """One row, by the stock pipeline's own encoding."""
        length = self.config.max_sequence_length
        with self.vae_lock, self.encoding():  # batches are made in another thread
            embeds, _ = self.text_pipeline.encode_prompt([prompt], to_picture(pixels), self.device)
        embeds = embeds[:, :length]
        mask = torch.arange(length, device=embeds.device)[None] < embeds.shape[1]
        return Conditioning({"prompt_embeds": F.pad(embeds, (0, 0, 0, length - embeds.shape[1])), "prompt_mask": mask})

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        raise ValueError("backbone qwen_image_edit encodes a prompt together with its image: give one for each prompt")

    def image_shapes(self) -> dict[str, tuple[int, ...]]:
        side = SIDE // self.pixels_per_latent
        return {"image_latents": (self.latent_channels, side, side)}
