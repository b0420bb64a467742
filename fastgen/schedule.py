"""Noise schedules: x_t = alpha(t) x0 + sigma(t) noise, with t = 0 data and t = 1 noise.

All conversions between what networks predict and what objectives need are in this file. They run in at least float32;
DMD2 does its epsilon -> x0 conversion in double (tianweiy/DMD2 main/sd_guidance.py).
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

PredictionType = Literal["sample", "epsilon", "v_prediction", "flow_prediction"]


def expand(value: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, F] values broadcast over the remaining axes of `like` [B, (F,) ...]."""
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim()))


class Schedule(ABC):
    """alpha(t) and sigma(t), for float t in [0, 1] of any shape. Subclasses: FlowSchedule, VPSchedule."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of x0, alpha(0) = 1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise, sigma(0) = 0."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """The timestep that a diffusers network expects at noise level t."""

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), broadcast over `like`, in its dtype but at least float32."""
        t = t.to(torch.promote_types(like.dtype, torch.float32))
        return expand(self.alpha(t), like), expand(self.sigma(t), like)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) noise."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0 + sigma * noise

    def renoise_coefficients(self, s: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_{t|s} = alpha_t / alpha_s and sigma_{t|s}, sigma_{t|s}^2 = sigma_t^2 - alpha_{t|s}^2 sigma_s^2."""
        if bool((t < s).any()):
            raise ValueError("renoise only adds noise, so it needs t >= s for every sample; some t here are below s")
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.coefficients(s, like), self.coefficients(t, like)
        if bool((alpha_s == 0).any()):
            raise ValueError("renoise must start at a level with some signal left; a flow schedule has none at s = 1")
        ratio = alpha_t / alpha_s
        return ratio, (sigma_t**2 - (ratio * sigma_s) ** 2).clamp_min(0).sqrt()

    def renoise(self, x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """From level s to level t >= s. At s = 0 this is add_noise. Going s -> r -> t gives the same law of x_t."""
        ratio, sigma = self.renoise_coefficients(s, t, x_s)
        return ratio * x_s + sigma * noise

    def lowered(self, t: Tensor, gamma: float) -> Tensor:
        """The level below t that a stochastic step to t jumps to before noise is added: (1 - gamma) t."""
        return (1 - gamma) * t

    def to_sample(self, prediction: Tensor, x_t: Tensor, t: Tensor, kind: PredictionType) -> Tensor:
        """Converts a network output of any kind to an x0 prediction.

        sample: the output itself;  epsilon: (x_t - sigma e) / alpha;  v_prediction (v = alpha noise - sigma x0) and
        flow_prediction (v = noise - x0): x0 solved from that definition and x_t = alpha x0 + sigma noise."""
        if kind == "sample":
            return prediction
        alpha, sigma = self.coefficients(t, x_t)
        if kind == "epsilon":
            return (x_t - sigma * prediction) / alpha
        if kind == "v_prediction":
            return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)
        return (x_t - sigma * prediction) / (alpha + sigma)

    def from_sample(self, x0: Tensor, x_t: Tensor, t: Tensor, kind: PredictionType) -> Tensor:
        """The inverse of to_sample: the output that a network of this kind would need for this x0. Needs sigma(t) > 0
        unless kind is sample."""
        if kind == "sample":
            return x0
        alpha, sigma = self.coefficients(t, x_t)
        noise = (x_t - alpha * x0) / sigma
        if kind == "epsilon":
            return noise
        return alpha * noise - sigma * x0 if kind == "v_prediction" else noise - x0

    def score(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t) = (alpha x0_prediction - x_t) / sigma^2."""
        alpha, sigma = self.coefficients(t, x_t)
        return (alpha * x0 - x_t) / sigma**2


class FlowSchedule(Schedule):
    """Flow matching: alpha = 1 - t, sigma = t. Networks are given num_train_timesteps * t."""

    def __init__(self, num_train_timesteps: int = 1000):
        self.num_train_timesteps = num_train_timesteps

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def network_time(self, t: Tensor) -> Tensor:
        return t * self.num_train_timesteps


class VPSchedule(Schedule):
    """Variance preserving, alpha^2 + sigma^2 = 1, from the cumulative products of a discrete diffusion.

    alphas_cumprod: [N], decreasing in (0, 1). Level t = (i + 1) / N is exactly the discrete step i. Between the steps
    (and down to t = 0, where alpha = 1) alpha^2 is interpolated linearly. Networks are given N t - 1, clamped at 0."""

    def __init__(self, alphas_cumprod: Tensor):
        self.table = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()])

    def alpha_squared(self, t: Tensor) -> Tensor:
        """alpha(t)^2 in float64: sigma^2 = 1 - alpha^2 would otherwise lose its digits where alpha^2 is nearly 1."""
        table = self.table.to(t.device)
        position = t.double().clamp(0, 1) * (len(table) - 1)
        low = position.floor().long().clamp(max=len(table) - 2)
        return torch.lerp(table[low], table[low + 1], position - low)

    def alpha(self, t: Tensor) -> Tensor:
        return self.alpha_squared(t).sqrt().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha_squared(t)).sqrt().to(t.dtype)

    def network_time(self, t: Tensor) -> Tensor:
        return (t * (len(self.table) - 1) - 1).clamp_min(0)

    def lowered(self, t: Tensor, gamma: float) -> Tensor:
        """The level of discrete step floor((1 - gamma) step), in float32 as TCDScheduler computes it; 0 stays 0."""
        total = len(self.table) - 1
        step = (1 - gamma) * (t * total).round().sub(1).float()
        return torch.where(t > 0, (step.floor().clamp_min(0) + 1).to(t) / total, t)


def trig_to_flow(x: Tensor, angle: Tensor, sigma_data: float = 1.0) -> tuple[Tensor, Tensor]:
    """The flow-matching state and level with the same proportion of signal and noise as a TrigFlow state.

        x_FM = x_a / (cos a + sigma_d sin a),   t = sigma_d sin a / (cos a + sigma_d sin a)
                       (SANA-Sprint, arXiv 2503.09641, which has sigma_d = 1; derived for latents of any std sigma_d)

    x: [B, ...]; angle: [B] in [0, pi / 2]. Differentiable in both, also in forward mode."""
    size = torch.cos(angle) + sigma_data * torch.sin(angle)
    return x / expand(size, x), sigma_data * torch.sin(angle) / size


def trig_angle(t: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The angle a that `trig_to_flow` takes to level t: tan a = t / ((1 - t) sigma_d). t: any shape, in [0, 1]."""
    return torch.atan2(t, (1 - t) * sigma_data)


def flow_to_trig(x: Tensor, angle: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The inverse of `trig_to_flow`: the TrigFlow state of a flow-matching state x [B, ...] at `trig_angle` [B]."""
    return x * expand(torch.cos(angle) + sigma_data * torch.sin(angle), x)


def flow_to_trig_velocity(velocity: Tensor, x: Tensor, angle: Tensor, sigma_data: float = 1.0) -> Tensor:
    """TrigFlow's dx_a / da, from the velocity v that a flow-matching network predicts at `trig_to_flow`(x, a). This
    converts a teacher without training. sCM's network is F = dx_a / da / sigma_d.

        dx_a / da = cos a sigma_d noise - sin a x0,   x0 = x_FM - t v,   noise = x_FM + (1 - t) v

    velocity: [B, ...]; x: [B, ...], the TrigFlow state; angle: [B]. Returns [B, ...]."""
    x_flow, t = trig_to_flow(x, angle, sigma_data)
    x0, noise = x_flow - expand(t, x) * velocity, x_flow + expand(1 - t, x) * velocity
    return expand(sigma_data * torch.cos(angle), x) * noise - expand(torch.sin(angle), x) * x0


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TimeSampler:
    """A distribution of noise levels, given as the map from a uniform draw u in (0, 1) to a level in [low, high].

    uniform:       t = u
    logit_normal:  t = sigmoid(mean + std Phi^-1(u) - log sigma_data), so that sigma = sigma_data t / (1 - t) is
                   lognormal: log sigma ~ N(mean, std^2)    (EDM, arXiv 2206.00364)
    log_student_t: (log sigma - mean) / std has Student's t distribution with df degrees of freedom, given that t lies
                   in [low, high]    (TCM, arXiv 2410.14895). It takes neither shift nor ends.
    shift:         t' = shift t / (1 + (shift - 1) t), the resolution shift of flow models.
    sigma_data:    the standard deviation of the data for which mean and std are stated, where that of the latents is
                   1. With 0.5 (EDM, sCM, SANA-Sprint), published numbers are written as they are: at equal ratios of
                   signal to noise, the levels of unit latents are log 2 higher (derived).
    ends:          stretch: the level is low + (high - low) t';   clamp: it is t', clamped to [low, high]."""

    law: Literal["uniform", "logit_normal", "log_student_t"] = "uniform"
    low: float = Field(default=0.02, ge=0, lt=1)
    high: float = Field(default=0.98, gt=0, le=1)
    shift: float = Field(default=1.0, gt=0)
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)
    sigma_data: float = Field(default=1.0, gt=0)
    ends: Literal["stretch", "clamp"] = "stretch"  # clamp: Self-Forcing's and CausVid's code, with their shift
    df: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> "TimeSampler":
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got low = {self.low} and high = {self.high}")
        if self.law == "uniform" and self.sigma_data != 1:
            raise ValueError(
                "sigma_data is the unit of mean and std, which are for law: logit_normal and log_student_t, got "
                f"{self.sigma_data:g}; leave it out with law: uniform"
            )
        if (self.law == "log_student_t") != (self.df is not None):
            raise ValueError("law: log_student_t needs df (0.01 in TCM), and the other laws take none")
        if self.law == "log_student_t" and (
            self.low == 0 or self.high == 1 or self.shift != 1 or self.ends == "clamp"
        ):
            raise ValueError(
                "law: log_student_t is cut off at low and high, which must lie inside (0, 1), and takes neither shift "
                f"nor ends; got low {self.low:g}, high {self.high:g}, shift {self.shift:g} and ends {self.ends}"
            )
        return self

    def __call__(self, u: Tensor, within: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """u: any shape, in (0, 1). Returns t of the same shape and dtype, in [low, high].

        within: two levels, shaped like u, between which t lies: the law is then that of t, given that it does."""
        if within is not None:
            u = torch.lerp(self.rank(within[0]), self.rank(within[1]), u)
        return self.ended(self.shifted(u))

    def shifted(self, u: Tensor) -> Tensor:
        """t' in (0, 1) of a uniform draw, any shape: the law and the shift, before the ends."""
        if self.df is not None:
            y, share = self.student_t(self.df)
            return torch.sigmoid(self.centre + self.std * self.df**0.5 * interpolated(u, share, y).sinh()).to(u)
        t = torch.sigmoid(self.centre + self.std * torch.special.ndtri(u)) if self.law == "logit_normal" else u
        return self.shift * t / (1 + (self.shift - 1) * t)

    def ended(self, t: Tensor, top: Tensor | float = 1.0) -> Tensor:
        """The level of t' in (0, 1). top: a factor on the upper end (stretch) or on t' (clamp), shaped like t."""
        if self.ends == "clamp" or self.df is not None:
            return (top * t).clamp(self.low, self.high)
        return self.low + (self.high * top - self.low) * t

    def rank(self, t: Tensor) -> Tensor:
        """The share of draws below level t: the inverse of __call__ inside [low, high]; any shape."""
        if self.df is not None:
            y, share = self.student_t(self.df)
            place = (torch.logit(t.double()) - self.centre) / (self.std * self.df**0.5)
            return interpolated(place.asinh(), y, share).to(t)
        t = ((t - self.low) / (self.high - self.low) if self.ends == "stretch" else t).clamp(0, 1)
        t = t / (self.shift - (self.shift - 1) * t)
        return torch.special.ndtr((torch.logit(t) - self.centre) / self.std) if self.law == "logit_normal" else t

    @property
    def centre(self) -> float:
        """`mean` for log t / (1 - t), that is, in the unit of the latents."""
        return self.mean - math.log(self.sigma_data)

    def student_t(self, df: float) -> tuple[Tensor, Tensor]:
        """[1025] float64 each: values of y, and the share of draws below each, where Student's t is sqrt(df) sinh(y).

        The density of y is proportional to cosh(y)^-df (derived), which hardly varies for a small df; t itself
        spreads over many orders of magnitude then. Integrated by trapezoids."""
        low, high = (
            math.asinh((math.log(level / (1 - level)) - self.centre) / (self.std * df**0.5))
            for level in (self.low, self.high)
        )
        y = torch.linspace(low, high, 1025, dtype=torch.float64)
        share = torch.cumulative_trapezoid(y.cosh() ** -df, y)
        return y, torch.cat([share.new_zeros(1), share / share[-1]])


def interpolated(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """ys at x, linearly between the increasing points xs [n], in float64; x beyond them is at their ends. x: any
    shape."""
    xs, ys, x = xs.to(x.device), ys.to(x.device), x.double()
    index = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    share = (x - xs[index - 1]) / (xs[index] - xs[index - 1])
    return torch.lerp(ys[index - 1], ys[index], share.clamp(0, 1))
