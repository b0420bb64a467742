"""Stable Diffusion 3 and 3.5: flow matching, an MMDiT, three text encoders. Also loads our digits teacher."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions, check_head
from fastgen.backbones.flow_image import FlowImage, FlowImageConfig
from fastgen.backbones.folder import boundaries_in, read_json
from fastgen.backbones.sd3_attention import FoldedJointAttnProcessor, fold_repeats
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.experts import Experts
from fastgen.modules.inner_flow import told
from fastgen.modules.kept_blocks import Kept
from fastgen.modules.segment_flow import handing
from fastgen.policy import InnerFlow, SegmentFlow
from fastgen.schedule import FlowSchedule

CLIP_TOKENS = 77  # they come before the T5 tokens
STOCK_LENGTH = 256  # T5 tokens of the stock pipeline's call


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SD3Config(FlowImageConfig):
    """resolution: by default that of the transformer. max_sequence_length: number of T5 tokens, by default the stock
    pipeline's 256."""

    name: Literal["sd3"] = "sd3"
    max_sequence_length: int = Field(default=STOCK_LENGTH, ge=1, le=512)

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    passes_levels: ClassVar[bool] = False

    def check(self) -> None:
        """Also raises ValueError for an exported student of several experts, which cannot be a teacher."""
        folder = self.local_folder()
        if folder is not None and boundaries_in(folder / "transformer"):
            raise ValueError(f"path: {folder} is a student of several experts; name the pipeline it came from")
        super().check()

    def check_experts(self, boundaries: Sequence[float]) -> None:
        """Passes always: a `few_step.SD3Experts` can store any experts."""

    def check_inner(self, flow: InnerFlow) -> None:
        if (folder := self.local_folder()) is not None:
            check_head(flow, read_json(folder / "transformer/config.json").get("num_layers", 18))

    def check_segment(self, flow: SegmentFlow) -> None:
        """Passes always: a `SegmentFlowSD3Transformer2DModel` stores it."""

    def build(self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES) -> "SD3":
        return SD3(self, device, dtype, roles)


class SD3Denoiser(Denoiser):
    """An unmodified SD3Transformer2DModel behind the contract; features are the image tokens after each block."""

    network: Any  # an SD3Transformer2DModel

    def __init__(self, network: Any):
        super().__init__(network, FlowSchedule(), "flow_prediction")
        self.feature_dim = network.inner_dim

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        folded = {"context_log_repeats": cond["log_repeats"]} if "log_repeats" in cond else None
        dtype = self.weight_dtype
        return self.network(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            timestep=self.timestep(t, inputs),
            joint_attention_kwargs=folded,
            return_dict=False,
            **told(inputs.inner, inputs.inner_levels),
            **handing(inputs.segment),
        )[0]

    def add_inner_flow(self, flow: InnerFlow) -> None:
        from fastgen.pipelines.inner_flow import InnerFlowSD3Transformer2DModel  # with diffusers

        self.network = InnerFlowSD3Transformer2DModel.of(self.network, flow)

    def add_segment_flow(self, flow: SegmentFlow, levels: Sequence[float]) -> None:
        from fastgen.pipelines.segment_flow import SegmentFlowSD3Transformer2DModel  # with diffusers

        self.network = SegmentFlowSD3Transformer2DModel.of(self.network, flow, levels)

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time_text_embed

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.time_text_embed = module

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        return list(self.network.transformer_blocks)


class SD3(FlowImage):
    """The backbone of recipes with `backbone: {name: sd3, path: ...}`."""

    config: SD3Config
    network_class = "SD3Transformer2DModel"
    last_differs = True
    width_keys = ("caption_projection_dim",)

    @property
    def default_size(self) -> int:  # type: ignore[override]
        return self.network_config["sample_size"] * self.pixels_per_latent

    @property
    def call(self) -> str:  # type: ignore[override]
        """With the size and the number of T5 tokens, where they are not those of the stock call."""
        side, length = self.image_size, self.config.max_sequence_length
        more = "" if side == self.default_size else f", height={side}, width={side}"
        more += "" if length == STOCK_LENGTH else f", max_sequence_length={length}"
        return super().call.replace("guidance_scale=1", f"guidance_scale=1{more}")

    @property
    def latent_channels(self) -> int:
        return self.network_config["in_channels"]

    @property
    def patch_size(self) -> int:
        return self.network_config["patch_size"]

    def latent_shape_of(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Also raises ValueError for a side of which the network's table of positions has too few."""
        shape, most = super().latent_shape_of(size), self.network_config.get("pos_embed_max_size", 96)
        if max(shape[1:]) > most * self.patch_size:
            side = most * self.patch_size * self.pixels_per_latent
            raise ValueError(f"this network knows positions up to {side} pixels, got {size[0]} x {size[1]}")
        return shape

    def kept_settings(self, kept: Kept) -> dict[str, Any]:
        settings, dual = super().kept_settings(kept), self.network_config.get("dual_attention_layers")
        if dual and kept:
            places = kept["transformer_blocks"]
            settings["dual_attention_layers"] = tuple(i for i, place in enumerate(places) if place in dual)
        return settings

    def wrap(self, network: Any) -> SD3Denoiser:
        network.set_attn_processor(FoldedJointAttnProcessor())
        return SD3Denoiser(network)

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        out = self.text_pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=prompts,
            prompt_3=prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
        )
        return Conditioning({"prompt_embeds": out[0], "pooled": out[2]})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        length = CLIP_TOKENS + self.config.max_sequence_length
        width = {"prompt_embeds": "joint_attention_dim", "pooled": "pooled_projection_dim"}
        sizes = {key: self.network_config[name] for key, name in width.items()}
        return {
            "prompt_embeds": (length, sizes["prompt_embeds"]),
            "pooled": (sizes["pooled"],),
            "log_repeats": (length,),
        }

    def finish_table(self, table: Conditioning) -> Conditioning:
        """prompt_embeds [B, L, D], pooled [B, P] and log_repeats [B, L] (see sd3_attention)."""
        folded, log_repeats = fold_repeats(table["prompt_embeds"])
        return Conditioning({"prompt_embeds": folded, "pooled": table["pooled"], "log_repeats": log_repeats})

    def read_networks(self, source: str | Path, **options: Any) -> Denoiser:
        boundaries = boundaries_in(Path(source) / self.subfolder)
        if not boundaries:
            return super().read_networks(source, **options)
        from fastgen.pipelines.few_step import SD3Experts  # with diffusers

        joined = SD3Experts.from_pretrained(source, subfolder=self.subfolder, **options)
        return Experts([self.wrap(network) for network in joined.experts], boundaries).to(self.device)

    def student_components(self, student: Denoiser) -> dict[str, Any]:
        if not student.boundaries:
            return super().student_components(student)
        networks = [part.network for part in student.members]
        from fastgen.pipelines.few_step import SD3Experts  # with diffusers

        return {self.subfolder: SD3Experts.of(networks, student.boundaries)}
