"""Pairs of times s <= t, at which flow maps are trained and consistency models compare two points."""

import math
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Batch
from fastgen.flow.flow_maps import SHORTEST
from fastgen.registry import MOST_BATCH, MOST_UPDATES
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler

GOLDEN = 0.6180339887498949
KARRAS_ENDS = (0.002, 80.0)  # "sigma_min = 0.002, sigma_max = 80", EDM, for data of standard deviation 0.5


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TimePairs:
    """Two draws of `time`, sorted; t is at least SHORTEST.

    diagonal: share of samples with s = t. to_zero: share with s = 0, whatever max_gap is.
    max_gap: the s of all others is at least t - max_gap.
    diagonal_level: t on the diagonal is the larger of the two draws (MeanFlow, iMF, AnyFlow), or a single draw, whose
        law is `time` (LSD, alpha-Flow). With a uniform law the larger one has the density 2 t.
    The shares are assigned by sample number, so that every batch on every process has them, up to a sample or two."""

    time: TimeSampler = TimeSampler(low=0.0, high=1.0)
    diagonal: float = Field(default=0.75, ge=0, le=1)
    diagonal_level: Literal["larger", "single"] = "larger"
    to_zero: float = Field(default=0.0, ge=0, le=1)
    max_gap: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _shares(self) -> "TimePairs":
        if self.diagonal + self.to_zero > 1:
            raise ValueError(
                f"diagonal and to_zero are shares of the samples and must add up to at most 1, got {self.diagonal:g} "
                f"and {self.to_zero:g}"
            )
        return self

    def __call__(self, batch: Batch, name: str = "pair", max_gap: float | None = None) -> tuple[Tensor, Tensor]:
        """t and s, [B] each. max_gap: replaces the field of that name, for curricula."""
        draws = [self.time(batch.uniform(f"{name}_{end}")) for end in "ts"]
        t, s = sorted_pair(*draws)
        place = places(batch, f"{name}_kind")
        if self.diagonal_level == "single":
            t = torch.where(place < self.diagonal, draws[0], t)
        t = t.clamp_min(SHORTEST)
        s = torch.maximum(s, t - (self.max_gap if max_gap is None else max_gap))
        s = torch.where(place < self.diagonal, t, torch.minimum(s, t))
        return t, torch.where(place >= 1 - self.to_zero, torch.zeros_like(s), s)


def places(batch: Batch, name: str) -> Tensor:
    """[B] float64 in [0, 1): places of the samples, so evenly spread that each share of the interval has its share of
    any run of sample numbers, up to a sample or two. All of them move together from update to update."""
    return (batch.ids.double() * GOLDEN + batch.integer(name, 1 << 20) / (1 << 20)) % 1


def sorted_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The larger and the smaller of two draws."""
    return torch.maximum(a, b), torch.minimum(a, b)


def between(s: Tensor | float, t: Tensor | float, u: Tensor) -> Tensor:
    """s + u (t - s): a time in the interval."""
    return s + u * (t - s)


def shifted(u: Tensor, shift: float) -> Tensor:
    """shift u / (1 + (shift - 1) u): the resolution shift of flow models. Its inverse has shift 1 / shift."""
    return shift * u / (1 + (shift - 1) * u)


def phase_edges(t: Tensor, phases: int, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """Lower and upper edge of the phase that t is in; edges are at shifted(k / phases)   (PCM, arXiv 2405.18407)

    A phase is open below and closed above: an edge belongs to the phase below it."""
    place = (shifted(t.double(), 1 / shift) * phases - 1e-6).floor().clamp_min(0)
    low, high = (shifted(k / phases, shift).to(t.dtype) for k in (place, place + 1))
    return low, high


def shrinking(t: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """r = t max(0, 1 - q^-(stage + 1) (1 + k sigmoid(-b t))): the gap narrows at each stage   (ECT, arXiv 2406.14548)

    t: the sigmas of EDM, for data of standard deviation 0.5."""
    return t * (1 - q ** -(stage + 1) * (1 + k * torch.sigmoid(-b * t))).clamp_min(0)


def karras(u: Tensor, sigma_data: float) -> Tensor:
    """Levels t whose sigma goes from 0.002 at u = 0 to 80 at u = 1 by the power 1/7            (EDM, arXiv 2206.00364)

    u: any shape. sigma_data: the standard deviation of the data for which these ends are stated, where that of the
    latents is 1."""
    low, high = (sigma ** (1 / 7) for sigma in KARRAS_ENDS)
    ratio = (low + u * (high - low)) ** 7 / sigma_data
    return ratio / (1 + ratio)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class GridPairs:
    """Neighbours on a grid of levels 0 = t_0 < ... < t_n = 1: t = t_i and s = t_{i - 1}.

    count: n. last: if given, n grows from count to last within `updates` updates, by
        square_root  n = ceil(sqrt(k / K ((last + 1)^2 - (count + 1)^2) + (count + 1)^2) - 1)  (CM, arXiv 2303.01469)
        doubling     n = min(count 2^floor(k / K'), last),  K' = floor(K / (log2 floor(last / count) + 1))
                                                                                               (iCT, arXiv 2310.14189)
    CM's N is a number of levels, and n one of intervals: N = n + 1. iCT's s_0 and s_1 are numbers of intervals. Rows
    cm_schedule and ict_schedule have both rules.
    spacing: uniform, which shift moves towards noise; or karras, sigmas from 0.002 to 80 by the power 1/7 (EDM, arXiv
        2206.00364). The first and the last level are then 0 and 1, where this path ends; all others are EDM's.
    sigma_data: the standard deviation of the data for which 0.002 and 80 are stated, where that of the latents is 1.
    time: the interval is the one that a draw of this law falls in (iCT: lognormal); None: all are equally likely.
        Draws beyond the ends count for the outer intervals (half a percent with iCT's law, which leaves them out)."""

    count: int = Field(ge=1, le=MOST_BATCH)
    last: int | None = Field(default=None, ge=1, le=MOST_BATCH)
    growth: Literal["square_root", "doubling"] = "square_root"
    updates: int = Field(default=0, ge=0, le=MOST_UPDATES)
    spacing: Literal["uniform", "karras"] = "uniform"
    shift: float = Field(default=1.0, gt=0)
    sigma_data: float = Field(default=0.5, gt=0)  # EDM's, CM's and iCT's unit; row cm_levels
    time: TimeSampler | None = None

    @model_validator(mode="after")
    def _growing(self) -> "GridPairs":
        if self.last is not None and (self.last < self.count or not self.updates):
            raise ValueError(
                f"the grid grows from count: {self.count} to last: {self.last} in updates: {self.updates}"
                "; last must be at least count, and updates at least 1"
            )
        if self.spacing == "karras" and self.shift != 1:
            raise ValueError(f"shift is for spacing: uniform, got {self.shift:g}; leave it out with spacing: karras")
        return self

    def intervals(self, update: int) -> int:
        """n at an update, which is counted from 0."""
        if self.last is None:
            return self.count
        if self.growth == "doubling":
            period = max(1, math.floor(self.updates / (math.log2(self.last // self.count) + 1)))
            return min(self.count * 2 ** min(update // period, 60), self.last)
        low, high = (self.count + 1) ** 2, (self.last + 1) ** 2
        return math.ceil(math.sqrt(min(update / self.updates, 1.0) * (high - low) + low) - 1)

    def levels(self, update: int) -> Tensor:
        """[n + 1] float64, from 0 to 1."""
        u = torch.linspace(0, 1, self.intervals(update) + 1, dtype=torch.float64)
        if self.spacing == "uniform":
            return shifted(u, self.shift)
        levels = karras(u, self.sigma_data)
        levels[0], levels[-1] = 0.0, 1.0
        return levels

    def end_ratios(self, update: int) -> tuple[float, float]:
        """The noise-to-signal ratios that the first and the last level stand for: those of 0.002 and 80 with karras;
        with uniform 0, and for the last level that of the middle of its interval (ours)."""
        if self.spacing == "karras":
            low, high = (sigma / self.sigma_data for sigma in KARRAS_ENDS)
            return low, high
        t = (1 + float(self.levels(update)[-2])) / 2
        return 0.0, t / (1 - t)

    def __call__(
        self, batch: Batch, update: int, name: str = "pair", shape: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """t and s < t, [B, *shape] each."""
        levels, u = self.levels(update).to(batch.ids.device), batch.uniform(name, shape=shape)
        if self.time is None:
            index = (u.double() * (len(levels) - 1)).long() + 1
        else:
            index = torch.searchsorted(levels, self.time(u).double())
        index = index.clamp(1, len(levels) - 1)
        return levels[index].to(u.dtype), levels[index - 1].to(u.dtype)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ShrinkingPairs:
    """A level and a lower one, with a gap that narrows every `period` updates: `shrinking`  (ECT, arXiv 2406.14548)

    Computed in sigma = sigma_data t / (1 - t), the authors' time, which is for data of standard deviation sigma_data
    where that of the latents is 1. cap: the largest r / t. Row ect_levels compares r with the authors' code, and
    ect_loss the law of t."""

    period: int = Field(ge=1, le=MOST_UPDATES)  # updates per stage; the authors' stages have 2 to 12 million images
    # "lognormal(-1.1, 2)" of sigma, CIFAR-10
    time: TimeSampler = TimeSampler("logit_normal", 0.0, 1.0, mean=-1.1, std=2.0, sigma_data=0.5)
    sigma_data: float = Field(default=0.5, gt=0)  # EDM's images in [-1, 1]
    q: float = Field(default=2.0, gt=1)  # 2 CIFAR-10, 4 ImageNet; 256 in the one-hour run
    k: float = Field(default=8.0, ge=0)  # "k = 8"
    b: float = Field(default=1.0, gt=0)  # "b = 1", per unit of sigma
    cap: float = Field(default=0.999, gt=0, lt=1)  # 0.9961 on ImageNet; the released CIFAR-10 code has none

    def __call__(
        self, batch: Batch, update: int, name: str = "pair", shape: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """t and s < t, [B, *shape] each."""
        t = self.time(batch.uniform(name, shape=shape)).double().clamp(SHORTEST, 1 - 1e-6)
        return t.to(batch.dtype), self.below(t, update).to(batch.dtype)

    def below(self, t: Tensor, update: int) -> Tensor:
        """s of levels t below 1, any shape, in float64."""
        t = t.double()
        sigma = self.sigma_data * t / (1 - t)
        r = torch.minimum(shrinking(sigma, update // self.period, self.q, self.k, self.b), self.cap * sigma)
        return r / (self.sigma_data + r)

    def end_ratios(self, update: int) -> tuple[float, float]:
        """The noise-to-signal ratios of levels 0 and 1; no pair begins at 1."""
        return 0.0, math.inf


def ratio_gap(t: Tensor, s: Tensor, ends: tuple[float, float]) -> Tensor:
    """The gap in noise-to-signal ratio t / (1 - t) of the levels s < t, which is that of sigma in units of sigma_data.

    ends: the ratios that levels 0 and 1 stand for (`GridPairs.end_ratios`), because that of 1 is infinite and CM's
    paths end at 0.002. t, s: any shape. Computed in float64, and returned in the dtype of t."""

    def ratio(level: Tensor) -> Tensor:
        level = level.double()
        inside = level / (1 - level)
        return torch.where(level <= 0, ends[0], torch.where(level >= 1, ends[1], inside))

    return (ratio(t) - ratio(s)).to(t.dtype)


def check_scales(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] < value[1]:
        raise ValueError(f"a range of guidance scales must be [low, high] with 0 <= low < high, got {list(value)}")
    return value


ScaleRange = Annotated[tuple[float, float], AfterValidator(check_scales)]


def drawn_scale(batch: Batch, scales: ScaleRange) -> Tensor:
    """[B]: guidance scales in [low, high], one per sample. The same batch always gives the same scales."""
    return between(*scales, batch.uniform("guidance"))


def check_told(policy: RolloutPolicy, scales: ScaleRange | None) -> None:
    """Raises ValueError if a sampler gives the student a guidance scale that it does not learn."""
    scale = policy.embedded_guidance
    if scale is not None and (scales is None or not scales[0] <= scale <= scales[1]):
        learned = "not set" if scales is None else list(scales)
        raise ValueError(
            f"rollout.embedded_guidance {scale:g} must lie in the range of scales that the student learns, "
            f"objective.guidance_range, which is {learned}"
        )
