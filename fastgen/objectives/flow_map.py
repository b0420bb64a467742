"""Flow map matching: a student that jumps from any level to any lower level, and samples in any number of steps.

Four losses for it (Boffi, Albergo, Vanden-Eijnden, arXiv 2505.18825; the semigradient of the first, arXiv 2506.14603):

    paper            here                 what it is
    X_{t,s}(x)       x - (t - s) u        the flow map; u(x, t, s) is networks.student conditioned on t and s
    v_{t,t}          u(x, t, t)           its diagonal: the velocity of the ODE
    b, v_w           self.velocity(...)   the distilled velocity: the guided teacher's, or the student's own diagonal
    I_t              x_t                  data noised to level t, or the prior (t = 1)
    LSD, ESD, PSD    form                 lagrangian, eulerian, progressive; semigradient is LSD without gradient
                                          through d_s u
    F(z, delta)      u(z, 1, 1 - delta)   FreeFlow's map from the prior (arXiv 2511.19428)
    g_psi, s_fake    networks.fake_score  the velocity of the student's own samples, trained online

The algorithm, for every student update:
    draw t, s and x_t; a share of the batch, the diagonal, has s = t
    diagonal:      student <- |u(x_t, t, t) - v|^2,  v the teacher's, or noise - x0 when the student teaches itself
    elsewhere:     student <- the square of the identity's residual (`form`), v the teacher's, or sg u(x, t, t)
    the average of the student's weights is updated once.
With `on_policy`, a fake score is first trained on the student's own samples. The student's update then also has
    x = jumps 1 -> t_k -> t_{k+1} -> 0 of a random grid, with gradient through all three
    student <- weight * surrogate of the score difference (fake - teacher) at x renoised
This is AnyFlow's second stage (arXiv 2605.13724), whose numbers are the defaults of `on_policy`. With steps: [1],
source: prior and balance: true it is FreeFlow's correction.

The progressive form alone has no information about v (u = 0 solves it), so its diagonal share must be above 0. The
Lagrangian and Eulerian forms differentiate a derivative, which needs MATH attention and excludes activation
checkpointing; the other two do not. A map that is trained from the prior alone is a one-step student, because nothing
teaches it to jump from levels below t = 1.

Departures. The authors' learned weight w(t, s) is replaced by a power of the loss. Targets use the current weights,
which is the authors' default. AnyFlow weights levels by t sqrt(1 - t), and gives every jump the mean loss of the
diagonal; here all have the same weight.

Names such as flow_map_lsd beside a number are rows of docs/faithfulness.md, which compare it with the authors' code.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

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
from fastgen.registry import MOST_STEPS, MOST_UPDATES
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler, expand

Form = Literal["lagrangian", "semigradient", "eulerian", "progressive"]


ANY_FLOW_TIME = TimeSampler(low=0.0, high=1.0, shift=5.0)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class OnPolicy:
    """Distribution matching on the student's own samples. The defaults are AnyFlow's for Wan 2.1.

    weight: of 1/2 |x0 - sg(x0 - g)|^2 beside the map's |r|^2. Both are sums over a sample's elements, and means over
    samples. In AnyFlow both are means over elements, and the first has no half: its weight of 1 is 2 here.
    steps: the numbers of steps from which that of the random grid is drawn.
    guidance_scale: w in uncond + w (cond - uncond). AnyFlow's 3 is w in cond + w (cond - uncond), which is 4 here. Its
    other guidance of 3, that of the first stage, is 3 here.
    balance: multiplies the score difference by |residual| / |score difference|, the ratio of their root mean squares
    over the micro-batch (FreeFlow's alpha, which is the weight; its training code is not public)."""

    # weight, steps and guidance: any_flow_step. FreeFlow's weight of 0.3 to 3, with balance: nothing public pins it
    weight: float = Field(default=2.0, gt=0)
    steps: tuple[Annotated[int, Field(ge=1, le=MOST_STEPS)], ...] = Field(default=(2, 4, 8, 16, 50), min_length=1)
    # updates per student update: AnyFlow's discriminator_update_ratio of 1, a counter of its loop that no row pins
    fake_updates: int = Field(default=1, ge=1, le=MOST_STEPS)
    guidance_scale: Guidance = 4.0
    renoise_time: TimeSampler = ANY_FLOW_TIME  # any_flow_step; FreeFlow: logit-normal, biased high, not public
    # logit-normal before the shift (any_flow_fake)
    fake_time: TimeSampler = TimeSampler("logit_normal", 0.0, 1.0, shift=5.0)
    balance: bool = False


@plain_dataclass(frozen=True)
class GapTurn(Turn):
    """max_gap: the largest t - s in this update, but for the jumps to 0 of `pairs.to_zero`, which have all lengths."""

    max_gap: float = 1.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class FlowMap(Objective):
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ({}, {"source": "prior"})
    page = "docs/flow_maps.md"
    takes_inputs = True
    takes_derivatives = True

    name: Literal["flow_map"] = "flow_map"
    form: Form = "semigradient"  # ours: cheaper, and allows checkpointing; the paper recommends lagrangian
    teach: Literal["teacher", "self"] = "teacher"
    source: Literal["data", "prior"] = "data"
    guidance_scale: Guidance = 1.0  # of the teacher, w in uncond + w (cond - uncond)
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # as in DMD2
    # LSD's code: 75 % at one uniform level, the rest at two (flow_map_lsd)
    pairs: TimePairs = TimePairs(diagonal=0.75, diagonal_level="single")
    # updates until t - s may reach pairs.max_gap; 0: from the start. The jumps of pairs.to_zero do not wait
    gap_growth: int = Field(default=0, ge=0, le=MOST_UPDATES)
    # the middle level of progressive; the authors use both (flow_map_psd, flow_map_psd_half)
    middle: Literal["uniform", "half"] = "uniform"
    # adaptive weight 1 / (|r|^2 + floor)^power; 0 in LSD, with the sum over a sample (flow_map_lsd); 1 in MeanFlow
    power: float = Field(default=0.0, ge=0, le=1)
    floor: float = Field(default=1e-2, gt=0)  # MeanFlow's; |r|^2 is the sum over a sample (mean_flow_xl)
    derivative: Backend = "jvp"  # how semigradient computes its derivative
    on_policy: OnPolicy | None = None

    @model_validator(mode="after")
    def _possible(self) -> "FlowMap":
        if self.source == "prior" and self.teach == "self":
            raise ValueError("source: prior has no data from which to learn the diagonal; use teach: teacher")
        if self.teach == "self" and (self.guidance_scale != 1 or self.guidance_interval != (0, 1)):
            raise ValueError(
                "teach: self learns the map of the data, without guidance: leave out guidance_scale and "
                "guidance_interval; on_policy.guidance_scale guides the teacher"
            )
        if self.form == "progressive" and not self.pairs.diagonal:
            raise ValueError("form: progressive has no information about the velocity; set pairs.diagonal above 0")
        if self.form == "progressive" and self.source == "prior":
            raise ValueError("form: progressive needs jumps from every level; use source: data")
        if self.source == "prior" and (self.pairs.time != TimePairs().time or self.pairs.to_zero):
            raise ValueError(
                "source: prior trains jumps from t = 1 to uniform levels: leave out pairs.time and pairs.to_zero, or "
                "use source: data"
            )
        return self

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "fake_score") if self.on_policy else ("student",)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"}) if self.source == "data" else frozenset()

    def check(self, policy: RolloutPolicy) -> None:
        if not policy.any_step:
            raise ValueError(
                "a flow map is conditioned on the level it jumps to: set rollout.two_time: true and "
                "rollout.transition: ode"
            )
        if policy.embedded_guidance is not None:
            raise ValueError(
                "flow_map learns a single guidance scale, its guidance_scale; leave out rollout.embedded_guidance"
            )
        if self.source == "prior" and policy.num_steps > 1:
            raise ValueError("source: prior trains jumps from t = 1 only; give rollout.timesteps one timestep")
        if self.on_policy is not None and policy.timesteps[0] != 1:
            raise ValueError(
                "on_policy trains jumps from t = 1 with several numbers of steps, and a sampler that begins at "
                f"{policy.timesteps[0]:g} has one: let rollout.timesteps begin at 1"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        flow_maps.check_backbone(recipe.backbone)
        if self.form in ("lagrangian", "eulerian") and recipe.train.gradient_checkpointing:
            raise ValueError(
                f"form: {self.form} differentiates a derivative, which does not work with "
                "train.gradient_checkpointing; use form: semigradient, or switch gradient_checkpointing off"
            )

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        return {"fake_score": make_fake_score(backbone, policy)} if self.on_policy else {}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        growth = min(1.0, (step + 1) / self.gap_growth) if self.gap_growth else 1.0
        student_turn = GapTurn("student", ("student",), max_gap=growth * self.pairs.max_gap)
        if self.on_policy is None:
            return (student_turn,)
        return (Turn("fake_score", ("fake_score",), self.on_policy.fake_updates), student_turn)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        if turn.name == "fake_score":
            assert self.on_policy is not None
            return self.fake_loss(networks, batch, self.on_policy)
        assert isinstance(turn, GapTurn)
        residual, on_diagonal = self.residuals(networks, batch, turn.max_gap)
        total = self.reduced(residual, on_diagonal)
        terms = flow_maps.mean_squares(residual, on_diagonal)
        if self.on_policy is not None:
            residual_size = residual.detach().square().mean().sqrt()
            matching, gradient_size = self.matching_loss(networks, batch, self.on_policy, residual_size)
            total = total + self.on_policy.weight * matching
            terms["dm_grad"] = gradient_size
        return Loss(total, terms | {"loss": total.detach()})

    # --- the map

    def residuals(self, networks: Networks, batch: Batch, max_gap: float) -> tuple[Tensor, Tensor]:
        """The residuals that are squared, [B, ...] with gradient, and which samples are on the diagonal, [B] bool."""
        t, s = self.pairs(batch, max_gap=max_gap)
        on_diagonal = s == t
        noise = batch.normal("noise")
        if self.source == "prior":
            t = torch.ones_like(t)
            s = torch.where(on_diagonal, t, 1 - max_gap * batch.uniform("end"))
            x = noise
        else:
            assert batch.latents is not None
            x = networks.student.schedule.add_noise(batch.latents, noise, t).to(noise.dtype)
        residual = torch.zeros_like(x)
        for residual_of, mask in ((self.diagonal_residual, on_diagonal), (self.jump_residual, ~on_diagonal)):
            rows = flow_maps.rows_of(mask, networks.student)
            if len(rows):
                u = self.map_of(networks, batch, rows)
                values = residual_of(networks, batch, rows, u, x[rows], t[rows], s[rows])
                values = torch.where(expand(mask[rows], values), values, 0.0).to(x.dtype)
                residual = residual.index_add(0, rows, values)
        return residual, on_diagonal

    def reduced(self, residual: Tensor, on_diagonal: Tensor) -> Tensor:
        """The scalar loss of the residuals [B, ...]. on_diagonal: [B] bool."""
        return flow_maps.adaptive_loss(residual, self.power, self.floor)

    def map_of(self, networks: Networks, batch: Batch, rows: Tensor) -> AverageVelocity:
        """The student's u(x, t, s) at samples x of these rows of the batch."""
        return average_velocity(networks.student, batch.cond.select(rows))

    def diagonal_residual(
        self, networks: Networks, batch: Batch, rows: Tensor, u: AverageVelocity, x: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        """u(x, t, t) - v for these rows of the batch, with gradient to u."""
        if self.teach == "teacher":
            return u(x, t, t) - self.velocity(networks, batch, rows, u)(x, t)
        assert batch.latents is not None
        return u(x, t, t) - (batch.normal("noise", rows=rows) - batch.latents[rows])

    def jump_residual(
        self, networks: Networks, batch: Batch, rows: Tensor, u: AverageVelocity, x: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        """The residual of the identity named by `form`, with gradient to u and none to the velocity."""
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
            to_middle = u(x, t, middle)
        return u(x, t, s) - flow_maps.discrete_target(u, x, t, middle, s, to_middle)

    def velocity(self, networks: Networks, batch: Batch, rows: Tensor, u: AverageVelocity) -> Velocity:
        """The velocity that is distilled, for these rows: the guided teacher's, or the student's diagonal."""
        if self.teach == "self":
            return flow_maps.clamped(flow_maps.diagonal(u))
        cond, uncond = batch.cond.select(rows), batch.uncond.select(rows)
        return flow_maps.guided_velocity(networks.teacher, cond, uncond, self.guidance_scale, self.guidance_interval)

    # --- distribution matching on the student's own samples

    def rollout(self, networks: Networks, batch: Batch, config: OnPolicy) -> Tensor:
        """Clean samples by the jumps of `stops`, with gradient through all of them."""
        u = average_velocity(networks.student, batch.cond)
        return jumped(u, batch.normal("initial"), self.stops(networks.policy, batch, config))

    def stops(self, policy: RolloutPolicy, batch: Batch, config: OnPolicy) -> list[float]:
        """1, t_k, t_{k+1}, 0 of a random grid, without repetition. All samples share k and the grid."""
        count = config.steps[batch.integer("grid", len(config.steps))]
        levels = (*policy.with_steps(count).timesteps, 0.0)
        k = batch.integer("jump", count)
        return sorted({1.0, levels[k], levels[k + 1], 0.0}, reverse=True)

    def fake_loss(self, networks: Networks, batch: Batch, config: OnPolicy) -> Loss:
        """The denoising loss on the student's samples."""
        with torch.no_grad():
            x0 = self.rollout(networks, batch, config)
        total = denoising_loss(networks, batch, x0, config.fake_time)
        return Loss(total, {"loss": total.detach()})

    def matching_loss(
        self, networks: Networks, batch: Batch, config: OnPolicy, residual_size: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The surrogate of (fake - teacher) at the student's renoised samples, and the mean |gradient|.

        The surrogate is 1/2 |x0 - sg(x0 - g)|^2, summed over a sample's elements as the map's loss is.
        residual_size: scalar, the root mean square of the flow map's residual, which `balance` uses."""
        x0 = self.rollout(networks, batch, config)
        teacher = networks.teacher
        t = config.renoise_time(batch.uniform("renoise_time"))
        with torch.no_grad():
            x_t = teacher.schedule.add_noise(x0, batch.normal("renoise"), t)
            fake = networks.fake_score(x_t, t, batch.cond)
            scale = teacher.per_expert(config.guidance_scale, t)
            real = signals.guided(teacher, x_t, t, batch.cond, batch.uncond, scale)
            if config.balance:  # v_w - g_psi, scaled to the size of the residual; descent moves x0 along g_psi - v_w
                grad = (fake - real) / expand(t, x0)
                grad = grad * residual_size / grad.square().mean().sqrt().clamp_min(1e-8)
            else:
                grad = signals.score_difference(x0, fake, real)
        return x0[0].numel() * signals.surrogate(x0, grad), grad.abs().mean()


def jumped(u: AverageVelocity, x: Tensor, stops: Sequence[float]) -> Tensor:
    """The point x [B, ...] after jumps from each of the levels to the next."""
    for start, end in itertools.pairwise(stops):
        x = flow_maps.jump(u, x, x.new_full((len(x),), start), x.new_full((len(x),), end))
    return x
