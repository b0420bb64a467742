"""Z-Image: flow matching, a single-stream transformer on 2 x 2 patches, prompts encoded by Qwen3, FLUX's VAE.

The network takes a list of prompts, each with its own number of tokens, is told 1 - t, and predicts the velocity with
the opposite sign. The stock pipeline guides by pos + s (pos - neg), so that its guidance_scale s is fastgen's scale
minus one: s = 0, the scale of an export's call, is no guidance."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.flow_image import FlowDenoiser, FlowImage, FlowImageConfig
from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.batch import Conditioning, ragged
from fastgen.denoiser import Inputs
from fastgen.modules.inputs import ThousandfoldInputs
from fastgen.schedule import FlowSchedule, PredictionType, expand

STOCK_LENGTH = 512  # ZImagePipeline's default max_sequence_length


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ZImageConfig(FlowImageConfig):
    """max_sequence_length: number of text tokens, at which longer prompts are cut. cfg_normalization, cfg_truncation:
    as in the stock pipeline's call, see `ZImageDenoiser.guide`."""

    name: Literal["z_image"] = "z_image"
    max_sequence_length: int = Field(default=STOCK_LENGTH, ge=1, le=STOCK_LENGTH)
    cfg_normalization: bool = False
    cfg_truncation: float = Field(default=1.0, ge=0, le=1)

    pipelines: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)
    oldest_diffusers: ClassVar[tuple[int, int]] = (0, 42)  # older pipelines may not pass levels to their scheduler

    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "ZImage":
        return ZImage(self, device, dtype, roles)


class CleanTime(FlowSchedule):
    """Flow matching whose networks are told 1 - t, which is 1 at data."""

    def network_time(self, t: Tensor) -> Tensor:
        return 1 - t


class ZImageDenoiser(FlowDenoiser):
    """An unmodified ZImageTransformer2DModel behind the contract. normalise, truncation: see `guide`."""

    extra_inputs = ThousandfoldInputs

    def __init__(self, network: Any, normalise: bool = False, truncation: float = 1.0):
        super().__init__(network, network.dim)
        self.schedule, self.normalise, self.truncation = CleanTime(), normalise, truncation
        self.num_tokens = 0  # of the image that the network was last called with

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        self.num_tokens = x_t.shape[-2] * x_t.shape[-1] // 4
        images = list(x_t.to(self.weight_dtype)[:, :, None].unbind())  # videos of one frame
        prompts = ragged(cond["prompt_embeds"].to(self.weight_dtype), cond["prompt_mask"])
        velocities = self.network(images, self.timestep(t, inputs), prompts, return_dict=False)[0]
        return -torch.stack(velocities)[:, :, 0]

    def guide(
        self, on: Tensor, off: Tensor, scale: Tensor, x_t: Tensor, t: Tensor, predict: PredictionType = "sample"
    ) -> Tensor:
        """Guidance above a level, by a velocity at most as long as the conditional one    (diffusers' ZImagePipeline)

            v = off + scale (on - off) = on + s (on - off), s = scale - 1
            normalise: v min(1, |on| / |v|), the norms over a whole sample
            truncation: where 1 - t is greater, the result is `on`

        For x0 predictions the rule is the same with x_t - x0, which is t times the velocity. Raises ValueError for
        other types of predictions."""
        if predict not in ("sample", "flow_prediction"):
            raise ValueError(f"Z-Image is guided as sample or flow_prediction, not as {predict}")
        result = super().guide(on, off, scale, x_t, t, predict)
        if self.normalise:
            origin = x_t if predict == "sample" else torch.zeros_like(x_t)
            longest, norm = ((v - origin).flatten(1).norm(dim=1) for v in (on, result))
            share = (longest / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)  # at t = 0 both are zero
            result = origin + expand(share, result) * (result - origin)
        return torch.where(expand(1 - t > self.truncation, on), on, result)

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.t_embedder

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.t_embedder = module

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.network.layers)

    def feature_tokens(self, output: Any) -> Tensor:
        """The tokens of the image come first; those of the prompt and its padding follow."""
        return output[:, : self.num_tokens]


class ZImage(FlowImage):
    """The backbone of recipes with `backbone: {name: z_image, path: ...}`."""

    config: ZImageConfig
    network_class = "ZImageTransformer2DModel"
    block_lists: ClassVar[Mapping[str, str]] = {"layers": "n_layers"}
    head_keys = ("n_heads", "n_kv_heads")
    width_keys = ("dim",)

    @property
    def inner_width(self) -> int:
        return self.network_config["dim"]

    lora_targets = (*PipelineBackbone.lora_targets, "w1", "w2", "w3")

    def wrap(self, network: Any) -> ZImageDenoiser:
        return ZImageDenoiser(network, self.config.cfg_normalization, self.config.cfg_truncation)

    def time_width(self, config: Mapping[str, Any]) -> int:
        return min(config["dim"], 256)  # ADALN_EMBED_DIM of the network

    def head_settings(self, heads: int) -> dict[str, Any]:
        """Its feed-forward layers are 8 / 3 of the width."""
        settings = super().head_settings(heads)
        widths = self.inner_width, settings["dim"]
        if any(width % 3 for width in widths):
            raise ValueError(
                f"student_heads: the feed-forward layers of this network are 8 / 3 of its width, and {widths[0]} and "
                f"{widths[1]}, the width of {heads} heads, are not both multiples of 3; give another number"
            )
        return settings

    @property
    def call(self) -> str:  # type: ignore[override]
        """No guidance is the scale 0 of this pipeline."""
        more = f", height={self.image_size}, width={self.image_size}" if self.config.resolution else ""
        length = self.config.max_sequence_length
        more += "" if length == STOCK_LENGTH else f", max_sequence_length={length}"
        call = super().call.replace("guidance_scale=1", f"guidance_scale=0{more}")
        return f"# diffusers 0.42 or newer: older pipelines may give their scheduler other levels\n{call}"

    def scale_with(self, said: Mapping[str, float]) -> float:
        return super().scale_with(said) + 1

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """prompt_embeds [B, L, D], zero where the mask prompt_mask [B, L] is false, after the last token."""
        length = self.config.max_sequence_length
        embeds, _ = self.text_pipeline.encode_prompt(list(prompts), self.device, False, max_sequence_length=length)
        rows = torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in embeds])
        mask = torch.stack([torch.arange(length, device=rows.device) < len(row) for row in embeds])
        return Conditioning({"prompt_embeds": rows, "prompt_mask": mask})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.config.max_sequence_length
        return {"prompt_embeds": (length, self.network_config["cap_feat_dim"]), "prompt_mask": (length,)}
