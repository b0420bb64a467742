"""Noise schedules: x_t = alpha(t) x0 + sigma(t) noise, with t = 0 data and t = 1 noise.

Every conversion between what networks predict and what objectives need is here, and nowhere else. All of it runs in at
least float32: DMD2 does the epsilon -> x0 conversion in double (tianweiy/DMD2 main/sd_guidance.py).
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
    """alpha(t), sigma(t) for t in [0, 1], any shape; t is float. Subclasses: FlowSchedule, VPSchedule."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of x0, alpha(0) = 1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise, sigma(0) = 0."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """The timestep a diffusers network is given for noise level t."""

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t), sigma(t), broadcast over `like`, in its dtype but at least float32."""
        t = t.to(torch.promote_types(like.dtype, torch.float32))
        return expand(self.alpha(t), like), expand(self.sigma(t), like)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) noise."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0 + sigma * noise

    def renoise_coefficients(self, s: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_{t|s} = alpha_t / alpha_s and sigma_{t|s}, sigma_{t|s}^2 = sigma_t^2 - alpha_{t|s}^2 sigma_s^2."""
        if bool((t < s).any()):
            raise ValueError("renoise goes from a level s up to t >= s")
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.coefficients(s, like), self.coefficients(t, like)
        if bool((alpha_s == 0).any()):
            raise ValueError(
                "renoise starts at a level with some signal left; at s = 1 of a flow schedule there is none"
            )
        ratio = alpha_t / alpha_s
        return ratio, (sigma_t**2 - (ratio * sigma_s) ** 2).clamp_min(0).sqrt()

    def renoise(self, x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """From level s to level t >= s; at s = 0 this is add_noise. Composing s -> r -> t keeps the law of x_t."""
        ratio, sigma = self.renoise_coefficients(s, t, x_s)
        return ratio * x_s + sigma * noise

    def lowered(self, t: Tensor, gamma: float) -> Tensor:
        """The level a stochastic step to t jumps to before noise is added: (1 - gamma) t."""
        return (1 - gamma) * t

    def to_sample(self, prediction: Tensor, x_t: Tensor, t: Tensor, kind: PredictionType) -> Tensor:
        """The x0 prediction of a network output of any kind.

        sample: itself;  epsilon: (x_t - sigma e) / alpha;  v_prediction (v = alpha noise - sigma x0) and
        flow_prediction (v = noise - x0): the solution of that definition together with x_t's."""
        if kind == "sample":
            return prediction
        alpha, sigma = self.coefficients(t, x_t)
        if kind == "epsilon":
            return (x_t - sigma * prediction) / alpha
        if kind == "v_prediction":
            return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)
        return (x_t - sigma * prediction) / (alpha + sigma)

    def from_sample(self, x0: Tensor, x_t: Tensor, t: Tensor, kind: PredictionType) -> Tensor:
        """The inverse of to_sample: what a network of this kind would have to output for this x0. Needs sigma(t) > 0
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
    """Flow matching: alpha = 1 - t, sigma = t; networks see num_train_timesteps * t."""

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

    alphas_cumprod: [N], decreasing in (0, 1). Level t = (i + 1) / N is the discrete step i, exactly; between the steps
    (and down to t = 0, where alpha = 1) alpha^2 is interpolated linearly. Networks see N t - 1, clamped at 0."""

    def __init__(self, alphas_cumprod: Tensor):
        self.table = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()])

    def alpha_squared(self, t: Tensor) -> Tensor:
        """In float64: where it is nearly 1, sigma^2 is the little that is left."""
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
        """Of the discrete steps, floor((1 - gamma) step), in float32: as TCDScheduler computes it. Level 0 stays."""
        total = len(self.table) - 1
        step = (1 - gamma) * (t * total).round().sub(1).float()
        return torch.where(t > 0, (step.floor().clamp_min(0) + 1).to(t) / total, t)


def trig_to_flow(x: Tensor, angle: Tensor, sigma_data: float = 1.0) -> tuple[Tensor, Tensor]:
    """The flow-matching state and level with the signal and the noise of a TrigFlow state, in the same proportion.

        x_FM = x_a / (cos a + sigma_d sin a),   t = sigma_d sin a / (cos a + sigma_d sin a)
                       (SANA-Sprint, arXiv 2503.09641, in latents of standard deviation sigma_d: derived; theirs: 1)

    x: [B, ...]; angle: [B] in [0, pi / 2]. Differentiable in both, also forward."""
    size = torch.cos(angle) + sigma_data * torch.sin(angle)
    return x / expand(size, x), sigma_data * torch.sin(angle) / size


def trig_angle(t: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The TrigFlow angle a whose `trig_to_flow` level is t: tan a = t / ((1 - t) sigma_d). t: any shape, in [0, 1]."""
    return torch.atan2(t, (1 - t) * sigma_data)


def flow_to_trig(x: Tensor, angle: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The TrigFlow state of a flow-matching state x [B, ...] at `trig_angle` [B]: the inverse of `trig_to_flow`."""
    return x * expand(torch.cos(angle) + sigma_data * torch.sin(angle), x)


def flow_to_trig_velocity(velocity: Tensor, x: Tensor, angle: Tensor, sigma_data: float = 1.0) -> Tensor:
    """dx_a / da of TrigFlow from a flow-matching network's velocity v at `trig_to_flow`(x, a): a teacher converted
    without training. sCM's network is F = dx_a / da / sigma_d.

        dx_a / da = cos a sigma_d noise - sin a x0,   x0 = x_FM - t v,   noise = x_FM + (1 - t) v

    velocity, x: [B, ...], x the TrigFlow state; angle: [B]. Returns [B, ...]."""
    x_flow, t = trig_to_flow(x, angle, sigma_data)
    x0, noise = x_flow - expand(t, x) * velocity, x_flow + expand(1 - t, x) * velocity
    return expand(sigma_data * torch.cos(angle), x) * noise - expand(torch.sin(angle), x) * x0


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TimeSampler:
    """A law of noise levels, as the map from a uniform draw u in (0, 1) to t in [low, high].

    uniform:       t = u
    logit_normal:  t = sigmoid(mean + std Phi^-1(u)); the noise-to-signal ratio t / (1 - t) is then lognormal (EDM)
    shift:         t' = shift t / (1 + (shift - 1) t), flow models' resolution shift, then low + (high - low) t."""

    law: Literal["uniform", "logit_normal"] = "uniform"
    low: float = Field(default=0.02, ge=0, lt=1)
    high: float = Field(default=0.98, gt=0, le=1)
    shift: float = Field(default=1.0, gt=0)
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> "TimeSampler":
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        return self

    def __call__(self, u: Tensor) -> Tensor:
        """u: any shape, in (0, 1). Returns t of the same shape and dtype, in [low, high]."""
        t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)) if self.law == "logit_normal" else u
        t = self.shift * t / (1 + (self.shift - 1) * t)
        return self.low + (self.high - self.low) * t
