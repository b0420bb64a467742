"""What a first recipe depends on: what the user wishes, and what the pipeline says."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgen.backbones.base import RoleOptions
from fastgen.backbones.folder import check_source, local_folder, read_scheduler, recommended_call
from fastgen.backbones.pipeline_config import CONFIGS, PipelineConfig
from fastgen.sampling.sampler import recommended_config

LARGE = 100_000_000  # parameters from which on adapters are trained, in bfloat16
DYNAMIC_SHIFT = 3.0  # for schedulers that shift by the size of the picture


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the user asked for. memory: of one GPU, in GB; None: that of the GPU here. images: a folder of pictures,
    for objectives that train on some. scorers: name -> keys, as in `eval.scorers`."""

    pipeline: str
    steps: int = 4
    objective: str = "dmd2"
    prompts: str | None = None
    images: str | None = None
    memory: float | None = None
    gpus: int = 1
    scorers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    guidance: float | None = None  # the teacher's; None: that of the pipeline's own call


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the pipeline says. steps, guidance: those that its card recommends, else of its stock call, unless another
    guidance was asked for. recommended: whether the guidance is the card's. settings: keys of the backbone that
    the card recommends (`recommended_config`)."""

    config: PipelineConfig
    steps: int
    guidance: float
    parameters: int
    shift: float
    recommended: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def large(self) -> bool:
        return self.parameters >= LARGE


def look_at(pipeline: str) -> Facts:
    """Reads configs only. Raises ValueError for a pipeline of no supported family."""
    check_source(pipeline)
    folder = local_folder(pipeline) or known_configs(pipeline)
    config, settings = recommended_config(folder)
    config, said = dataclasses.replace(config, path=pipeline), recommended_call(folder)
    backbone: Any = config.unloaded().build(torch.device("cpu"), torch.float32, 0, RoleOptions(deferred=True))
    teacher = backbone.load("teacher")
    steps, guidance = backbone.call_with(said)
    shift, count = level_shift(read_scheduler(folder)), sum(p.numel() for p in teacher.parameters())
    by_card = guidance != backbone.stock_call[1]
    return Facts(config, steps, guidance, count, shift, recommended=by_card, settings=settings)


def known_configs(hub_id: str) -> Path:
    """The configs of a hub pipeline that ship with fastgen. Raises ValueError if there are none."""
    if (CONFIGS / hub_id).is_dir():
        return CONFIGS / hub_id
    known = ", ".join(sorted(str(p.parent.relative_to(CONFIGS)) for p in CONFIGS.glob("*/*/model_index.json")))
    raise ValueError(
        f"the configs of {hub_id} do not ship with fastgen; download the pipeline and give its folder, or name one of "
        f"{known}"
    )


def level_shift(scheduler: Mapping[str, Any]) -> float:
    """s of t = s u / (1 + (s - 1) u), by which a flow-matching scheduler moves its levels towards noise. 1 for those
    that are uniform in the network's time."""
    if scheduler.get("use_dynamic_shifting"):
        return DYNAMIC_SHIFT
    return float(scheduler.get("shift") or scheduler.get("flow_shift") or 1.0)
