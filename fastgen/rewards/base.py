"""The interface of a reward, which gives each sample with its prompt one number. Higher is better."""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.backbones.base import BackboneConfig
from fastgen.schedule import expand

Input = Literal["pixels", "frames", "latents", "points"]
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclasses.dataclass(frozen=True)
class Score:
    """value: [B] float32, higher is better. valid: [B] bool. An invalid sample adds nothing to a loss (over which
    samples that is a mean, each objective says); its value 0 is a placeholder, not a score. parts: [B] each, detached,
    for logging."""

    value: Tensor
    valid: Tensor
    parts: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def own(self) -> dict[str, Tensor]:
        """The individual scores: the parts, or the value itself if there are no parts."""
        return self.parts or {"reward": self.value.detach()}

    def terms(self) -> dict[str, Tensor]:
        """For Loss.terms: the means over valid samples, `reward` and `reward_<part>`, and the share of valid samples,
        `reward_valid`."""
        count = self.valid.sum().clamp_min(1)
        named = {"reward": self.value.detach()} | {f"reward_{name}": part for name, part in self.parts.items()}
        means = {name: torch.where(self.valid, value, 0).sum() / count for name, value in named.items()}
        return means | {"reward_valid": self.valid.float().mean()}


@dataclass(frozen=True, config=CONFIG)
class Reward(ABC):
    """One part of the recipe's `rewards:` section. Subclasses are frozen pydantic dataclasses that implement `score`.

    input: pixels [B, 3, H, W] or frames [B, F, 3, H, W] in [0, 1], latents [B, *latent_shape], or points [B, D].
    differentiable: whether gradient flows from the score to the input.
    weight: the weight of this part in the composite; negative if a lower score is better.
    mean, std: those of the score over the teacher's samples, for `calibration: zscore`."""

    input: ClassVar[Input]
    differentiable: ClassVar[bool]
    reads_prompts: ClassVar[bool] = True  # whether the score compares a sample with its prompt

    weight: float = Field(default=1.0, kw_only=True)
    mean: float = Field(default=0.0, kw_only=True)
    std: float | None = Field(default=None, gt=0, kw_only=True)

    @abstractmethod
    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor | Score:
        """x: float32, as `input` says. prompts: one per sample. Returns [B], not finite where a sample has no score,
        or a Score that marks invalid samples itself. Preprocessing belongs here. It must be in torch if the reward is
        differentiable."""

    def __call__(self, x: Tensor, prompts: Sequence[str]) -> Score:
        """The score in float32, also under autocast. Samples without a score get neither value nor gradient.

        Raises ValueError if `score` does not return one number per sample."""
        node = x.float().view_as(x)  # separate in the graph, gets the gradient of this reward only
        with torch.autocast(x.device.type, enabled=False):
            result = self.score(node, prompts)
        result = result if isinstance(result, Score) else Score(result, torch.ones_like(result, dtype=torch.bool))
        value = result.value.to(x.device, torch.float32)
        if value.shape != (len(x),):
            raise ValueError(
                f"reward {self.label} must give {len(x)} numbers, one per sample, got {list(value.shape)}"
            )
        valid = result.valid.to(x.device) & value.isfinite()
        if node.requires_grad:  # a score that is not finite has NaN gradients even if its value is not used
            node.register_hook(lambda grad: torch.where(expand(valid, grad), grad, 0))
        parts = {name: part.detach().to(x.device, torch.float32) for name, part in result.parts.items()}
        return Score(torch.where(valid, value, 0), valid, parts)

    def check(self, config: BackboneConfig) -> None:
        """Raises ValueError, before weights load, if this backbone's samples are not what the reward reads, or if
        files of the reward are missing."""
        self.ready()
        if self.input not in ("latents", config.output):
            raise ValueError(
                f"{self.label} reads {self.input}, but backbone {config.name} gives {config.output}; "
                f"choose a reward that reads {config.output} or latents"
            )

    def ready(self) -> None:  # noqa: B027 - most rewards have no files
        """Raises ValueError if a local file or a package that the reward needs is missing. Loads no weights and makes
        no network requests."""

    def weight_files(self) -> list[Path]:
        """The files that the reward's networks are read from. Files of a hub id are downloaded first."""
        return []

    def other_files(self) -> list[Path]:
        """The other files that decide the scores: configs, tokenizers, a judge's question. Downloaded as the weights
        are."""
        return []

    @property
    def input_size(self) -> str:
        """How a picture is resized for the reward's network, in words."""
        return "the picture as it is"

    def facts(self) -> dict[str, Any]:
        """What is needed to repeat the reward's numbers: its keys, its input, and the sha256 of its weights and of its
        other files."""
        from fastgen.sampling.sampler import sha256

        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        keys = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        for name in ("weight", "mean", "std"):  # these belong to the composite, not to the score
            keys.pop(name)
        hashes = {file.name: sha256(file) for file in self.weight_files()}
        others = [f"{sha256(file)}  {file.name}" for file in self.other_files()]
        files = {"weights": hashes} | ({"files": others} if others else {})
        return keys | {"input": self.input, "input_size": self.input_size, **files}

    @property
    def label(self) -> str:
        """The reward's name in logs: the class name, in lower case with underscores."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()
