"""Pairs of times s <= t: where a flow map is trained, and where consistency models compare two points."""

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Batch
from fastgen.flow_maps import SHORTEST
from fastgen.schedule import TimeSampler

GOLDEN = 0.6180339887498949


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TimePairs:
    """Two draws of `time`, sorted; t is at least SHORTEST.

    diagonal: share of samples with s = t. to_zero: share with s = 0. max_gap: s is at least t - max_gap.
    Shares go by sample number, so that every batch of every process has them, to a sample or two."""

    time: TimeSampler = TimeSampler(low=0.0, high=1.0)
    diagonal: float = Field(default=0.75, ge=0, le=1)
    to_zero: float = Field(default=0.0, ge=0, le=1)
    max_gap: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _shares(self) -> "TimePairs":
        if self.diagonal + self.to_zero > 1:
            raise ValueError(f"diagonal and to_zero are shares of one batch: {self.diagonal:g} + {self.to_zero:g} > 1")
        return self

    def __call__(self, batch: Batch, name: str = "pair", max_gap: float | None = None) -> tuple[Tensor, Tensor]:
        """t and s, [B] each. max_gap: instead of the field, for curricula."""
        t, s = sorted_pair(*(self.time(batch.uniform(f"{name}_{end}")) for end in "ts"))
        t = t.clamp_min(SHORTEST)
        s = torch.maximum(s, t - (self.max_gap if max_gap is None else max_gap))
        place = (batch.ids.double() * GOLDEN + batch.integer(f"{name}_kind", 1 << 20) / (1 << 20)) % 1
        s = torch.where(place < self.diagonal, t, torch.minimum(s, t))
        return t, torch.where(place >= 1 - self.to_zero, torch.zeros_like(s), s)


def sorted_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The larger and the smaller of two draws."""
    return torch.maximum(a, b), torch.minimum(a, b)


def between(s: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """s + u (t - s): a time of the interval."""
    return s + u * (t - s)


def phase_start(t: Tensor, phases: int) -> Tensor:
    """The lower edge of the phase (k / phases, (k + 1) / phases] that t is in       (PCM, arXiv 2405.18407)"""
    return ((t.double() * phases - 1e-9).floor().clamp_min(0) / phases).to(t.dtype)


def shrinking(t: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """r = t max(0, 1 - q^-(stage + 1) (1 + k sigmoid(-b t))): the gap narrows by stages       (ECT, arXiv 2406.14548)

    t: noise-to-signal ratios, the authors' EDM clock."""
    return t * (1 - q ** -(stage + 1) * (1 + k * torch.sigmoid(-b * t))).clamp_min(0)
