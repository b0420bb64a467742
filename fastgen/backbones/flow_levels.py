"""What flow-matching families share that have FlowMatchEulerDiscreteScheduler: the levels that the stock pipeline
visits, and the export of a student's levels."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.folder import read_scheduler
from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.pipelines.schedulers import check_flow_scheduler, flow_match_scheduler, passed_levels
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FlowLevelsConfig(PipelineConfig):
    """The part of a section that these families have in common."""

    passes_levels: ClassVar[bool] = True  # whether the pipeline gives its scheduler (K-i)/K, i = 0 ... K-1

    def check(self) -> None:
        """Also raises ValueError for a scheduler whose steps are not those of our sampler."""
        super().check()
        folder = self.local_folder()
        if folder is not None:
            self.check_scheduler(read_scheduler(folder))

    def check_scheduler(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError for a scheduler with this config that does not fit."""
        check_flow_scheduler(config, dynamic=True, multistep=False)

    def check_export(self, policy: RolloutPolicy) -> None:
        super().check_export(policy)
        flow_match_scheduler(policy, self.passes_levels)


class FlowLevels(PipelineBackbone):
    """The part of a backbone that these families have in common."""

    config: Any

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype, roles: RoleOptions = DEFAULT_ROLES):
        super().__init__(config, device, dtype, roles)
        self.schedule = FlowSchedule()

    def scheduler_arguments(self, num_steps: int, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the stock pipeline gives its scheduler for this many steps. config: the scheduler's."""
        passed: dict[str, Any] = {"sigmas": passed_levels(num_steps)}
        arguments = passed if self.config.passes_levels else {"num_inference_steps": num_steps}
        return arguments | ({"mu": self.level_shift(config, num_steps)} if config.get("use_dynamic_shifting") else {})

    @property
    def num_tokens(self) -> int:
        """The number of tokens of a sample, on which the shift depends."""
        raise NotImplementedError

    def level_shift(self, config: Mapping[str, Any], num_steps: int) -> float:
        """mu: a scheduler with use_dynamic_shifting shifts the levels by exp(mu). Linear in the number of tokens."""
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return low + (high - low) * (self.num_tokens - few) / (many - few)

    def teacher_policy(self, num_steps: int) -> RolloutPolicy:
        scheduler = self.scheduler()
        config = scheduler.config
        self.config.check_scheduler(config | {"_class_name": type(scheduler).__name__})
        if num_steps == 1 and config.get("shift_terminal"):
            raise ValueError(
                f"the pipeline's scheduler cannot make one step: its last level is {config.shift_terminal} "
                "(shift_terminal), and its first is 1; sample the teacher with 2 steps or more"
            )
        scheduler.set_timesteps(**self.scheduler_arguments(num_steps, config))
        transition: Literal["renoise", "ode"] = "renoise" if config.get("stochastic_sampling") else "ode"
        time = config.num_train_timesteps / 1000
        time = time if num_steps == 1 and time != 1 else None
        return RolloutPolicy(tuple(scheduler.sigmas[:-1].tolist()), transition, time)

    def student_scheduler(self, policy: RolloutPolicy) -> Any:
        return flow_match_scheduler(policy, self.config.passes_levels)
