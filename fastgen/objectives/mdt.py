"""MDT: marginal-data transport distillation, by velocity matching and velocity distillation (arXiv 2509.04406).

    paper           here                    what it is
    u_theta(x, t)   networks.student        average velocity over [0, t]: x - t u is where the ODE ends
    v_phi           velocity(...)           the guided teacher's velocity, with one scale for each loss
    d u / dt        transport_rate(...)     d_t u + grad u . v_phi, without gradient
    delta t         interval                the step of the backward difference
    x_fake          x0                      the student's one-step sample, z - u(z, 1)

The algorithm, for every student update:
    t from a law
    velocity matching (VM):        x_t from data and noise
        student <- mean |u(x_t, t) - sg(v_phi - t du/dt)|^2
    velocity distillation (VD):    x0 = z - u(z, 1), renoised to x_t with VM's noise
        delta = sg(u + t du/dt - v_phi)(x_t, t),   student <- mean |delta + u(z, 1) - sg u(z, 1)|^2
    the average of the student's weights is updated once.

VM is the identity u + t du/dt = v of the map to data, MeanFlow's with the end fixed at 0. In VD, u + t du/dt is the
velocity that the student's map implies. It takes the place of a fake score's: descent moves x0 along delta, as
distribution matching would, and no other network is trained.

`normalise` divides du/dt by its norm (over a sample's elements) + 0.1, as the authors' code does. As t du/dt cannot be
longer than 1 then, the fixed point of VM is not the teacher's map where that moves faster. Without it, the density of
levels must not grow faster than t (docs/flow_maps.md, "Which weights keep a detached derivative stable"): on the ring
the paper's law, without it, had a loss of 18 after 150 updates. The uniform law is stable.

The network is a consistency model: it is sampled in one step, or by renoising (ours) in several. The two losses have
the same t, as in the authors' code, and the same noise at it (ours); z is drawn by itself.
"""

from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Batch
from fastgen.flow import flow_maps
from fastgen.flow.flow_maps import AverageVelocity, Velocity
from fastgen.flow.tangents import tangent
from fastgen.networks import Networks
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.recipe import Recipe
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler, expand

NORM_FLOOR = 0.1  # "c", added to the norm of du/dt: the authors' code (row mdt_matching)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class MDT(Objective):
    takes_derivatives = True
    trained_roles = ("student",)

    page = "docs/flow_maps.md"

    name: Literal["mdt"] = "mdt"
    matching_weight: float = Field(default=1.0, ge=0)  # lambda_vm: "1.0", row mdt_matching
    distillation_weight: float = Field(default=1.0, ge=0)  # lambda_vd: "1.0", row mdt_distillation
    # w in uncond + w (cond - uncond), of VM and of VD. The code's 40 and 100 are w in (1 + w) cond - w uncond, which
    # are 41 and 101 here, for TRELLIS (rows mdt_matching, mdt_distillation)
    guidance_scale: Guidance = 1.0
    distillation_guidance_scale: Guidance | None = None  # None: as guidance_scale
    # logit-normal(1, 1), from `interval` to 1 (row mdt_matching)
    time: TimeSampler = TimeSampler("logit_normal", 0.01, 1.0, mean=1.0, std=1.0)
    derivative: Literal["backward", "jvp"] = "backward"  # "discrete", the code's default, or "continuous"
    interval: float = Field(default=0.01, gt=0, le=0.5)  # "distill_interval: 0.01"
    normalise: bool = True  # "d_norm: True" (row mdt_matching); false is exact, see above

    @model_validator(mode="after")
    def _possible(self) -> "MDT":
        if not self.matching_weight and not self.distillation_weight:
            raise ValueError("matching_weight and distillation_weight are both 0, and nothing would be learned")
        if not self.matching_weight:
            raise ValueError(
                "distillation_weight without matching_weight: only velocity matching makes the student a map, whose "
                "velocity can be read; raise matching_weight"
            )
        if self.derivative == "backward" and self.time.low < self.interval:
            raise ValueError(
                f"time.low is {self.time.low:g}, but the backward difference needs levels from interval = "
                f"{self.interval:g} up; raise time.low, or use derivative: jvp"
            )
        return self

    @property
    def learned_levels(self) -> None:
        """All."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def check(self, policy: RolloutPolicy) -> None:
        if policy.num_steps > 1 and policy.transition != "renoise":
            raise ValueError(
                f"mdt only learns steps to 0, and transition: {policy.transition} steps to other levels; use renoise"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        flow_maps.check_backbone(recipe.backbone)

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (Turn("student", ("student",)),)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert batch.latents is not None
        t, u = self.time(batch.uniform("time")), average_velocity(networks, batch)
        x_t = networks.student.schedule.add_noise(batch.latents, batch.normal("noise"), t).to(batch.dtype)
        value = u(x_t, t, t)
        velocity = self.velocity(networks, batch, self.guidance_scale)(x_t, t)
        target = velocity - expand(t, x_t) * self.transport_rate(u, x_t, t, velocity, value)
        matching = (value - target).square().mean()
        total, terms = self.matching_weight * matching, {"matching": matching.detach()}
        if self.distillation_weight:
            distillation, gap = self.distillation(networks, batch, u, t)
            total = total + self.distillation_weight * distillation
            terms |= {"distillation": distillation.detach(), "velocity_gap": gap}
        return Loss(total, terms | {"loss": total.detach()})

    def distillation(self, networks: Networks, batch: Batch, u: AverageVelocity, t: Tensor) -> tuple[Tensor, Tensor]:
        """VD's loss, and the mean |delta| of the velocities that are compared."""
        z = batch.normal("initial")
        one_step = u(z, torch.ones_like(t), t)
        with torch.no_grad():
            x0 = z - one_step
            x_t = networks.student.schedule.add_noise(x0, batch.normal("noise"), t).to(z.dtype)
            scale = self.distillation_guidance_scale
            velocity = self.velocity(networks, batch, self.guidance_scale if scale is None else scale)(x_t, t)
            value = u(x_t, t, t)
            delta = value + expand(t, x_t) * self.transport_rate(u, x_t, t, velocity, value) - velocity
        return (delta + one_step - one_step.detach()).square().mean(), delta.abs().mean()

    def velocity(self, networks: Networks, batch: Batch, scale: Guidance) -> Velocity:
        """The guided teacher's velocity, for this batch's prompts."""
        return flow_maps.guided_velocity(networks.teacher, batch.cond, batch.uncond, scale)

    @torch.no_grad()
    def transport_rate(self, u: AverageVelocity, x: Tensor, t: Tensor, velocity: Tensor, value: Tensor) -> Tensor:
        """du/dt = d_t u + grad u . velocity [B, ...], without gradient.

        By a JVP, or backward: (u(x, t) - u(x - i v, t - i)) / i, where i is `interval` and `value` is u(x, t)."""
        if self.derivative == "jvp":
            _, rate = flow_maps.eulerian_derivative(u, x, t, torch.zeros_like(t), velocity, tangent)
        else:
            rate = (value - u(x - self.interval * velocity, t - self.interval, t)) / self.interval
        if not self.normalise:
            return rate
        return rate / (expand(rate.flatten(1).square().sum(1).sqrt(), rate) + NORM_FLOOR)


def average_velocity(networks: Networks, batch: Batch) -> AverageVelocity:
    """The student's u(x, t) over [0, t], as a function of x, t and an end that it is not told."""
    flow_maps.require_flow(networks.student)
    return lambda x, t, s: networks.student(x, t, batch.cond, predict="flow_prediction")
