"""What families share whose noise is a discrete variance-preserving diffusion: steps of a table of alphas.

The teacher is sampled with DDIM's steps, and students are exported with the stock schedulers of few steps.

We apply guidance to x0 predictions. This equals guidance on the network's outputs, as in the stock pipelines: at a
fixed x_t the conversion is affine, and the two weights of guidance sum to one."""

from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from fastgen.backbones.pipeline import PipelineBackbone, diffusers_class
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.pipelines.schedulers import (
    deterministic_policy,
    discrete_steps,
    few_step_scheduler,
    is_plain_euler,
    lcm_steps,
    stock_noise,
)
from fastgen.rollout import RolloutPolicy, TeacherPolicy
from fastgen.schedule import VPSchedule

NUM_TRAIN_TIMESTEPS = 1000  # of every published pipeline; a hub id is not read before weights load


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DiscreteConfig(PipelineConfig):
    """The part of a section that these families have in common."""

    flow_matching: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        if self.local_folder() is not None:
            self.read().check()

    def check_export(self, policy: RolloutPolicy) -> None:
        super().check_export(policy)
        discrete_steps(policy, self.num_levels())

    def even_levels(self, steps: int, shift: float, transition: str) -> tuple[float, ...]:
        """Multiples of 1 / N: DDIMScheduler (ode) needs equal distances."""
        total = self.num_levels()
        places = lcm_steps(steps, total // steps, steps) if transition == "ode" else lcm_steps(total, 1, steps)
        return tuple(place / total for place in places)

    def num_levels(self) -> int:
        return NUM_TRAIN_TIMESTEPS if self.local_folder() is None else len(self.read().schedule.table) - 1

    def read(self) -> Any:
        """The backbone, to read its small files."""
        return self.build(torch.device("cpu"), torch.float32, 0)


class Discrete(PipelineBackbone):
    """The part of a backbone that these families have in common."""

    config: Any

    def check(self) -> None:
        """Raises ValueError if the small files show that this pipeline cannot be used. Loads no weights."""
        _ = self.schedule, self.latent_shape  # each raises ValueError if it cannot be made

    @cached_property
    def schedule(self) -> VPSchedule:  # type: ignore[override]
        return noise_schedule(self.scheduler())

    def teacher_scheduler(self) -> Any:
        """The stock scheduler that samples the teacher. This is the pipeline's own if it takes DDIM's steps. Otherwise
        (PNDM and the other multistep solvers) it is a DDIMScheduler with the same noise. If the solver's spacing is
        linspace, the spacing becomes trailing: with linspace, DDIMScheduler steps to other levels than those at which
        it calls the network."""
        scheduler = self.scheduler()
        if isinstance(scheduler, diffusers_class("DDIMScheduler")) or is_plain_euler(scheduler):
            return scheduler
        config = scheduler.config
        spacing = config.get("timestep_spacing", "leading")
        return diffusers_class("DDIMScheduler").from_config(
            config,
            **stock_noise(config),
            clip_sample=False,
            thresholding=False,
            timestep_spacing="trailing" if spacing == "linspace" else spacing,
        )

    def teacher_policy(self, num_steps: int) -> TeacherPolicy:
        return deterministic_policy(self.teacher_scheduler(), num_steps)

    def student_scheduler(self, policy: RolloutPolicy) -> Any:
        return few_step_scheduler(policy, self.scheduler().config)


def noise_schedule(scheduler: Any) -> VPSchedule:
    """The noise schedule of a discrete diffusion's scheduler. Raises ValueError for any other scheduler."""
    config, name = scheduler.config, type(scheduler).__name__
    if not hasattr(scheduler, "betas") or config.get("timestep_type") == "continuous":
        raise ValueError(f"path: {name} is not a discrete variance-preserving diffusion, which this backbone needs")
    kind = config.get("prediction_type")
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"path: this backbone needs epsilon, v_prediction or sample; the scheduler says {kind} ({name})"
        )
    schedule = VPSchedule(diffusers_class("DDIMScheduler")(**stock_noise(config)).alphas_cumprod)
    if kind == "epsilon" and schedule.table[-1] <= 0:
        raise ValueError(
            "path: rescale_betas_zero_snr leaves no signal at t = 1, where the output of an epsilon network says "
            "nothing about x0; such a schedule needs v_prediction"
        )
    return schedule
