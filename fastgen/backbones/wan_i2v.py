"""Wan image-to-video: every video begins with a given image.

Wan 2.1 I2V 14B and Wan 2.2 I2V A14B (two experts) see a second video beside the noisy one, along the channels: a mask,
and the latents of the image followed by grey. The networks of Wan 2.1 are also told CLIP's features of the image. Wan
2.2 TI2V 5B (`expand_timesteps`) sees the image's latents in place of the first latent frame, at level 0.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.folder import check_weights, read_index, read_json, weight_files
from fastgen.backbones.given import to_picture
from fastgen.backbones.pipeline import read_component
from fastgen.backbones.wan_given import GivenFrame, GivenFrameConfig
from fastgen.backbones.wan_network import WanDenoiser, WanI2VDenoiser, WanTI2VDenoiser
from fastgen.batch import Conditioning
from fastgen.modules.sharding import WeightsError

PIPELINE = "WanImageToVideoPipeline"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class WanI2VConfig(GivenFrameConfig):
    """The keys are those of `wan`. path: a WanImageToVideoPipeline; or TI2V 5B, which is stored as a WanPipeline."""

    name: Literal["wan_i2v"] = "wan_i2v"  # type: ignore[assignment]

    pipelines: ClassVar[tuple[str, ...]] = (PIPELINE,)

    @classmethod
    def loads(cls, index: Mapping[str, Any]) -> bool:
        return super().loads(index) or takes_first_frame(index)

    def check(self) -> None:
        """Also raises ValueError for networks that take no image, or a last one as well, and for a folder without the
        image encoder that they need."""
        super().check()
        folder = self.local_folder()
        if folder is None:
            return
        index, network = read_index(folder), read_json(folder / "transformer/config.json")
        check_network(network, read_json(folder / "vae/config.json"), bool(index.get("expand_timesteps")))
        if network.get("image_dim") is not None:
            for name in ("image_encoder", "image_processor"):
                if (index.get(name) or [None])[0] is None or not (folder / name).is_dir():
                    raise ValueError(f"path: {folder} has no {name}, and its network is told of images by one")
            for path in weight_files(folder / "image_encoder", "transformers"):
                check_weights(path)

    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "WanI2V":
        return WanI2V(self, device, dtype, roles)


def takes_first_frame(index: Mapping[str, Any]) -> bool:
    """Whether this model_index.json is that of TI2V 5B, whose repository names the text-to-video pipeline."""
    return index["_class_name"] == "WanPipeline" and bool(index.get("expand_timesteps"))


def check_network(network: Mapping[str, Any], vae: Mapping[str, Any], first_frame: bool) -> None:
    """Raises ValueError for a network that does not take a first image. network, vae: their config.json."""
    channels, temporal = network["out_channels"], vae.get("scale_factor_temporal", 4)
    wanted = channels if first_frame else 2 * channels + temporal
    if network["in_channels"] != wanted:
        raise ValueError(
            f"path: its transformer has in_channels {network['in_channels']}, and one that takes an image has "
            f"{wanted} here; if it is a text-to-video model, use backbone wan"
        )
    if network.get("pos_embed_seq_len") is not None:
        raise ValueError("path: its transformer takes a first and a last image, and fastgen gives only a first one")


class WanI2V(GivenFrame):
    """The backbone of recipes with `backbone: {name: wan_i2v, path: ...}`."""

    config: WanI2VConfig
    loader = PIPELINE  # TI2V 5B would load as the pipeline that makes videos from text alone

    @cached_property
    def components(self) -> dict[str, Any]:
        """Of TI2V 5B, the stock pipeline for images is made from the components that its repository names."""
        index = super().components
        if index["_class_name"] != PIPELINE and not takes_first_frame(index):
            raise WeightsError(f"path: {self.source} is a {index['_class_name']}, which makes no videos from images")
        return index | {"_class_name": PIPELINE}

    @property
    def first_frame(self) -> bool:
        return bool(self.components.get("expand_timesteps"))

    def wrap(self, network: Any) -> WanDenoiser:
        return WanTI2VDenoiser(network) if self.first_frame else WanI2VDenoiser(network)

    @property
    def call(self) -> str:  # type: ignore[override]
        size = f"({self.config.width}, {self.config.height})"
        lines = super().call.replace('"a prompt", ', 'image, "a prompt", ')
        given = f'image = load_image("picture.png").resize({size})'
        return "from diffusers.utils import load_image\n" + lines.replace("\nvideo =", f"\n{given}\nvideo =")

    # --- the given image

    @cached_property
    def image_encoder(self) -> tuple[Any, Any]:
        """CLIP's vision model, and what prepares pictures for it."""
        import transformers

        model, processor = (getattr(transformers, self.components[f"image_{n}"][1]) for n in ("encoder", "processor"))
        network = read_component(model, self.source, "image_encoder", self.options)
        local = self.options["local_files_only"]
        prepare = processor.from_pretrained(self.source, subfolder="image_processor", local_files_only=local)
        return network.to(self.device).requires_grad_(False).eval(), prepare

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Conditioning:
        """image_latents, as the network takes them, and image_embeds [1, N, D] for one that is told CLIP's."""
        video = torch.full((1, 1 if self.first_frame else self.config.num_frames, *pixels.shape), 0.5)
        video[:, 0] = pixels
        latents = self.encode(video)
        if not self.first_frame:
            mask = torch.zeros(*latents.shape[:2], self.mask_channels, *latents.shape[3:], device=latents.device)
            mask[:, 0] = 1
            latents = torch.cat([mask, latents], dim=2)
        row = {"image_latents": latents.to(self.dtype)}
        if self.told_width is not None:
            with self.vae_lock:  # batches are made in another thread
                network, prepare = self.image_encoder
                given = prepare(images=to_picture(pixels), return_tensors="pt").to(self.device, self.dtype)
                row["image_embeds"] = network(**given, output_hidden_states=True).hidden_states[-2]
        return Conditioning(row)

    @property
    def told_width(self) -> int | None:
        """That of CLIP's features; None for networks that are not told them."""
        return self.network_config.get("image_dim")

    @property
    def mask_channels(self) -> int:
        """One for each frame of a latent frame."""
        return self.network_config["in_channels"] - 2 * self.network_config["out_channels"]

    def image_shapes(self) -> dict[str, tuple[int, ...]]:
        frames, channels, *size = self.latent_shape
        if self.first_frame:
            return {"image_latents": (1, channels, *size)}
        shapes: dict[str, tuple[int, ...]] = {"image_latents": (frames, self.mask_channels + channels, *size)}
        if self.told_width is not None:
            clip = self.component_config("CLIPVisionModel", "image_encoder")  # without values that are CLIP's defaults
            tokens = (clip.get("image_size", 224) // clip.get("patch_size", 32)) ** 2 + 1
            shapes["image_embeds"] = (tokens, self.told_width)
        return shapes
