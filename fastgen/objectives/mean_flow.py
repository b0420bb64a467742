"""MeanFlow (arXiv 2505.13447): average velocities from the Eulerian identity, from a teacher or from data alone.

    paper            here                  what it is
    u(z_t, r, t)     u(x, t, s)            average velocity over [s, t], networks.student told t and s; r is our s
    v_t, v~_t        v                     the velocity it is trained by: the guided teacher's, or noise - x0, for
                                           guidance mixed with the student's own
    du/dt            D u                   d_t u + grad u . (velocity), by a JVP with tangents (v, 1, 0), no gradient
    omega, kappa     omega, kappa          self-guidance, of data; its effective scale is omega / (1 - kappa)
    alpha            turn.alpha            alpha-Flow's consistency step ratio (arXiv 2510.20771)

The algorithm, for every student update:
    t, s from a law of pairs, a share with s = t;  x_t from data and noise
    student <- |u(x_t, t, s) - sg(v - (t - s) D u)|^2 / sg(|.|^2 + floor)^power
    the average of the student's weights moves, once.

form: improved (iMF, arXiv 2512.02012). The identity as a regression of V = u + (t - s) sg(D u) on v: the derivative
    goes along the student's own velocity u(x_t, t, t), so that V depends on x_t alone and noisy v is only a target.
    Guidance of data is v = noise - x0 + (1 - 1/w) (u_cond - u_uncond)(x_t, t, t), w the scale the student is told,
    drawn by sample, where rollout.embedded_guidance gives it that input.
alpha: alpha-Flow anneals from trajectory flow matching (alpha = 1) to MeanFlow (0). Between, the target is
    alpha v + (1 - alpha) sg u(x_m, m, s),   x_m = x_t - (t - m) v,   m = alpha s + (1 - alpha) t
    with the square weighed by alpha (1 / alpha without the adaptive weight). A run that ends at a finite alpha has too
    little variance.
From a teacher (FastGen's MeanFlow) the target's derivative may be trusted by degrees: `warmup`.

With noisy v (from data) the loss per sample is of order one at the exact map; only its mean gradient vanishes there.
Departures: no auxiliary head (the diagonal share is iMF's), no interval conditions.
"""

import math
from dataclasses import dataclass as plain_dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import NO_INPUTS, Inputs
from fastgen.flow import flow_maps
from fastgen.flow.tangents import Backend, tangent
from fastgen.flow.time_pairs import TimePairs
from fastgen.networks import Networks
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.recipe import Recipe
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler, expand


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class AlphaSchedule:
    """alpha(k) = 1 - sigmoid(gamma (k - (first + last) / 2) / (last - first)), snapped to 1 and 0 within `snap`."""

    first: int = Field(ge=0)  # k_s: 600k of 1.2M for XL/2, 0 for B/2
    last: int = Field(ge=1)  # k_e: 1M for XL/2, 1.2M for B/2
    gamma: float = Field(default=25.0, gt=0)  # "25"
    snap: float = Field(default=5e-3, ge=0, lt=0.5)  # "eta = 5e-3"

    @model_validator(mode="after")
    def _ordered(self) -> "AlphaSchedule":
        if self.last <= self.first:
            raise ValueError(f"alpha falls from update first to last, got {self.first} and {self.last}")
        return self

    def __call__(self, update: int) -> float:
        place = self.gamma * (update - (self.first + self.last) / 2) / (self.last - self.first)
        alpha = 1 / (1 + math.exp(min(place, 700.0)))
        return 1.0 if alpha > 1 - self.snap else 0.0 if alpha < self.snap else alpha


@plain_dataclass(frozen=True)
class MeanFlowTurn(Turn):
    """alpha: of alpha-Flow, 0 for MeanFlow. trust: of the derivative, 1 when warm."""

    alpha: float = 0.0
    trust: float = 1.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class MeanFlow(Objective):
    takes_inputs = True
    trained_roles = ("student",)

    name: Literal["mean_flow"] = "mean_flow"
    teach: Literal["teacher", "data"] = "teacher"
    form: Literal["original", "improved"] = "original"
    # "lognorm(-0.4, 1.0)" and 75 % of r = t, Tab. 1 (iMF: 50 %)
    pairs: TimePairs = TimePairs(TimeSampler("logit_normal", 0.0, 1.0, mean=-0.4, std=1.0), diagonal=0.75)
    power: float = Field(default=1.0, ge=0, le=1)  # p: "1.0"; 0.75 on CIFAR-10
    floor: float = Field(default=1e-2, gt=0)  # c, of the sum over a sample; 1e-3 on CIFAR-10
    derivative: Backend = "jvp"
    difference_step: float = Field(default=5e-3, gt=0)  # AnyFlow's; longer ones smooth what embeddings add to D u
    warmup: int = Field(default=0, ge=0)  # FastGen: 2000; 0 trusts the derivative at once
    alpha: AlphaSchedule | None = None
    clip: float | None = Field(default=None, gt=0)  # of alpha-Flow's discrete targets: 4 for XL/2
    guidance_scale: Guidance = 1.0  # of the teacher; of data in the improved form, the student's own
    scale_power: float = Field(default=1.0, ge=0)  # beta of iMF's p(w) ~ w^-beta on [1, 8]; ours
    omega: float = Field(default=1.0, gt=0)  # 0.2 for XL/2; 1 with kappa 0 is off
    kappa: float = Field(default=0.0, ge=0, lt=1)  # 0.92 for XL/2
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # [0, 0.75] for XL/2
    drop: float = Field(default=0.0, ge=0, lt=1)  # share of samples that lose their prompt; "0.1" with guidance

    @model_validator(mode="after")
    def _possible(self) -> "MeanFlow":
        if self.mixes and (self.teach == "teacher" or self.form == "improved"):
            raise ValueError("omega and kappa guide data in the original form; use guidance_scale")
        if self.alpha is not None and (self.form == "improved" or self.warmup):
            raise ValueError("alpha anneals to the original form, and is a warm-up itself; leave out form and warmup")
        return self

    @property
    def mixes(self) -> bool:
        return (self.omega, self.kappa) != (1.0, 0.0)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def check(self, policy: RolloutPolicy) -> None:
        if not policy.any_step:
            raise ValueError("a flow map is told where it jumps to: set rollout.two_time: true, transition: ode")
        if policy.embedded_guidance is not None and (self.form, self.teach) != ("improved", "data"):
            raise ValueError(
                "rollout.embedded_guidance is for form: improved with teach: data, which learns all scales"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        flow_maps.check_backbone(recipe.backbone)

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        trust = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        alpha = 0.0 if self.alpha is None else self.alpha(step)
        return (MeanFlowTurn("student", ("student",), alpha=alpha, trust=trust),)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert isinstance(turn, MeanFlowTurn) and batch.latents is not None
        t, s = self.pairs(batch)
        noise, cond = batch.normal("noise"), self.dropped(batch)
        x = networks.student.schedule.add_noise(batch.latents, noise, t).to(noise.dtype)
        inputs = self.guidance_input(networks.policy, batch)
        u = flow_maps.average_velocity(networks.student, cond, inputs)
        v, own = self.velocities(networks, batch, cond, inputs, x, t, noise - batch.latents)
        target, off = v, flow_maps.rows_of(s < t, networks.student)
        if len(off):
            rows = flow_maps.average_velocity(networks.student, cond.select(off), inputs.select(off))
            found = self.target(rows, turn, x[off], t[off], s[off], v[off], own[off])
            found = torch.where(expand((s < t)[off], found), found, v[off])
            target = v.index_copy(0, off, found.to(v.dtype))
        weight = torch.where(s < t, turn.alpha if self.power else 1 / turn.alpha, 1.0) if turn.alpha else None
        residual = u(x, t, s) - target
        total = flow_maps.adaptive_loss(residual, self.power, self.floor, weight)
        terms = flow_maps.mean_squares(residual, s == t)
        return Loss(total, terms | {"loss": total.detach()} | self.schedules(turn, x))

    def target(
        self, u: flow_maps.AverageVelocity, turn: MeanFlowTurn, x: Tensor, t: Tensor, s: Tensor, v: Tensor, own: Tensor
    ) -> Tensor:
        """What u(x, t, s) regresses on where s < t."""
        if not turn.alpha:
            differentiate = partial(tangent, backend=self.derivative, step=self.difference_step)
            return flow_maps.eulerian_target(u, x, t, s, v, own, turn.trust, differentiate)
        found = flow_maps.discrete_target(u, x, t, turn.alpha * s + (1 - turn.alpha) * t, s, v)
        return found if self.clip is None else found.clamp(-self.clip, self.clip)

    @torch.no_grad()
    def velocities(
        self,
        networks: Networks,
        batch: Batch,
        cond: Conditioning,
        inputs: Inputs,
        x: Tensor,
        t: Tensor,
        conditional: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The velocity that trains u, and that along which D u goes: [B, ...] each. conditional: noise - x0."""
        inside = (t > self.guidance_interval[0]) & (t <= self.guidance_interval[1]) & ~self.is_dropped(batch)

        def own(condition: Conditioning) -> Tensor:
            return flow_maps.average_velocity(networks.student, condition, inputs)(x, t, t)

        if self.teach == "teacher":
            v = flow_maps.guided_velocity(
                networks.teacher, cond, batch.uncond, self.guidance_scale, self.guidance_interval
            )(x, t)
            return v, own(cond) if self.form == "improved" else v
        if self.form == "original":
            if not self.mixes:
                return conditional, conditional
            mixed = self.omega * conditional + self.kappa * own(cond)
            mixed = mixed + (1 - self.omega - self.kappa) * own(batch.uncond)
            v = torch.where(expand(inside, x), mixed, conditional)
            return v, v
        velocity = own(cond)
        scale = torch.full_like(t, self.scale) if inputs.guidance is None else inputs.guidance
        if not bool((scale != 1).any()):
            return conditional, velocity
        guidance = expand(torch.where(inside, 1 - 1 / scale, 0.0).to(x), x) * (velocity - own(batch.uncond))
        return conditional + guidance, velocity

    @property
    def scale(self) -> float:
        """Of data, where the student is not told one."""
        return self.guidance_scale[0] if isinstance(self.guidance_scale, tuple) else self.guidance_scale

    def guidance_input(self, policy: RolloutPolicy, batch: Batch) -> Inputs:
        """The guidance input of each sample, where the student has one: w with density w^-beta on [1, 8]."""
        if policy.embedded_guidance is None:
            return NO_INPUTS
        u, b = batch.uniform("guidance"), 1 - self.scale_power
        return Inputs(guidance=8**u if b == 0 else (1 + u * (8**b - 1)) ** (1 / b))

    def is_dropped(self, batch: Batch) -> Tensor:
        return batch.uniform("drop") < self.drop

    def dropped(self, batch: Batch) -> Conditioning:
        """The prompts, of some samples the empty one."""
        gone = self.is_dropped(batch)
        return Conditioning({k: torch.where(expand(gone, v), batch.uncond[k], v) for k, v in batch.cond.items()})

    def schedules(self, turn: MeanFlowTurn, like: Tensor) -> dict[str, Tensor]:
        values = {"alpha": turn.alpha} if self.alpha else {"trust": turn.trust} if self.warmup else {}
        return {name: like.new_tensor(value) for name, value in values.items()}
