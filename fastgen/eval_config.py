"""The recipe's `eval:` section, and the same keys from the command line."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from fastgen.metrics import METRICS
from fastgen.metrics.features import check_inception
from fastgen.rewards import SCORERS, Reward, make_reward


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
                close = difflib.get_close_matches(name, METRICS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(METRICS)}"
                raise ValueError(f"unknown metric {name!r}; {hint}")
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
                close = difflib.get_close_matches(name, SCORERS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(SCORERS)}"
                raise ValueError(f"scorers.{name}: there is no such scorer; {hint}")
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


def merged_scorers(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The keys of scorers, those of the second over those of the first, a scorer at a time."""
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in {**first, **second}}


def scorer_keys(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The keys of scorers as options of the command line: NAME=PATH, or NAME.KEY=VALUE, the value read as YAML.
    Raises ValueError for anything else."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name, _, key = name.partition(".")
        if not equals or not name or not value:
            raise ValueError(f"--scorer {text}: write NAME=PATH, or NAME.KEY=VALUE")
        found.setdefault(name, {})[key or "path"] = yaml.safe_load(value) if key else value
    return found
