"""Transition matching by average velocities: the first stage of TMD (arXiv 2601.09881), which teaches the inner flow
of a student. The second stage is distribution matching through that flow: `dmd2` with the same rollout.inner.

    paper           here                what it is
    x_t, t          x_t, t              real data, noised to an outer level
    y               target              what the network predicts of x_t: noise - x0, or x0
    y_1, y_s        noise, y            noise, and (1 - s) target + s noise
    head(y_s, s, r; m)  h               networks.student with Inputs.inner = y and inner_levels = (s, r)
    u               (y - h) / s         the average velocity of the inner flow over [r, s], see modules/inner_flow.py

Of what the network has to predict at x_t, a usual loss learns the mean. Here the head learns the whole law, as a flow
from noise that is conditioned on the trunk's features. MeanFlow's identity for this flow is

    u + (s - r) D u = E[noise - target | y_s, x_t],    D u = d_s u + grad u . (noise - target)

With u = (y - h) / s, that is a regression of h (derived):

    student <- |h(y_s, s, r) - sg(target + s (s - r) D u)|^2 / sg(|.|^2 + floor d)^power,    d elements of a sample

on a share of samples with s = r, where it is the ordinary loss of a flow on y, and otherwise with r the next lower
level of the inner flow's own grid. If data given x_t are Gaussian, the exact h satisfies it, and the inner flow then
draws from their law in any number of steps (tests/test_inner_flow.py).

Departures. The paper's head means u = y_1 - h; modules/inner_flow.py says what that would learn. It guides this stage
(a scale of 3, by a rule that we have not read) and drops prompts in it; here guidance comes with the teacher of the
second stage. The law of the outer level is ours. Both networks, trunk and head, are trained, as there.
"""

from functools import partial
from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Batch
from fastgen.denoiser import Denoiser, Inputs
from fastgen.flow import flow_maps
from fastgen.flow.tangents import Backend, tangent
from fastgen.modules.inner_flow import Head, average_velocity
from fastgen.networks import Networks
from fastgen.objectives.base import Loss, Objective, State, Turn
from fastgen.policy import RolloutPolicy
from fastgen.recipe import Recipe
from fastgen.schedule import TimeSampler, expand


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TransitionMatching(Objective):
    page = "docs/flow_maps.md"
    trained_roles = ("student",)
    takes_inner = True
    needs_inner = True
    takes_derivatives = True
    needs_whole_videos = "it teaches an inner flow, which a student that works in chunks does not have"

    name: Literal["transition_matching"] = "transition_matching"
    time: TimeSampler = TimeSampler(low=0.001, high=1.0)  # of t; ours
    inner_time: TimeSampler = TimeSampler(
        low=0.01, high=1.0, shift=3.0
    )  # of s: uniform, shift 3, the paper; low is ours
    diagonal: float = Field(default=0.75, gt=0, le=1)  # the share of samples with s = r: the paper
    power: float = Field(default=1.0, ge=0, le=1)  # of the adaptive weight: the paper
    floor: float = Field(default=1.0, gt=0)  # c over d: 1 for Wan 2.1 1.3B, 1e-5 for 14B in the paper
    derivative: Backend = "difference"  # central differences, of 5e-3 in s: the paper

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def check(self, policy: RolloutPolicy) -> None:
        if policy.inner is None:
            raise ValueError(
                "transition_matching teaches the inner flow of a student: give rollout.inner, such as "
                "{blocks: 5, levels: [1.0, 0.5]}"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        flow_maps.check_backbone(recipe.backbone)

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (Turn("student", ("student",)),)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert batch.latents is not None and networks.policy.inner is not None
        student, outer = networks.student, batch.normal("noise")
        t = self.time(batch.uniform("time"))
        x_t = student.schedule.add_noise(batch.latents, outer, t).to(outer.dtype)
        target = batch.latents if student.prediction_type == "sample" else outer - batch.latents
        s, r = self.levels(batch, networks.policy.inner.levels)
        noise = batch.normal("inner")
        y = expand(1 - s, noise) * target + expand(s, noise) * noise
        goal = target
        off = flow_maps.rows_of(r < s, student)
        if len(off):
            head = head_of(student, batch, x_t, t, off)
            values = self.goal(head, y[off], s[off], r[off], (noise - target)[off], target[off])
            values = torch.where(expand((r < s)[off], values), values, target[off])
            goal = target.index_copy(0, off, values.to(target.dtype))
        residual = head_of(student, batch, x_t, t)(y, s, r) - goal
        total = flow_maps.adaptive_loss(residual, self.power, self.floor * residual[0].numel())
        return Loss(total, flow_maps.mean_squares(residual, s == r) | {"loss": total.detach()})

    def levels(self, batch: Batch, grid: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """s and r [B]: the same for a share of the samples, and otherwise r is the largest level of the grid, followed
        by 0, below s."""
        s = self.inner_time(batch.uniform("inner_time"))
        steps = s.new_tensor((*grid, 0.0))
        below = torch.where(steps < s[:, None], steps, 0.0).amax(1)
        return s, torch.where(batch.uniform("diagonal") < self.diagonal, s, below)

    @torch.no_grad()
    def goal(self, head: Head, y: Tensor, s: Tensor, r: Tensor, velocity: Tensor, target: Tensor) -> Tensor:
        """target + s (s - r) D u [B, ...], what h(y, s, r) regresses on; velocity: noise - target."""
        differentiate = partial(tangent, backend=self.derivative)
        _, derivative = flow_maps.eulerian_derivative(average_velocity(head), y, s, r, velocity, differentiate)
        return target + expand(s * (s - r), y) * derivative


def head_of(student: Denoiser, batch: Batch, x_t: Tensor, t: Tensor, rows: Tensor | None = None) -> Head:
    """The student's h(y, s, r) at x_t, at some of its rows or all; each call runs the trunk anew."""
    cond = batch.cond if rows is None else batch.cond.select(rows)
    x_t, t = (x_t, t) if rows is None else (x_t[rows], t[rows])

    def head(y: Tensor, s: Tensor, r: Tensor) -> Tensor:
        inputs = Inputs(inner=y, inner_levels=torch.stack([s, r], dim=-1))
        return student(x_t, t, cond, inputs, predict=student.prediction_type)

    return head
