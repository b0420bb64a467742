"""ODE regression: knowledge distillation on the teacher's own ODE (arXiv 2101.02388), a warm-up for other methods.

    paper      here                what it is
    theta      networks.student    the student G, initialised from the teacher
    x_T, x_0   batch.pairs         a noise, and where the guided teacher's sampler takes it
    t          t                   one of the student's timesteps, at random by sample

The algorithm, for every student update:
    x_t = the state between the two ends of a pair, at level t
    student <- 1/2 mean |G(x_t, t) - x_0|^2                     (FastGen's KD; DMD's initialisation has LPIPS for it)
    the average of the student's weights moves, once.

The state of a pair below t = 1 is, by `states`,
    line    alpha x_0 + sigma x_T, between its ends: where `ode` sampling comes by if its predictions are right
    path    the teacher's own, from x_T by Euler steps on the spot: where a flow map of the teacher's comes by
At t = 1, the one level of a one-step student, the two are the same.

The teacher's ODE sends each noise to one sample, and a student of enough capacity and pairs learns that map. Where it
falls short the square blurs, and where pairs are few it learns them by heart: take a few thousand updates, then
another objective with `init_from`.
"""

from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import signals
from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.rollout import draw_stops, predict_x0, transition


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ODERegression(Objective):
    """guidance_scale: of the teacher on its path; give the pairs the same."""

    trained_roles = ("student",)

    name: Literal["ode_regression"] = "ode_regression"
    states: Literal["line", "path"] = "line"  # ours; FastGen stores four states of the path
    path_steps: int = Field(default=16, ge=1)  # ours
    guidance_scale: Guidance = 1.0
    huber: float | None = Field(default=None, gt=0)  # ours: sqrt(|e|^2 + c^2) - c by sample; None: the paper's square

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"pairs"})

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (Turn("student", ("student",)),)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert batch.pairs is not None
        policy, (noise, x0) = networks.policy, batch.pairs
        t = noise.new_tensor(policy.timesteps)[draw_stops(batch, policy.num_steps, shared=False)]
        if self.states == "path":
            x_t = self.path(networks, batch, noise, t)
        else:
            x_t = networks.student.schedule.add_noise(x0, noise, t).to(noise.dtype)
        error = predict_x0(networks.student, x_t, t, batch.cond, policy) - x0
        square = signals.per_sample_mean(error.square())
        total = 0.5 * square.mean()
        if self.huber is not None:
            total = ((square + self.huber**2).sqrt() - self.huber).mean()
        return Loss(total, {"loss": total.detach(), "error": square.mean().sqrt().detach()})

    @torch.no_grad()
    def path(self, networks: Networks, batch: Batch, x: Tensor, t: Tensor) -> Tensor:
        """Where the teacher's ODE takes noise x [B, ...] at level t [B]: path_steps Euler steps, evenly spaced."""
        teacher = networks.teacher
        for i in range(self.path_steps):
            here, there = (1 - (1 - t) * k / self.path_steps for k in (i, i + 1))
            scale = teacher.per_expert(self.guidance_scale, here)
            x0 = signals.guided(teacher, x, here, batch.cond, batch.uncond, scale)
            x = transition(teacher.schedule, x0, x, here, there, None).to(x.dtype)
        return x
