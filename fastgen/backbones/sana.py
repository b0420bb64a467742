"""Sana: flow matching, a linear-attention transformer on the latents of DC-AE (a 32nd of the image's side), Gemma 2.

The published pipelines sample with DPM-Solver++, a multi-step method, which our sampler does not have. The teacher is
sampled with Euler steps at the levels of the pipeline's scheduler instead, as Wan's is."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.flow_image import FlowDenoiser, FlowImage, FlowImageConfig
from fastgen.backbones.folder import read_json
from fastgen.batch import Conditioning
from fastgen.denoiser import Inputs
from fastgen.pipelines.schedulers import check_flow_scheduler

STOCK_SIZE, STOCK_LENGTH = 1024, 300  # SanaPipeline's defaults of height and width, and of max_sequence_length


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SanaConfig(FlowImageConfig):
    """resolution: by default that of the transformer. max_sequence_length: number of Gemma tokens.
    complex_human_instruction: the lines of text before every prompt except the empty and the negative one, as in the
    pipeline's argument of that name: "stock" for the default of its call, [] for none."""

    name: Literal["sana"] = "sana"
    max_sequence_length: int = Field(default=STOCK_LENGTH, ge=2, le=STOCK_LENGTH)
    complex_human_instruction: Literal["stock"] | list[str] = "stock"

    pipelines: ClassVar[tuple[str, ...]] = ("SanaPipeline",)
    passes_levels: ClassVar[bool] = False
    prompt_keys: ClassVar[tuple[str, ...]] = (*FlowImageConfig.prompt_keys, "complex_human_instruction")

    def check(self) -> None:
        """Also raises ValueError for a network of Sana-Sprint."""
        super().check()
        folder = self.local_folder()
        if folder is not None:
            self.check_parts(folder)

    def check_parts(self, folder: Path) -> None:
        check_network(read_json(folder / "transformer/config.json"))

    def check_scheduler(self, config: Mapping[str, Any]) -> None:
        check_flow_scheduler(config)

    def build(self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES) -> "Sana":
        return Sana(self, device, dtype, roles)


def check_network(config: Mapping[str, Any]) -> None:
    """Raises ValueError for the networks of Sana-Sprint, which SanaPipeline cannot call."""
    if config.get("guidance_embeds", False) or config.get("timestep_scale", 1.0) != 1:
        raise ValueError(
            "path: its transformer is one of Sana-Sprint (it has guidance_embeds or a timestep_scale); backbone sana "
            "loads those of SanaPipeline, and sana_sprint those of SanaSprintPipeline"
        )


class SanaDenoiser(FlowDenoiser):
    """An unmodified SanaTransformer2DModel behind the contract."""

    def __init__(self, network: Any):
        check_network(network.config)
        super().__init__(network, network.config.num_attention_heads * network.config.attention_head_dim)

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        return self.network(
            hidden_states=x_t.to(self.weight_dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(self.weight_dtype),
            encoder_attention_mask=cond["mask"],
            timestep=self.timestep(t, inputs),
            return_dict=False,
        )[0]

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time_embed.emb

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.time_embed.emb = module


class Sana(FlowImage):
    """The backbone of recipes with `backbone: {name: sana, path: ...}`."""

    config: SanaConfig
    network_class = "SanaTransformer2DModel"
    head_keys = ()  # the halves of its gated layers are two and a half widths, and its cross attention has other heads
    vae_class = "AutoencoderDC"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # its feed-forward layers are convolutions

    def wrap(self, network: Any) -> SanaDenoiser:
        return SanaDenoiser(network)

    @property
    def call(self) -> str:  # type: ignore[override]
        return super().call.replace("guidance_scale=1", f"guidance_scale=1{self.call_options}")

    @property
    def call_options(self) -> str:
        """The stock pipeline maps sizes to those that its network was made for, unless it is told not to."""
        config, length, side = self.config, self.config.max_sequence_length, self.image_size
        more = "" if side == STOCK_SIZE else f", height={side}, width={side}"
        more += "" if side == self.default_size else ", use_resolution_binning=False"
        more += "" if length == STOCK_LENGTH else f", max_sequence_length={length}"
        if config.complex_human_instruction != "stock":
            more += f", complex_human_instruction={config.complex_human_instruction}"
        return more

    # --- sizes and images

    @property
    def default_size(self) -> int:  # type: ignore[override]
        return self.network_config["sample_size"] * self.pixels_per_latent

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self.vae_config["encoder_block_out_channels"]) - 1)

    @property
    def patch_size(self) -> int:
        return self.network_config["patch_size"]

    def vae_encode(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent  # DC-AE has no posterior

    # --- prompts

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """prompt_embeds [B, L, D], and mask [B, L], 1 where there is a token and 0 after the last one. As in the stock
        pipeline, negative prompts have no instruction."""
        rows = []
        for prompt in prompts:
            instruction = None if prompt in ("", self.negative_prompt) else self.instruction
            embeds, mask = self.encode_one(prompt, instruction)
            rows.append(Conditioning({"prompt_embeds": embeds, "mask": mask.to(embeds.dtype)}))
        return Conditioning.cat(rows)

    def encode_one(self, prompt: str, instruction: list[str] | None) -> tuple[Tensor, Tensor]:
        """The stock pipeline's own encoding of a prompt and its mask, [1, L, D] and [1, L]."""
        length = self.config.max_sequence_length
        embeds, mask, _, _ = self.text_pipeline.encode_prompt(
            prompt, False, device=self.device, max_sequence_length=length, complex_human_instruction=instruction
        )
        return embeds, mask

    @property
    def instruction(self) -> list[str]:
        given = self.config.complex_human_instruction
        default = inspect.signature(self.pipeline_class.__call__).parameters["complex_human_instruction"].default
        return default if given == "stock" else given

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.config.max_sequence_length
        return {"prompt_embeds": (length, self.network_config["caption_channels"]), "mask": (length,)}
