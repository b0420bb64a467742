"""Sana-Sprint: Sana's networks after continuous-time consistency distillation, which are told a guidance scale.

The network is one of flow matching: it is called at the flow-matching level and state, and what the stock pipeline
turns into TrigFlow's velocity (`schedule.flow_to_trig_velocity`) is the flow-matching one. Only the pipeline's sampler
is TrigFlow's, with angles a instead of levels t = sin a / (cos a + sin a), and fresh noise at every step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.flow_image import FlowDenoiser
from fastgen.backbones.folder import read_json
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.backbones.sana import Sana, SanaConfig, SanaDenoiser
from fastgen.backbones.told_guidance import ToldGuidance, ToldGuidanceConfig, is_told
from fastgen.batch import Conditioning
from fastgen.denoiser import Inputs
from fastgen.modules.inputs import SprintInputs
from fastgen.pipelines.schedulers import TOLERANCE
from fastgen.rollout import RolloutPolicy

HALF_PI, MIDDLE = 1.57080, 1.3  # SanaSprintPipeline's defaults of max_timesteps and of intermediate_timesteps


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SanaSprintConfig(ToldGuidanceConfig, SanaConfig):
    """As backbone sana. guidance: as in `ToldGuidanceConfig`; the stock pipeline tells 4.5."""

    name: Literal["sana_sprint"] = "sana_sprint"  # type: ignore[assignment]

    pipelines: ClassVar[tuple[str, ...]] = ("SanaSprintPipeline",)

    def check_parts(self, folder: Path) -> None:
        check_network(read_json(folder / "transformer/config.json"))

    def check_scheduler(self, config: Mapping[str, Any]) -> None:
        if config["_class_name"] != "SCMScheduler":
            raise ValueError(f"path: SanaSprintPipeline needs an SCMScheduler, and has a {config['_class_name']}")

    def check_export(self, policy: RolloutPolicy) -> None:
        """Raises ValueError for a sampler that the stock call does not have."""
        PipelineConfig.check_export(self, policy)
        levels, times = sprint_levels(policy.num_steps), policy.timesteps
        if policy.conditioning_time is not None:
            raise ValueError("SCMScheduler of Sana-Sprint stores no conditioning_time; leave it out")
        if policy.transition != "renoise" and policy.num_steps > 1:
            raise ValueError(
                f"SCMScheduler of Sana-Sprint adds fresh noise at every step; use transition: renoise, not "
                f"{policy.transition}"
            )
        if max(abs(a - b) for a, b in zip(levels, times, strict=True)) > TOLERANCE:
            near = [round(level, 6) for level in levels]
            raise ValueError(
                f"timesteps {list(times)} are not those of SanaSprintPipeline's call with {len(times)} steps, which "
                f"its scheduler cannot change: {near}"
            )

    def even_levels(self, steps: int, shift: float, transition: str) -> tuple[float, ...]:
        return sprint_levels(steps)

    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "SanaSprint":
        return SanaSprint(self, device, dtype, roles)


def check_network(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a network of SanaPipeline, which SanaSprintPipeline cannot call."""
    if not is_told(config):
        raise ValueError("path: its transformer has no guidance_embeds, as those of Sana-Sprint have")


def sprint_levels(num_steps: int) -> tuple[float, ...]:
    """t = sin a / (cos a + sin a) of the angles at which the stock call calls the network (SCMScheduler)."""
    angles = torch.linspace(HALF_PI, 0, num_steps + 1)[:-1]
    angles = torch.tensor([HALF_PI, MIDDLE]) if num_steps == 2 else angles
    return tuple((angles.sin() / (angles.cos() + angles.sin())).clamp_max(1).tolist())


class SanaSprintDenoiser(SanaDenoiser):
    """An unmodified SanaTransformer2DModel of Sana-Sprint behind the contract."""

    extra_inputs = SprintInputs

    def __init__(self, network: Any):
        check_network(network.config)
        width = network.config.num_attention_heads * network.config.attention_head_dim
        FlowDenoiser.__init__(self, network, width, time_scale=1)  # its pipeline does not use timestep_scale

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        guidance, inputs = self.told_guidance(t, inputs)
        assert guidance is not None  # a network of Sana-Sprint is told a scale
        return self.network(
            hidden_states=x_t.to(self.weight_dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(self.weight_dtype),
            encoder_attention_mask=cond["mask"],
            timestep=self.timestep(t, inputs),
            guidance=guidance * self.network.config.guidance_embeds_scale,
            return_dict=False,
        )[0]

    @property
    def time_embedding(self) -> Any:
        return self.network.time_embed

    def set_time_embedding(self, module: Any) -> None:
        self.network.time_embed = module


class SanaSprint(ToldGuidance, Sana):
    """The backbone of recipes with `backbone: {name: sana_sprint, path: ...}`."""

    config: SanaSprintConfig
    stock_guidance = 4.5

    def wrap(self, network: Any) -> SanaSprintDenoiser:
        return SanaSprintDenoiser(network)

    @property
    def call(self) -> str:  # type: ignore[override]
        return f"""torch.manual_seed(0)  # the scheduler draws from the global generator
steps = {{num_steps}}
options = dict(guidance_scale={self.guidance_told("student"):g}{self.call_options})
middle = {MIDDLE} if steps == 2 else None  # only two steps have an intermediate timestep
image = pipeline("a prompt", num_inference_steps=steps, intermediate_timesteps=middle, **options).images[0]"""

    def teacher_policy(self, num_steps: int) -> RolloutPolicy:
        return RolloutPolicy(sprint_levels(num_steps), "renoise")

    def student_scheduler(self, policy: RolloutPolicy) -> Any:
        self.config.check_export(policy)
        return self.scheduler()

    def encode_one(self, prompt: str, instruction: list[str] | None) -> tuple[Tensor, Tensor]:
        return self.text_pipeline.encode_prompt(
            prompt,
            device=self.device,
            max_sequence_length=self.config.max_sequence_length,
            complex_human_instruction=instruction,
        )
