"""The sections of a recipe as frozen pydantic dataclasses: their keys, defaults and ranges.

`backbone`, `objective`, `data` and each entry of `rewards.parts` name a class, and the fields of that class are their
keys. The other sections are the classes below. `config` reads a recipe from YAML and checks that sections fit
each other. Importing this module does not import torch, so that a mistake in these sections is answered at once."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from fastgen.modules.lora_config import LoraConfig
from fastgen.pipelines.router import Part
from fastgen.policy import RolloutPolicy
from fastgen.registry import METRICS, MOST_BATCH, MOST_SAMPLES, MOST_SEED, MOST_STEPS, MOST_UPDATES, SCORERS, nearest


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class OptimizerConfig:
    """AdamW with a linear warm-up and a decay towards zero at the last student update.

    The rate at student update k of n is lr * min(1, (k + 1) / warmup) * decay(k / n), where decay is 1 (constant),
    falls linearly to 0, or follows half a cosine to 0, over the last `decay_fraction` of the run.
    kind: adamw_fused is torch's fused kernel, which updates all parameters in one pass and needs no temporary memory;
    the same update up to rounding. adamw_8bit has moments in 8 bits, and paged_adamw_8bit those in memory that host
    and GPU share (bitsandbytes, arXiv 2110.02861)."""

    lr: float = Field(gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=10.0, gt=0)
    warmup: int = Field(default=0, ge=0, le=MOST_UPDATES)
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_fraction: float = Field(default=1.0, gt=0, le=1)
    kind: Literal["adamw", "adamw_fused", "adamw_8bit", "paged_adamw_8bit"] = "adamw"

    @property
    def is_8bit(self) -> bool:
        return self.kind.endswith("8bit")

    def rate(self, update: int, total: int) -> float:
        """The learning rate at 0-based student update `update` of `total`."""
        start = 1 - self.decay_fraction
        progress = min(max((update / total - start) / self.decay_fraction, 0.0), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": cosine}[self.decay]
        return self.lr * decay * (min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TrainConfig:
    """The training loop. One step is one student update. Every `*_every` counts steps, and 0 switches the event off.

    strategy: how several processes share the work. ddp: each process holds every network; fsdp: networks are sharded
    (`fully_shard`); auto: fsdp if the launcher was configured for it, otherwise ddp. num_processes: if given, a run
    with any other number is refused (accelerate's `--cpu --num_processes 2` starts one process).
    shard_group: for fsdp, how many processes share one copy of the networks (hybrid sharding); neighbours share one,
    and gradients are averaged between copies. None: all processes share one copy.
    reduce_gradients: for fsdp with accumulate > 1, when gradients are reduced to shards. update: in the last
    micro-batch; until then each process holds whole gradients of the turn's roles. micro_batch: in each one, which
    needs no memory and communicates `accumulate` times as much.
    prefetch: how many micro-batches are read and encoded in a thread while the networks work; ODE pairs never are.
    readers: how many threads read and decode pictures and videos.
    checkpoint_async: checkpoints are written in a thread, from a copy that takes as many bytes of the host. False:
    training waits, and one tensor at a time is on the host. On by default (ours): GPUs' hosts mostly have the room."""

    steps: int = Field(ge=1, le=MOST_UPDATES)
    batch_size: int = Field(ge=1, le=MOST_BATCH)  # samples per micro-batch and process
    accumulate: int = Field(default=1, ge=1, le=MOST_STEPS)  # micro-batches per inner update
    prefetch: int = Field(default=1, ge=0, le=MOST_STEPS)
    readers: int = Field(default=4, ge=1, le=256)
    mixed_precision: Literal["no", "bf16"] = "no"  # of forward passes; weights and optimizers stay float32
    dtype: Literal["float32", "float64"] = "float32"
    # of the teacher; None: as dtype; float8: its matrices, and the rest in bfloat16
    frozen_dtype: Literal["float32", "float64", "bfloat16", "float16", "float8"] | None = None
    gradient_checkpointing: bool = False  # the backward pass recomputes activations, block by block
    compile: bool = False  # torch.compile of the blocks that networks repeat, each kind once
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    num_processes: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    shard_group: int | None = Field(default=None, ge=2, le=MOST_STEPS)
    reduce_gradients: Literal["update", "micro_batch"] = "update"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tf32: bool = False  # float32 matrix products of a GPU in TensorFloat-32; convolutions are, by torch's default
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    ema_device: Literal["train", "cpu"] = "train"  # where the moving average is kept; cpu: on the device to sample
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    log_every: int = Field(default=10, ge=1, le=MOST_UPDATES)
    sample_every: int = Field(default=100, ge=0, le=MOST_UPDATES)
    num_samples: int = Field(default=16, ge=1, le=MOST_STEPS)
    eval_every: int = Field(default=0, ge=0, le=MOST_UPDATES)
    checkpoint_every: int = Field(default=200, ge=0, le=MOST_UPDATES)
    keep_checkpoints: int = Field(default=2, ge=1, le=MOST_UPDATES)
    checkpoint_async: bool = True
    resume_from: str | None = None  # a checkpoint such as step_00000200; None: the newest complete one

    def autocast(self, device: str) -> AbstractContextManager[Any]:
        """The context for the forward passes of a turn. torch's cache of bfloat16 weights is off: until the turn ends,
        it would hold a copy of every network that the turn calls."""
        import torch

        return torch.autocast(device, torch.bfloat16, enabled=self.mixed_precision == "bf16", cache_enabled=False)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class EvalConfig:
    """The recipe's `eval:` section.

    metrics: names in METRICS.
    num_samples: samples per evaluation; quick_num_samples: samples per evaluation during training.
    seed: sample i has seed `seed + i`.
    reference: a folder of images, with captions in a table or in .txt files; "digits", the 599 held-out ones; or
        "teacher", its samples of the same prompts with the most of teacher_steps (or 50) and teacher_guidance_scale,
        whose seeds come behind those of the evaluation. One of several students is compared with the images whose
        captions belong to its part. Mixtures need none, because their law is known exactly.
    features: the network for fid, mmd, diversity and precision_recall. latents: the pipeline's VAE, which needs no
        download and sees colours and coarse shapes only.
    inception_weights: for features: inception, a local file, or org/name/file.pth on the hub.
    clip: for features: clip, a transformers CLIPModel with its tokenizer, as a folder or a hub id.
    scorers: for metrics that are rewards with networks, name -> keys as in `rewards.parts`: {clip_score: {path: ...}}.
    images: a folder of pictures, for a backbone that makes its samples from images, or of control videos, for one that
        takes such (`data.controls`). Sample i is made from `images[i % len(images)]`, sorted by name. If there are no
        prompts, they are the texts next to these files.
    prompts: a file with one prompt per line, a list, or "neutral", the 64 prompts that ship with fastgen. If left out,
        they are those of the reference or, for mixtures, drawn labels. Sample i has prompt
        `prompts[i % len(prompts)]`, unless there are more prompts than samples. Pictures of a folder that is measured
        need one for each of its files, in the order of their names, or one for all.
    choice: which are taken of more prompts, pictures of the reference or given images than samples. spread: a random
        choice over the whole list, which depends on `seed` and on the length of the list alone, so that lists of one
        length stay paired. first: the first ones, as in version 0.2.0. So are the samples chosen that are compared
        with a reference of fewer pictures, unless their prompts are the reference's own, of which each comes first.
    teacher_steps, teacher_guidance_scale: the teacher's rows that a report compares the student with."""

    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    num_samples: int = Field(default=599, ge=1, le=MOST_SAMPLES)
    quick_num_samples: int = Field(default=200, ge=1, le=MOST_SAMPLES)
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    batch_size: int = Field(default=64, ge=1, le=MOST_BATCH)
    reference: str | None = None
    features: Literal["digits", "inception", "clip", "latents"] = "digits"
    inception_weights: str | None = None
    clip: str | None = None
    scorers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    images: str | None = None
    prompts: str | tuple[str, ...] | None = None
    choice: Literal["spread", "first"] = "spread"
    teacher_steps: tuple[Annotated[int, Field(ge=1, le=MOST_STEPS)], ...] = ()
    # or one per expert, from high noise to low; None: the scale that the objective distils
    teacher_guidance_scale: float | tuple[float, ...] | None = None

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}{nearest(name, METRICS)}")
        if len(set(value)) < len(value):
            raise ValueError(f"name each metric once, got {', '.join(value)}")
        return value

    @model_validator(mode="after")
    def _weights(self) -> "EvalConfig":
        if (self.features == "inception") != (self.inception_weights is not None):
            raise ValueError(
                "features: inception needs inception_weights, a local file or org/name/file.pth on the hub, and other "
                f"features take none; got features: {self.features} and inception_weights: {self.inception_weights}"
            )
        if (self.features == "clip") != (self.clip is not None):
            raise ValueError(
                "features: clip needs clip, the folder or hub id of a CLIPModel, and other features take none; got "
                f"features: {self.features} and clip: {self.clip}"
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

    def rewards(self) -> dict[str, Any]:
        """The scorers that are among the metrics. Raises ValueError for keys that are missing or wrong."""
        return self._made(name for name in self.metrics if name in SCORERS)

    def readers(self) -> list[str]:
        """The metrics that compare samples with their prompts, or by them."""
        from fastgen import metrics

        made = self.rewards()
        return [n for n in self.metrics if (made[n] if n in made else metrics.METRICS[n]).reads_prompts]

    def _made(self, names: Iterable[str]) -> dict[str, Any]:
        if not (chosen := list(names)):
            return {}
        from fastgen.rewards import make_reward

        try:
            return {name: make_reward(name, self.scorers.get(name, {})) for name in chosen}
        except ValueError as error:
            raise ValueError("\n".join(f"scorers.{line}" for line in str(error).splitlines())) from None

    def check(self) -> None:
        """Raises ValueError if files or packages that the metrics need are missing, or if there are no prompts or no
        real images where the section says that they are. Loads no weights."""
        from fastgen.data.prompts import read_prompts
        from fastgen.metrics.features import check_clip, check_inception
        from fastgen.metrics.reference import TEACHER, given_files, given_prompts, open_reference

        if self.reference == TEACHER and self.prompts is None and self.images is None:
            raise ValueError("prompts: reference: teacher has none of its own; give a file or a list of prompts")
        folder = None if self.reference in ("digits", TEACHER) else self.reference  # digits ship with fastgen
        for key, value, read in (
            ("prompts", self.prompts, read_prompts),
            ("reference", folder, open_reference),
            ("images", self.images, given_prompts if self.prompts is None else given_files),
        ):
            if value is not None:
                try:
                    read(value)  # type: ignore[arg-type]
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from None
        for name, reward in self.rewards().items():
            try:
                reward.ready()
            except ValueError as error:
                raise ValueError(f"scorers.{name}.{error}") from None
        if self.inception_weights is not None:
            check_inception(self.inception_weights)
        if self.clip is not None:
            check_clip(self.clip)

    def check_repeats(self, prompts: Sequence[str]) -> None:
        """Raises ValueError if a metric compares the samples of one prompt, and the samples of a choice of these
        prompts all have different ones."""
        from fastgen import metrics

        needing = [name for name in self.metrics if metrics.METRICS[name].compares_within_prompts]
        if needing and len({prompts[i] for i in self.rows(len(prompts))}) == self.num_samples:
            raise ValueError(
                f"metrics: {needing[0]} compares samples of one prompt, and the prompts of {self.num_samples} samples "
                f"are all different; leave {needing[0]} out, or give fewer prompts"
            )

    def rows(self, length: int) -> list[int]:
        """Which entry of a list each sample has: all in turn, or of a longer list those that `choice` says."""
        if length <= self.num_samples or self.choice == "first":
            return [i % length for i in range(self.num_samples)]
        from fastgen.data.order import permutation
        from fastgen.noise import make_key

        return permutation(length, make_key(self.seed, "eval choice"), 0)[: self.num_samples].tolist()

    def quick(self) -> "EvalConfig":
        """The same evaluation with quick_num_samples samples."""
        return dataclasses.replace(self, num_samples=min(self.quick_num_samples, self.num_samples))


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class HealthConfig:
    """When the watch warns. All thresholds are ours, set so that the shipped recipes give no warnings.

    every: student updates between two looks; 0 switches the watch off. num_samples: samples per look. grace: updates
    before the watch warns of blurred or similar samples, because a one-step student starts from blurred means. stop:
    whether the first warning ends the run."""

    every: int = Field(default=50, ge=0, le=MOST_UPDATES)
    num_samples: int = Field(default=32, ge=4, le=MOST_STEPS)
    grace: int = Field(default=100, ge=0, le=MOST_UPDATES)
    # non-finite gradients allowed in a row; one more stops the run
    max_skipped: int = Field(default=10, ge=0, le=MOST_UPDATES)
    mean_shift: float = Field(default=0.75, gt=0)  # shift of the samples' mean, in the teacher's standard deviations
    std_ratio: tuple[float, float] = (0.5, 1.7)  # allowed range of the samples' std divided by the teacher's
    saturation: float = Field(default=0.05, gt=0)  # share of values beyond 3 std of the teacher, minus the teacher's
    diversity_ratio: float = Field(default=0.6, gt=0)  # mean distance between two samples, divided by the teacher's
    fake_lag: float = Field(default=1.0, gt=0)  # |lag| of the fake score, see signals.lag_terms
    grad_growth: float = Field(default=30.0, gt=1)  # a role's gradient norm, divided by its median so far
    movement: tuple[float, float] = (1e-7, 1.0)  # allowed relative change of weights between two looks
    lead: float = Field(default=1.25, gt=0)  # the student's relative movement, divided by the fake score's
    held_out_drop: float = Field(default=1.0, gt=0)  # drop of a held-out reward from its best, in the teacher's std
    anchor_distance: float = Field(default=0.3, gt=0)  # of the samples from the teacher's, relative to their spread
    zero_groups: float = Field(default=0.5, ge=0)  # share of prompt groups in which all rewards are equal
    clipped: float = Field(default=0.2, ge=0)  # share of advantages at the clip
    stop: bool = False


@dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class Recipe:
    """A whole run. `backbone`, `data` and `objective` are instances of the classes that their `name` chose."""

    output_dir: Path
    backbone: Any
    objective: Any
    rollout: RolloutPolicy
    data: Any
    optimizers: dict[str, OptimizerConfig]
    train: TrainConfig
    eval: EvalConfig
    rewards: Any = None  # a rewards.Composite, for objectives that use them
    lora: dict[str, LoraConfig] = dataclasses.field(default_factory=dict)  # role -> its adapter; others train whole
    health: HealthConfig = HealthConfig()
    init_from: str | None = None  # a run, an export or a pipeline folder whose student this run starts from
    part: Part | None = None  # the prompts that this student is for, if it is one of several
    seed: int = Field(default=0, ge=0, le=MOST_SEED)

    @property
    def teacher_guidance(self) -> float | tuple[float, ...]:
        """The guidance scale of the teacher wherever a run shows it, measures it or compares with it: what
        `eval.teacher_guidance_scale` says, or else the scale that the objective distils."""
        said = self.eval.teacher_guidance_scale
        return self.objective.teacher_guidance if said is None else said
