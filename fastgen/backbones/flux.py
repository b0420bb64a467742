"""FLUX.1 dev and schnell: flow matching, an MMDiT on 2 x 2 patches, CLIP and T5 text encoders.

dev is distilled from guidance: its network is told a guidance scale, besides the noise level. `guidance` says which
scale each role is told. By default all roles are told that of the stock pipeline's call, so that an export does what
was trained when it is called with the pipeline's own defaults. schnell is told none."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.flow_image import (
    FlowDenoiser,
    FlowImage,
    FlowImageConfig,
    from_tokens,
    grid_ids,
    to_tokens,
)
from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.backbones.told_guidance import ToldGuidance, ToldGuidanceConfig
from fastgen.batch import Conditioning
from fastgen.denoiser import Inputs
from fastgen.modules.inputs import ThousandfoldInputs

BLOCK_LISTS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FluxConfig(ToldGuidanceConfig, FlowImageConfig):
    """max_sequence_length: number of T5 tokens. guidance: as in `ToldGuidanceConfig`; the stock pipeline tells 3.5."""

    name: Literal["flux"] = "flux"
    max_sequence_length: int = Field(default=512, ge=1, le=512)

    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)

    def build(self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES) -> "Flux":
        return Flux(self, device, dtype, roles)


class FluxDenoiser(FlowDenoiser):
    """An unmodified FluxTransformer2DModel behind the contract; the blocks of its features are the two-stream ones."""

    extra_inputs = ThousandfoldInputs

    def __init__(self, network: Any):
        super().__init__(network, network.inner_dim, time_scale=1)  # the network multiplies by 1000 itself

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        dtype, (height, width) = self.weight_dtype, x_t.shape[-2:]
        prompts = cond["prompt_embeds"].to(dtype)
        guidance, inputs = self.told_guidance(t, inputs)
        tokens = self.network(
            hidden_states=to_tokens(x_t).to(dtype),
            timestep=self.timestep(t, inputs),
            guidance=guidance,
            pooled_projections=cond["pooled"].to(dtype),
            encoder_hidden_states=prompts,
            txt_ids=torch.zeros(prompts.shape[1], 3, device=x_t.device, dtype=dtype),
            img_ids=grid_ids(height // 2, width // 2, x_t.device, dtype),
            return_dict=False,
        )[0]
        return from_tokens(tokens, x_t.shape)

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time_text_embed

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.time_text_embed = module

    @property
    def shard_modules(self) -> Sequence[nn.Module]:
        return [*self.network.transformer_blocks, *self.network.single_transformer_blocks]


class Flux(ToldGuidance, FlowImage):
    """The backbone of recipes with `backbone: {name: flux, path: ...}`."""

    config: FluxConfig
    network_class = "FluxTransformer2DModel"
    block_lists: ClassVar[Mapping[str, str]] = BLOCK_LISTS
    stock_guidance = 3.5
    lora_targets = (*PipelineBackbone.lora_targets, "proj_mlp")

    def wrap(self, network: Any) -> FluxDenoiser:
        return FluxDenoiser(network)

    @property
    def call(self) -> str:  # type: ignore[override]
        """The scale is the one that the student was told; it is no guidance in the sense of two network calls."""
        size = f", height={self.image_size}, width={self.image_size}" if self.config.resolution else ""
        told = self.guidance_told("student") or 0.0
        length = self.config.max_sequence_length
        return f"""torch.manual_seed(0)  # the scheduler draws from the global generator, not from `generator=`
image = pipeline(
    "a prompt", num_inference_steps={{num_steps}}, guidance_scale={told:g}, max_sequence_length={length}{size}
).images[0]"""

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        embeds, pooled, _ = self.text_pipeline.encode_prompt(
            prompt=prompts, prompt_2=prompts, device=self.device, max_sequence_length=self.config.max_sequence_length
        )
        return Conditioning({"prompt_embeds": embeds, "pooled": pooled})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.network_config
        return {
            "prompt_embeds": (self.config.max_sequence_length, config["joint_attention_dim"]),
            "pooled": (config["pooled_projection_dim"],),
        }
