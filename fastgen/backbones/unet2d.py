"""Unconditional UNets on pixels, as DDPM's: a discrete diffusion without prompts and without a VAE, for research.

The only prompt is the empty one. A published pipeline draws noise at every step and clips its clean predictions to
[-1, 1]; the teacher is sampled by DDIM with the same noise, as that of backbone sd, and is not clipped. A student is
exported as a DDPMPipeline, which keeps the scheduler it is given: a DDIMPipeline turns any into DDIM's."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.backbones.base import DEFAULT_ROLES, Output, RoleOptions
from fastgen.backbones.discrete import Discrete, DiscreteConfig
from fastgen.backbones.sd import SDDenoiser
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.rollout import RolloutPolicy


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class UNet2DConfig(DiscreteConfig):
    """negative_prompt: only the empty one."""

    name: Literal["unet2d"] = "unet2d"

    output: ClassVar[Output] = "pixels"
    pipelines: ClassVar[tuple[str, ...]] = ("DDPMPipeline", "DDIMPipeline")
    prompt_keys: ClassVar[tuple[str, ...]] = ()
    takes_prompts: ClassVar[bool] = False
    takes_added_inputs: ClassVar[bool] = False

    def check(self) -> None:
        self.check_prompts([self.negative_prompt])
        super().check()

    def check_export(self, policy: RolloutPolicy) -> None:
        if policy.transition == "tcd":
            raise ValueError(
                "transition: tcd cannot be exported: DDPMPipeline's call has no eta for TCDScheduler; use renoise or "
                "ode"
            )
        super().check_export(policy)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if other := next((prompt for prompt in prompts if prompt), None):
            raise ValueError(f'prompt {other!r}: backbone unet2d is unconditional; its only prompt is ""')

    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "UNet2D":
        return UNet2D(self, device, dtype, roles)


class UNet2DDenoiser(SDDenoiser):
    """An unmodified UNet2DModel behind the contract, x_t [B, 3, H, W]."""

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        return self.network(x_t.to(self.weight_dtype), self.timestep(t, inputs), return_dict=False)[0]

    def add_inputs(self, counts: Mapping[str, int], dim: int, levels: Sequence[str] = ()) -> None:
        """Raises ValueError: its forward has no argument by which they could reach its time embedding."""
        raise ValueError(f"a UNet2DModel takes no added inputs, got {[*counts, *levels]}")


class UNet2D(Discrete):
    """The backbone of recipes with `backbone: {name: unet2d, path: ...}`."""

    config: UNet2DConfig
    network_class = "UNet2DModel"
    block_lists: ClassVar[Mapping[str, str]] = {}
    head_keys: ClassVar[tuple[str, ...]] = ()
    subfolder = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # its other layers are convolutions
    stores_adapters = False  # the stock pipeline loads none
    call = """generator = torch.manual_seed(0)
image = pipeline(generator=generator, num_inference_steps={num_steps}).images[0]"""

    def check(self) -> None:
        """Also raises ValueError for a UNet that is told a class, and for other pictures than squares in colour."""
        config = self.network_config
        told = [key for key in ("class_embed_type", "num_class_embeds") if config.get(key) is not None]
        if told:
            raise ValueError(f"path: this UNet is told a class ({told[0]}), and DDPMPipeline tells it none")
        channels = config.get("in_channels", 3), config.get("out_channels", 3)
        if channels != (3, 3):
            raise ValueError(f"path: this UNet has in_channels and out_channels {channels}; pictures need 3 and 3")
        super().check()

    def wrap(self, network: Any) -> Denoiser:
        self.check()
        return UNet2DDenoiser(network, self.schedule, self.scheduler().config.prediction_type)

    @cached_property
    def components(self) -> dict[str, Any]:
        return super().components | {"_class_name": "DDPMPipeline"}

    @property
    def needed_classes(self) -> dict[str, str]:
        return {self.subfolder: self.network_class}

    def scale_with(self, said: Mapping[str, float]) -> float:
        return 1.0

    def plain_call(self, policy: RolloutPolicy, adapter: bool) -> str:
        return super().plain_call(policy, adapter).replace('"a prompt"', "")

    def scheduler(self) -> Any:
        """The pipeline's own scheduler, without clipping."""
        scheduler = super().scheduler()
        unclipped = {"clip_sample": False, "thresholding": False}
        return scheduler.from_config(scheduler.config, **{k: v for k, v in unclipped.items() if k in scheduler.config})

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        size = self.network_config["sample_size"]
        if not isinstance(size, int):
            raise ValueError(f"path: the UNet's sample_size is {size}; backbone unet2d makes square pictures")
        return (3, size, size)

    @property
    def image_size(self) -> int:  # type: ignore[override]
        return self.latent_shape[-1]

    def time_width(self, config: Mapping[str, Any]) -> int:
        return 4 * config["block_out_channels"][0]

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to [-1, 1]: there is no VAE."""
        return pixels.to(self.device, self.dtype) * 2 - 1

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        pixels = latents.to(self.dtype) / 2 + 0.5
        return pixels.clamp(0, 1) if clamp else pixels

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """nothing [B, 0]: no network reads it."""
        self.config.check_prompts(prompts)
        return Conditioning({"nothing": torch.zeros(len(prompts), 0, device=self.device)})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"nothing": (0,)}
