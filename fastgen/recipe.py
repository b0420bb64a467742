"""The sections of a recipe, as frozen pydantic dataclasses: what they are called, their defaults and ranges.

The sections `backbone`, `objective`, `data` and each of `rewards.parts` name a class, which is its own schema; the
others are the classes below. Reading a recipe from YAML, and what sections ask of each other, is config.py."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from torch import nn

from fastgen.metrics import METRICS
from fastgen.metrics.features import check_inception
from fastgen.modules.lora import LoraConfig
from fastgen.registry import nearest
from fastgen.rewards import SCORERS, Composite, Reward, make_reward
from fastgen.rollout import RolloutPolicy


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class OptimizerConfig:
    """AdamW with a linear warm-up and a decay towards zero at the last student update.

    The rate at student update k of n is lr * min(1, (k + 1) / warmup) * decay(k / n), where decay is 1 (constant),
    falls linearly to 0, or follows half a cosine to 0, over the last `decay_fraction` of the run."""

    lr: float = Field(gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=10.0, gt=0)
    warmup: int = Field(default=0, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_fraction: float = Field(default=1.0, gt=0, le=1)

    def build(self, parameters: Iterator[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, self.lr, self.betas, self.eps, self.weight_decay)

    def rate(self, update: int, total: int) -> float:
        """The learning rate at 0-based student update `update` of `total`."""
        start = 1 - self.decay_fraction
        progress = min(max((update / total - start) / self.decay_fraction, 0.0), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": cosine}[self.decay]
        return self.lr * decay * (min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TrainConfig:
    """The loop. One step is one student update; every `*_every` counts those, 0 switches the event off.

    strategy: how several processes share the work. ddp: every one holds every network; fsdp: networks are divided
    (`fully_shard`); auto: fsdp where the launcher was configured for it, else ddp. num_processes: if given, any other
    number is refused (accelerate's `--cpu --num_processes 2` starts one)."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)  # samples of one micro-batch, on each process
    accumulate: int = Field(default=1, ge=1)  # micro-batches of every inner update
    mixed_precision: Literal["no", "bf16"] = "no"  # forward passes; weights and optimizers stay float32
    dtype: Literal["float32", "float64"] = "float32"
    frozen_dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None  # the teacher's; None: dtype
    gradient_checkpointing: bool = False  # activations are computed again in the backward pass, block by block
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    num_processes: int | None = Field(default=None, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    log_every: int = Field(default=10, ge=1)
    sample_every: int = Field(default=100, ge=0)
    num_samples: int = Field(default=16, ge=1)
    eval_every: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=200, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    resume_from: str | None = None  # a checkpoint's name, step_00000200; None: the newest complete one

    def autocast(self, device: str) -> torch.autocast:
        """Around the forward passes of a turn. Without torch's cache of bfloat16 weights: until the turn ends it would
        hold a copy of every network that the turn calls."""
        return torch.autocast(device, torch.bfloat16, enabled=self.mixed_precision == "bf16", cache_enabled=False)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class EvalConfig:
    """The recipe's `eval:` section.

    metrics: names of METRICS. num_samples: of an evaluation; quick_num_samples: of those during training.
    seed: sample i has seed `seed + i`. reference: "digits" (the 599 held-out ones) or a folder of images, each with an
    optional caption in a .txt of the same name; none for mixtures, whose law is exact.
    features: the network of fid, diversity and precision_recall; inception_weights: for inception, a local file, or
    org/name/file.pth on the hub. scorers: the keys of metrics that are rewards with networks, by name, as
    `rewards.parts` takes them: {clip_score: {path: ...}}.
    prompts: a file with one a line, a list, or "neutral", the 64 that ship; the reference's own if left out, and drawn
    labels for mixtures.
    Sample i has prompt `prompts[i % len(prompts)]`.
    teacher_steps, teacher_guidance_scale: the teacher's rows that a report compares with."""

    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    num_samples: int = Field(default=599, ge=1)
    quick_num_samples: int = Field(default=200, ge=1)
    seed: int = Field(default=0, ge=0)
    batch_size: int = Field(default=64, ge=1)
    reference: str | None = None
    features: Literal["digits", "inception"] = "digits"
    inception_weights: str | None = None
    scorers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    prompts: str | tuple[str, ...] | None = None
    teacher_steps: tuple[Annotated[int, Field(ge=1)], ...] = ()
    teacher_guidance_scale: float | tuple[float, ...] = 1.0  # several: one an expert, from high noise to low

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}{nearest(name, METRICS)}")
        if len(set(value)) < len(value):
            raise ValueError(f"each metric once, got {', '.join(value)}")
        return value

    @model_validator(mode="after")
    def _weights(self) -> "EvalConfig":
        if (self.features == "inception") != (self.inception_weights is not None):
            raise ValueError(
                "features: inception and inception_weights: <local file> go together; give both or neither"
            )
        return self

    @model_validator(mode="after")
    def _scorers(self) -> "EvalConfig":
        for name in self.scorers:
            if name not in SCORERS:
                raise ValueError(f"scorers.{name}: there is no such scorer{nearest(name, SCORERS)}")
        self._made(self.scorers)
        self.rewards()
        return self

    def rewards(self) -> dict[str, Reward]:
        """The rewards with keys that metrics measure. Raises ValueError for keys that are missing or wrong."""
        return self._made(name for name in self.metrics if name in SCORERS)

    def _made(self, names: Iterable[str]) -> dict[str, Reward]:
        try:
            return {name: make_reward(name, self.scorers.get(name, {})) for name in names}
        except ValueError as error:
            raise ValueError("\n".join(f"scorers.{line}" for line in str(error).splitlines())) from None

    def check(self) -> None:
        """Raises ValueError if files or packages that the metrics need are not there. Loads no weights."""
        for name, reward in self.rewards().items():
            try:
                reward.ready()
            except ValueError as error:
                raise ValueError(f"scorers.{name}.{error}") from None
        if self.inception_weights is not None:
            check_inception(self.inception_weights)

    def quick(self) -> "EvalConfig":
        """The same evaluation on quick_num_samples."""
        return dataclasses.replace(self, num_samples=self.quick_num_samples)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class HealthConfig:
    """When the watch speaks. All factors are ours, set so that the shipped recipes stay quiet.

    every: student updates between looks, 0 switches the watch off. num_samples: samples of one look. grace: updates
    before blurred or similar samples are warned of, as a one-step student starts from blurred means. stop: end the run
    at the first warning."""

    every: int = Field(default=50, ge=0)
    num_samples: int = Field(default=32, ge=4)
    grace: int = Field(default=100, ge=0)
    max_skipped: int = Field(default=10, ge=0)  # updates in a row whose gradient is not finite; one more stops the run
    mean_shift: float = Field(default=0.75, gt=0)  # of the samples' mean, in the teacher's standard deviations
    std_ratio: tuple[float, float] = (0.5, 1.7)  # of the samples' std over the teacher's
    saturation: float = Field(default=0.05, gt=0)  # share of values beyond three of the teacher's std, above its own
    diversity_ratio: float = Field(default=0.6, gt=0)  # of the mean distance between two samples over the teacher's
    fake_lag: float = Field(default=1.0, gt=0)  # |lag|: the fake score's own error over the gradient's energy
    grad_growth: float = Field(default=30.0, gt=1)  # of a role's gradient norm over its median so far
    movement: tuple[float, float] = (1e-7, 1.0)  # of a role's weights between two looks, relative to their size
    lead: float = Field(default=1.25, gt=0)  # of the student's relative movement over the fake score's
    held_out_drop: float = Field(default=1.0, gt=0)  # of a held-out reward from its best, in the teacher's std
    anchor_distance: float = Field(default=0.3, gt=0)  # of the samples to the teacher's, in shares of their spread
    zero_groups: float = Field(default=0.5, ge=0)  # share of prompt groups whose rewards are all equal
    clipped: float = Field(default=0.2, ge=0)  # share of advantages at the clip
    stop: bool = False


@dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class Recipe:
    """A whole run. `backbone`, `data` and `objective` are instances of the classes their `name` chose."""

    output_dir: Path
    backbone: Any
    objective: Any
    rollout: RolloutPolicy
    data: Any
    optimizers: dict[str, OptimizerConfig]
    train: TrainConfig
    eval: EvalConfig
    rewards: Composite | None = None  # for objectives that use them
    lora: dict[str, LoraConfig] = dataclasses.field(default_factory=dict)  # role -> its adapter; others train whole
    health: HealthConfig = HealthConfig()
    init_from: str | None = None  # a run or an export: its student (and fake score) are where this run starts
    seed: int = Field(default=0, ge=0)
