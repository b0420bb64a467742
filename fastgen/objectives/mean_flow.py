"""MeanFlow (arXiv 2505.13447): average velocities from the Eulerian identity, learned from a teacher or from data.

    paper            here                  what it is
    u(z_t, r, t)     u(x, t, s)            average velocity over [s, t]: networks.student conditioned on t and s; the
                                           paper's r is s here
    v_t, v~_t        v                     the velocity u is trained on: the guided teacher's, or noise - x0; guidance
                                           mixes in the student's own velocity
    du/dt            D u                   d_t u + grad u . (velocity), by a JVP with tangents (v, 1, 0), no gradient
    omega, kappa     omega, kappa          self-guidance with teach: data; the effective scale is omega / (1 - kappa)
    alpha            turn.alpha            alpha-Flow's consistency step ratio (arXiv 2510.20771)

The algorithm, for every student update:
    t, s from a law of pairs, a share of them with s = t;  x_t from data and noise
    student <- |u(x_t, t, s) - sg(v - (t - s) D u)|^2 / sg(|.|^2 + floor)^power
    the average of the student's weights is updated once.

form: improved (iMF, arXiv 2512.02012). The identity is a regression of V = u + (t - s) sg(D u) on v. The derivative is
    taken along the student's own velocity u(x_t, t, t), so that V depends on x_t alone and the noisy v is only a
    target. With guidance and teach: data, v = noise - x0 + (1 - 1/w) (u_cond - u_uncond)(x_t, t, t). Where
    rollout.embedded_guidance gives the student the scale w as an input, w is drawn for each sample.
alpha. alpha-Flow anneals from trajectory flow matching (alpha = 1) to MeanFlow (alpha = 0). In between, the target is
    alpha v + (1 - alpha) sg u(x_m, m, s),   x_m = x_t - (t - m) v,   m = alpha s + (1 - alpha) t
    and the square is weighted by alpha (by 1 / alpha without the adaptive weight). Its numbers are pairs with
    diagonal: 0.5 and diagonal_level: single, and a floor of 1e-3 times the number of a sample's elements. A run that
    ends at a finite alpha gives samples of too little variance.
warmup. With a teacher (FastGen's MeanFlow) the factor of the derivative in the target may grow from 0 to 1.

Names such as mean_flow_xl beside a number are rows of docs/faithfulness.md, which compare it with the authors' code.

When v is noisy (from data) the loss of a sample is of order one even at the exact map; only its mean gradient vanishes
there. Departures: no auxiliary head (the diagonal share is that of iMF), and no interval conditions.
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
from fastgen.registry import MOST_UPDATES
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler, expand


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class AlphaSchedule:
    """alpha(k) = 1 - sigmoid(gamma (k - (first + last) / 2) / (last - first)). Values within `snap` of 1 or 0 become
    exactly 1 or 0."""

    # the published values are those of golden row mean_flow_alphas
    first: int = Field(ge=0, le=MOST_UPDATES)  # k_s, in updates: 600k of 1.2M for XL/2, 0 for B/2
    last: int = Field(ge=1, le=MOST_UPDATES)  # k_e, in updates: 1M for XL/2, 1.2M for B/2
    gamma: float = Field(default=25.0, gt=0)  # "25", per last - first updates
    snap: float = Field(default=5e-3, ge=0, lt=0.5)  # "eta = 5e-3"

    @model_validator(mode="after")
    def _ordered(self) -> "AlphaSchedule":
        if self.last <= self.first:
            raise ValueError(f"alpha: last must be above first, got first {self.first} and last {self.last}")
        return self

    def __call__(self, update: int) -> float:
        place = self.gamma * (update - (self.first + self.last) / 2) / (self.last - self.first)
        alpha = 1 / (1 + math.exp(min(place, 700.0)))
        if alpha > 1 - self.snap:
            return 1.0
        if alpha < self.snap:
            return 0.0
        return alpha


@plain_dataclass(frozen=True)
class MeanFlowTurn(Turn):
    """alpha: alpha-Flow's ratio in this update, 0 for MeanFlow. trust: the factor of the derivative in the target, 1
    after the warm-up."""

    alpha: float = 0.0
    trust: float = 1.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class MeanFlow(Objective):
    page = "docs/flow_maps.md"
    takes_inputs = True
    takes_derivatives = True
    trained_roles = ("student",)

    name: Literal["mean_flow"] = "mean_flow"
    teach: Literal["teacher", "data"] = "teacher"
    form: Literal["original", "improved"] = "original"
    # "lognorm(-0.4, 1.0)" and 75 % of r = t, Tab. 1 (iMF: 50 %; mean_flow_xl, mean_flow_improved). The law is that of
    # levels for latents of unit standard deviation, which theirs have. CIFAR-10: N(-2, 2^2), 25 % (mean_flow_cifar10)
    pairs: TimePairs = TimePairs(TimeSampler("logit_normal", 0.0, 1.0, mean=-0.4, std=1.0), diagonal=0.75)
    power: float = Field(default=1.0, ge=0, le=1)  # p: "1.0" (mean_flow_xl); 0.75 on CIFAR-10 (mean_flow_cifar10)
    # c, added to the sum over a sample's d elements: 1e-2 (mean_flow_xl), 1e-3 on CIFAR-10 (mean_flow_cifar10).
    # alpha-Flow adds its own, 1e-3, to their mean: it is 1e-3 d here (mean_flow_alpha)
    floor: float = Field(default=1e-2, gt=0)
    derivative: Backend = "jvp"
    # in units of t: 5 of 1000 in AnyFlow (any_flow_map), 5e-3 in FastGen (mean_flow_difference); longer steps smooth
    # what time embeddings add to D u
    difference_step: float = Field(default=5e-3, gt=0)
    # updates; FastGen: 2000 (mean_flow_teacher); 0 uses the whole derivative from the start
    warmup: int = Field(default=0, ge=0, le=MOST_UPDATES)
    alpha: AlphaSchedule | None = None
    # largest element of alpha-Flow's discrete targets, in standard deviations of latents: 4 for XL/2 (mean_flow_alpha)
    clip: float | None = Field(default=None, gt=0)
    # of the teacher, or with teach: data in the improved form of the student's own guidance: w in
    # uncond + w (cond - uncond), as in FastGen and iMF (mean_flow_teacher, mean_flow_improved)
    guidance_scale: Guidance = 1.0
    scale_power: float = Field(default=1.0, ge=0)  # beta of iMF's p(w) ~ w^-beta on [1, 8]; 1 there (mean_flow_scales)
    omega: float = Field(default=1.0, gt=0)  # weight of noise - x0: 0.2 for XL/2 (mean_flow_xl); 1 with kappa 0 is off
    kappa: float = Field(default=0.0, ge=0, lt=1)  # weight of u(x_t, t, t), with prompt: 0.92 for XL/2 (mean_flow_xl)
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # levels t: [0, 0.75] for XL/2 (mean_flow_xl)
    # share of samples that lose their prompt and their guidance; "0.1" with guidance (mean_flow_xl has 0.3)
    drop: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _possible(self) -> "MeanFlow":
        if self.self_guided and (self.teach == "teacher" or self.form == "improved"):
            raise ValueError("omega and kappa are for teach: data with form: original; use guidance_scale instead")
        if self.teach == "data" and self.form == "original" and self.guidance_scale != 1:
            raise ValueError(
                "guidance_scale is the teacher's, or that of form: improved: with teach: data and form: original "
                "leave it out, and use omega and kappa"
            )
        if self.teach == "data" and (isinstance(self.guidance_scale, tuple) or not self.guidance_scale):
            raise ValueError(
                "with teach: data guidance_scale is one number above 0, the scale of the student's own guidance"
            )
        if self.alpha is not None and (self.form == "improved" or self.warmup):
            raise ValueError("alpha anneals to the original form, and is a warm-up itself; leave out form and warmup")
        return self

    @property
    def self_guided(self) -> bool:
        """Whether omega and kappa are in use."""
        return (self.omega, self.kappa) != (1.0, 0.0)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def check(self, policy: RolloutPolicy) -> None:
        if not policy.any_step:
            raise ValueError(
                "a flow map is conditioned on the level it jumps to: set rollout.two_time: true and "
                "rollout.transition: ode"
            )
        if policy.embedded_guidance is not None and (self.form, self.teach) != ("improved", "data"):
            raise ValueError(
                "rollout.embedded_guidance needs form: improved with teach: data, which learns a range of scales; "
                "leave it out"
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
        noise = batch.normal("noise")
        cond = self.drop_prompts(batch)
        x = networks.student.schedule.add_noise(batch.latents, noise, t).to(noise.dtype)
        inputs = self.guidance_input(networks.policy, batch)
        u = flow_maps.average_velocity(networks.student, cond, inputs)
        v, along = self.velocities(networks, batch, cond, inputs, x, t, noise - batch.latents)
        target = v
        off = flow_maps.rows_of(s < t, networks.student)  # rows off the diagonal
        if len(off):
            u_off = flow_maps.average_velocity(networks.student, cond.select(off), inputs.select(off))
            values = self.target(u_off, turn, x[off], t[off], s[off], v[off], along[off])
            values = torch.where(expand((s < t)[off], values), values, v[off])
            target = v.index_copy(0, off, values.to(v.dtype))
        weight = None
        if turn.alpha:
            weight = torch.where(s < t, turn.alpha if self.power else 1 / turn.alpha, 1.0)
        residual = u(x, t, s) - target
        total = flow_maps.adaptive_loss(residual, self.power, self.floor, weight)
        terms = flow_maps.mean_squares(residual, s == t)
        return Loss(total, terms | {"loss": total.detach()} | self.schedule_terms(turn, x))

    def target(
        self,
        u: flow_maps.AverageVelocity,
        turn: MeanFlowTurn,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        v: Tensor,
        along: Tensor,
    ) -> Tensor:
        """What u(x, t, s) regresses on where s < t, [B, ...]. along: the velocity along which D u is taken."""
        if not turn.alpha:
            differentiate = partial(tangent, backend=self.derivative, step=self.difference_step)
            return flow_maps.eulerian_target(u, x, t, s, v, along, turn.trust, differentiate)
        middle = turn.alpha * s + (1 - turn.alpha) * t
        target = flow_maps.discrete_target(u, x, t, middle, s, v)
        return target if self.clip is None else target.clamp(-self.clip, self.clip)

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
        """The velocity v that u is trained on, and the velocity along which D u is taken: [B, ...] each.

        conditional: noise - x0, the velocity of the data. No gradient."""
        low, high = self.guidance_interval
        is_guided = (t > low) & (t <= high) & ~self.is_dropped(batch)

        def student_velocity(condition: Conditioning) -> Tensor:
            return flow_maps.average_velocity(networks.student, condition, inputs)(x, t, t)

        if self.teach == "teacher":
            teacher_velocity = flow_maps.guided_velocity(
                networks.teacher, cond, batch.uncond, self.guidance_scale, self.guidance_interval
            )
            v = teacher_velocity(x, t)
            return v, student_velocity(cond) if self.form == "improved" else v
        if self.form == "original":
            if not self.self_guided:
                return conditional, conditional
            mixed = self.omega * conditional + self.kappa * student_velocity(cond)
            mixed = mixed + (1 - self.omega - self.kappa) * student_velocity(batch.uncond)
            v = torch.where(expand(is_guided, x), mixed, conditional)
            return v, v
        along = student_velocity(cond)
        assert not isinstance(self.guidance_scale, tuple)
        scale = torch.full_like(t, self.guidance_scale) if inputs.guidance is None else inputs.guidance
        if not bool((scale != 1).any()):
            return conditional, along
        factor = expand(torch.where(is_guided, 1 - 1 / scale, 0.0).to(x), x)
        guidance = factor * (along - student_velocity(batch.uncond))
        return conditional + guidance, along

    def guidance_input(self, policy: RolloutPolicy, batch: Batch) -> Inputs:
        """The guidance input of each sample, where the student has one: w with density w^-beta on [1, 8], by the
        inverse of its cumulative distribution."""
        if policy.embedded_guidance is None:
            return NO_INPUTS
        u = batch.uniform("guidance")
        exponent = 1 - self.scale_power
        if exponent == 0:
            return Inputs(guidance=8**u)
        return Inputs(guidance=(1 + u * (8**exponent - 1)) ** (1 / exponent))

    def is_dropped(self, batch: Batch) -> Tensor:
        """Which samples lose their prompt, [B] bool."""
        return batch.uniform("drop") < self.drop

    def drop_prompts(self, batch: Batch) -> Conditioning:
        """The batch's conditioning, with `batch.uncond` for the samples of `is_dropped`."""
        dropped = self.is_dropped(batch)
        return Conditioning({k: torch.where(expand(dropped, v), batch.uncond[k], v) for k, v in batch.cond.items()})

    def schedule_terms(self, turn: MeanFlowTurn, like: Tensor) -> dict[str, Tensor]:
        """The scheduled value of this update, to log: alpha, or trust where a warm-up is set."""
        if self.alpha:
            return {"alpha": like.new_tensor(turn.alpha)}
        if self.warmup:
            return {"trust": like.new_tensor(turn.trust)}
        return {}
