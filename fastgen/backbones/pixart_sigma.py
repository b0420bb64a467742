"""PixArt-Sigma: a discrete diffusion as Stable Diffusion's, a transformer on 2 x 2 patches, prompts encoded by T5.

The published pipelines sample with DPM-Solver++; the teacher is sampled by DDIM with the same noise instead, as that
of backbone sd. Half of the network's outputs are learned variances, which the stock pipeline drops, and so do we."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.flow_image import TransformerDenoiser
from fastgen.backbones.sd import SD, SDConfig
from fastgen.batch import Conditioning
from fastgen.denoiser import Inputs
from fastgen.schedule import PredictionType, VPSchedule

STOCK_LENGTH = 300  # PixArtSigmaPipeline's default max_sequence_length


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PixArtSigmaConfig(SDConfig):
    """resolution: by default that of the transformer. max_sequence_length: number of T5 tokens."""

    name: Literal["pixart_sigma"] = "pixart_sigma"  # type: ignore[assignment]
    max_sequence_length: int = Field(default=STOCK_LENGTH, ge=1, le=STOCK_LENGTH)

    pipelines: ClassVar[tuple[str, ...]] = ("PixArtSigmaPipeline",)
    prompt_keys: ClassVar[tuple[str, ...]] = ("max_sequence_length",)

    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "PixArtSigma":
        return PixArtSigma(self, device, dtype, roles)


class PixArtDenoiser(TransformerDenoiser):
    """An unmodified PixArtTransformer2DModel behind the contract."""

    def __init__(self, network: Any, schedule: VPSchedule, prediction_type: PredictionType):
        super().__init__(network, network.inner_dim, schedule, prediction_type)

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        output = self.network(
            x_t.to(self.weight_dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(self.weight_dtype),
            timestep=self.timestep(t, inputs),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=cond["mask"],
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]  # without the learned variances

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.adaln_single.emb

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.adaln_single.emb = module


class PixArtSigma(SD):
    """The backbone of recipes with `backbone: {name: pixart_sigma, path: ...}`."""

    config: PixArtSigmaConfig
    network_class = "PixArtTransformer2DModel"
    block_lists: ClassVar[Mapping[str, str]] = {"transformer_blocks": "num_layers"}
    head_keys = ("num_attention_heads",)
    width_keys = ("cross_attention_dim",)
    subfolder = "transformer"
    stores_adapters = False  # the stock pipeline loads none

    def check(self) -> None:
        config = self.network_config
        if config.get("use_additional_conditions", config.get("sample_size", 128) == 128):
            raise ValueError(
                "path: this transformer is told sizes (use_additional_conditions), as PixArt-Alpha's; "
                "PixArtSigmaPipeline tells it none"
            )
        super().check()

    def wrap(self, network: Any) -> PixArtDenoiser:
        self.check()
        return PixArtDenoiser(network, self.schedule, self.scheduler().config.prediction_type)

    @property
    def call(self) -> str:  # type: ignore[override]
        """The stock pipeline maps sizes to those that its network was made for, unless it is told not to."""
        default = self.network_config["sample_size"] * self.pixels_per_latent
        more = "" if self.image_size == default else "use_resolution_binning=False, "
        length = self.config.max_sequence_length
        more += "" if length == STOCK_LENGTH else f"max_sequence_length={length}, "
        return super().call.replace("generator=generator", f"{more}generator=generator")

    @property
    def size_unit(self) -> int:
        return self.pixels_per_latent * self.network_config.get("patch_size", 2)

    def time_width(self, config: Mapping[str, Any]) -> int:
        return config["num_attention_heads"] * config["attention_head_dim"]

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """prompt_embeds [B, L, D], and mask [B, L], 1 where there is a token. Prompts are cleaned as in the stock
        call, which needs beautifulsoup4 and ftfy for this, and leaves it out without them."""
        embeds, mask, _, _ = self.text_pipeline.encode_prompt(
            prompts,
            False,
            device=self.device,
            clean_caption=True,
            max_sequence_length=self.config.max_sequence_length,
        )
        return Conditioning({"prompt_embeds": embeds, "mask": mask.to(embeds.dtype)})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.config.max_sequence_length
        return {"prompt_embeds": (length, self.network_config["caption_channels"]), "mask": (length,)}
