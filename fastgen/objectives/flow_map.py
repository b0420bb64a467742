"""Flow map matching: a student that jumps from any level to any lower one, in any number of steps.

Four losses for it (Boffi, Albergo, Vanden-Eijnden, arXiv 2505.18825; the semigradient of the first, arXiv 2506.14603):

    paper            here                 what it is
    X_{t,s}(x)       x - (t - s) u        the flow map, with u(x, t, s) = networks.student told t and s
    v_{t,t}          u(x, t, t)           its diagonal: the velocity of the ODE
    b, v_w           self.velocity(...)   the velocity that is distilled: the guided teacher's, or the own diagonal
    I_t              x_t                  data noised to level t, or the prior (t = 1)
    LSD, ESD, PSD    form: lagrangian, eulerian, progressive; semigradient is LSD without gradient through d_s u
    F(z, delta)      u(z, 1, 1 - delta)   FreeFlow's map from the prior (arXiv 2511.19428)
    g_psi, s_fake    networks.fake_score  the velocity of the student's own samples, trained online

The algorithm, for every student update:
    t, s and x_t; a share of the batch, the diagonal, has s = t
    diagonal:      student <- |u(x_t, t, t) - v|^2,  v the teacher's, or noise - x0 when the student teaches itself
    elsewhere:     student <- the square of the identity's residual (`form`), v the teacher's, or sg u(x, t, t)
    the average of the student's weights moves, once.
With `on_policy` (AnyFlow's second stage, arXiv 2605.13724; with steps: [1], source: prior and balance: true FreeFlow's
correction) a fake score learns the student's own samples before, and the student's update also has
    x = jumps 1 -> t_k -> t_{k+1} -> 0 of a random grid, with gradient through all three
    student <- weight * surrogate of the score difference (fake - teacher) at x renoised

Progressive alone knows nothing about v (u = 0 solves it): the diagonal share must be above 0. Lagrangian and Eulerian
differentiate a derivative (MATH attention, no activation checkpointing); the other two do not. A map from the prior
alone is a one-step student: nothing teaches it to jump from below t = 1. Departures: the authors' learned weight
w(t, s) is a power of the loss here, and targets are of the current weights, as theirs are by default.
"""

import itertools
from dataclasses import dataclass as plain_dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.flow import flow_maps
from fastgen.flow.flow_maps import AverageVelocity, Velocity, average_velocity
from fastgen.flow.tangents import Backend, tangent
from fastgen.flow.time_pairs import TimePairs, between
from fastgen.networks import Networks
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.objectives.fake_score import denoising_loss, make_fake_score
from fastgen.recipe import Recipe
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler, expand

Form = Literal["lagrangian", "semigradient", "eulerian", "progressive"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class OnPolicy:
    """Distribution matching on the student's own samples. steps: the numbers of steps of the random grid.
    balance: the weight is times |residual| / |score difference|, both means over the batch (FreeFlow's alpha)."""

    weight: float = Field(default=1.0, gt=0)  # AnyFlow's 1; FreeFlow's alpha 0.3 to 3
    steps: tuple[int, ...] = Field(default=(2, 4, 8, 16, 50), min_length=1)  # AnyFlow's code
    fake_updates: int = Field(default=5, ge=1)  # DMD2's; AnyFlow does not say
    guidance_scale: Guidance = 1.0  # AnyFlow: 3
    renoise_time: TimeSampler = TimeSampler(low=0.02, high=0.98)  # DMD2's; FreeFlow: logit-normal, biased high
    fake_time: TimeSampler = TimeSampler(low=0.001, high=0.999)  # DMD2's
    balance: bool = False


@plain_dataclass(frozen=True)
class GapTurn(Turn):
    """max_gap: how far apart t and s may be in this update."""

    max_gap: float = 1.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class FlowMap(Objective):
    takes_inputs = True

    name: Literal["flow_map"] = "flow_map"
    form: Form = "semigradient"  # ours: cheaper, and may checkpoint; the paper recommends lagrangian
    teach: Literal["teacher", "self"] = "teacher"
    source: Literal["data", "prior"] = "data"
    guidance_scale: Guidance = 1.0  # of the teacher
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # as DMD2's
    pairs: TimePairs = TimePairs(diagonal=0.75)  # "75 %", the authors' code
    gap_growth: int = Field(default=0, ge=0)  # updates in which |t - s| may grow to pairs.max_gap; 0: at once
    middle: Literal["uniform", "half"] = "uniform"  # of progressive; the authors have both
    power: float = Field(default=0.0, ge=0, le=1)  # of the adaptive weight 1 / (|r|^2 + floor)^power; MeanFlow's 1
    floor: float = Field(default=1e-2, gt=0)  # MeanFlow's; |r|^2 is the sum over a sample
    derivative: Backend = "jvp"  # of semigradient
    on_policy: OnPolicy | None = None

    @model_validator(mode="after")
    def _possible(self) -> "FlowMap":
        if self.source == "prior" and self.teach == "self":
            raise ValueError("source: prior has no data to learn the diagonal from; use teach: teacher")
        if self.form == "progressive" and not self.pairs.diagonal:
            raise ValueError("form: progressive has no information about the velocity; set pairs.diagonal above 0")
        if self.form == "progressive" and self.source == "prior":
            raise ValueError("form: progressive needs jumps from every level; use source: data")
        return self

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "fake_score") if self.on_policy else ("student",)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"}) if self.source == "data" else frozenset()

    def check(self, policy: RolloutPolicy) -> None:
        if not policy.any_step:
            raise ValueError("a flow map is told where it jumps to: set rollout.two_time: true, transition: ode")
        if policy.embedded_guidance is not None:
            raise ValueError(
                "flow_map learns one guidance scale, its guidance_scale; leave out rollout.embedded_guidance"
            )
        if self.source == "prior" and policy.num_steps > 1:
            raise ValueError("source: prior trains jumps from t = 1 alone; give rollout one timestep")

    def check_recipe(self, recipe: Recipe) -> None:
        flow_maps.check_backbone(recipe.backbone)
        if self.form in ("lagrangian", "eulerian") and recipe.train.gradient_checkpointing:
            raise ValueError(
                f"form: {self.form} differentiates a derivative, which train.gradient_checkpointing "
                "cannot repeat; use semigradient, or switch it off"
            )

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        return {"fake_score": make_fake_score(backbone, policy)} if self.on_policy else {}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        share = min(1.0, (step + 1) / self.gap_growth) if self.gap_growth else 1.0
        student = GapTurn("student", ("student",), max_gap=share * self.pairs.max_gap)
        if self.on_policy is None:
            return (student,)
        return (Turn("fake_score", ("fake_score",), self.on_policy.fake_updates), student)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        if turn.name == "fake_score":
            assert self.on_policy is not None
            return self.fake_loss(networks, batch, self.on_policy)
        assert isinstance(turn, GapTurn)
        residual, on = self.residuals(networks, batch, turn.max_gap)
        total = flow_maps.adaptive_loss(residual, self.power, self.floor)
        terms = flow_maps.mean_squares(residual, on)
        if self.on_policy is not None:
            error = residual.detach().square().mean().sqrt()
            matching, size = self.matching_loss(networks, batch, self.on_policy, error)
            total, terms["dm_grad"] = total + self.on_policy.weight * matching, size
        return Loss(total, terms | {"loss": total.detach()})

    # --- the map

    def residuals(self, networks: Networks, batch: Batch, max_gap: float) -> tuple[Tensor, Tensor]:
        """What is squared [B, ...], with gradient; and which samples are on the diagonal, [B]."""
        t, s = self.pairs(batch, max_gap=max_gap)
        on, x = s == t, batch.normal("noise")
        if self.source == "prior":
            t = torch.ones_like(t)
            s = torch.where(on, t, 1 - max_gap * batch.uniform("end"))
        else:
            assert batch.latents is not None
            x = networks.student.schedule.add_noise(batch.latents, x, t).to(x.dtype)
        residual = torch.zeros_like(x)
        for part, mask in ((self.diagonal, on), (self.jump, ~on)):
            rows = flow_maps.rows_of(mask, networks.student)
            if len(rows):
                u = average_velocity(networks.student, batch.cond.select(rows))
                found = part(networks, batch, rows, u, x[rows], t[rows], s[rows])
                found = torch.where(expand(mask[rows], found), found, 0.0).to(x.dtype)
                residual = residual.index_add(0, rows, found)
        return residual, on

    def diagonal(
        self, networks: Networks, batch: Batch, rows: Tensor, u: AverageVelocity, x: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        """u(x, t, t) - v of these rows of the batch."""
        if self.teach == "teacher":
            return u(x, t, t) - self.velocity(networks, batch, rows, u)(x, t)
        assert batch.latents is not None
        return u(x, t, t) - (batch.normal("noise", rows=rows) - batch.latents[rows])

    def jump(
        self, networks: Networks, batch: Batch, rows: Tensor, u: AverageVelocity, x: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        """The identity's residual, with gradient to u; the velocity is asked for without."""
        v = self.velocity(networks, batch, rows, u)
        if self.form == "lagrangian":
            return flow_maps.lagrangian_residual(u, v, x, t, s)
        if self.form == "eulerian":
            return flow_maps.eulerian_residual(u, v, x, t, s)
        if self.form == "semigradient":
            differentiate = partial(tangent, backend=self.derivative)
            return u(x, t, s) - flow_maps.lagrangian_target(u, v, x, t, s, differentiate)
        share = batch.uniform("middle")[rows] if self.middle == "uniform" else torch.full_like(t, 0.5)
        middle = between(s, t, share)
        with torch.no_grad():
            first = u(x, t, middle)
        return u(x, t, s) - flow_maps.discrete_target(u, x, t, middle, s, first)

    def velocity(self, networks: Networks, batch: Batch, rows: Tensor, u: AverageVelocity) -> Velocity:
        if self.teach == "self":
            return flow_maps.clamped(flow_maps.diagonal(u))
        cond, uncond = batch.cond.select(rows), batch.uncond.select(rows)
        return flow_maps.guided_velocity(networks.teacher, cond, uncond, self.guidance_scale, self.guidance_interval)

    # --- on policy

    def rollout(self, networks: Networks, batch: Batch, config: OnPolicy) -> Tensor:
        """Clean samples by the jumps 1 -> t_k -> t_{k+1} -> 0 of a random grid, k and the grid shared by all."""
        count = config.steps[batch.integer("grid", len(config.steps))]
        levels, k = (*networks.policy.with_steps(count).timesteps, 0.0), batch.integer("jump", count)
        u, x = average_velocity(networks.student, batch.cond), batch.normal("initial")
        stops = sorted({1.0, levels[k], levels[k + 1], 0.0}, reverse=True)
        for here, there in itertools.pairwise(stops):
            x = flow_maps.jump(u, x, x.new_full((len(x),), here), x.new_full((len(x),), there))
        return x

    def fake_loss(self, networks: Networks, batch: Batch, config: OnPolicy) -> Loss:
        with torch.no_grad():
            x0 = self.rollout(networks, batch, config)
        total = denoising_loss(networks, batch, x0, config.fake_time)
        return Loss(total, {"loss": total.detach()})

    def matching_loss(
        self, networks: Networks, batch: Batch, config: OnPolicy, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Surrogate of (fake - teacher) at the student's samples renoised, and the size of that gradient."""
        x0 = self.rollout(networks, batch, config)
        teacher, t = networks.teacher, config.renoise_time(batch.uniform("renoise_time"))
        with torch.no_grad():
            x_t = teacher.schedule.add_noise(x0, batch.normal("renoise"), t)
            fake = networks.fake_score(x_t, t, batch.cond)
            scale = teacher.per_expert(config.guidance_scale, t)
            real = signals.guided(teacher, x_t, t, batch.cond, batch.uncond, scale)
            grad = signals.score_difference(x0, fake, real)
            if config.balance:  # g_psi - v_w in velocities, sized as the residual; descent moves x0 along it
                grad = (fake - real) / expand(t, x0)
                grad = grad * residual / grad.square().mean().sqrt().clamp_min(1e-8)
        return signals.surrogate(x0, grad), grad.abs().mean()
