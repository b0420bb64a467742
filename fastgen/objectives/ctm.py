"""CTM, consistency trajectory models: a student that jumps from any level to any lower one (arXiv 2310.02279).

    paper                  here                     what it is
    G_theta(x, t, s)       jump(student, x, t, s)   x - (t - s) u(x, t, s), which is s / t x + (1 - s / t) g(x, t, s)
    g_theta(x, t, s)       student, Inputs(s=s)     the student's clean prediction; at s = t it is the denoiser
    G_sg(theta)            networks["target"]       a moving average of the student (target_decay), or the student
    Solver(x_t, t, u)      x_u                      a random number of steps of the guided teacher, on a grid
    L_CTM                  error                    the distance of two endpoints
    L_DSM                  denoising                the denoising loss on g(x, t, t)

The algorithm, for every student update:
    h, the number of solver steps, with a probability proportional to h;  t > u > ... on the grid, h intervals apart
    s uniform on the grid's levels from 0 to u;  x_t from data and noise
    x_u = h steps of the teacher from x_t
    estimate = G_sg(G(x_t, t, s), s, 0),   target = G_sg(sg G(x_u, u, s), s, 0)
    student <- d(estimate, sg target) + denoising_weight * denoising
               (+ gan.weight * the generator's loss at the estimate; the discriminator, which compares estimates with
               data, has its own turn before the student's)
    the target network, if there is one, and the average of the student's weights are updated once.
The jumps from t and from u to s are compared at 0, where a third map takes both. Its weights are frozen, and gradient
flows through its input alone. At s = u the target is the teacher's own step; at s = 0 it is a consistency model's. The
solver steps over the same levels whatever h is, so that its error depends on the grid alone.

denoising: (t^2 + (1 - t)^2) |u(x_t, t, t) - v|^2, which is EDM's weight for the clean prediction in the unit of a
velocity (derived). v is noise - x0 (denoise: data), or the guided teacher's velocity (denoise: teacher), which a
guided map needs: that of data has no guidance. Half of the levels are lognormal in sigma, and half are from the upper
0.7 of EDM's spacing, as in the authors' code.

Sampling: rollout.transition ode is the paper's gamma = 0. tcd is its gamma sampler: a jump to r = (1 - eta) t_next,
and fresh noise up to t_next. In sigma = t / (1 - t), gamma^2 = 1 - (sigma_r / sigma_next)^2 (derived). gamma = 1 is
renoise, with jumps to 0 alone.

Departures. Distances are those of the consistency objective, in place of LPIPS. The weights of the terms are fixed:
the authors scale two of them by ratios of gradient norms at the network's last layer. The discriminator reads the
teacher's features (ladd.py), not those of image classifiers. Paths end at exactly 0.
"""

import itertools
import math
from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import Denoiser
from fastgen.flow import flow_maps
from fastgen.flow.flow_maps import Distance
from fastgen.flow.time_pairs import GridPairs, karras, places
from fastgen.networks import Networks, frozen, move
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.objectives.ladd import Ladd
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler, expand

HIGH_NOISE = 0.7  # "diffusion_mult": the part of EDM's spacing, from sigma = 80 down, that half of the levels cover


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class CTM(Objective):
    examples = ({}, {"gan": {"weight": 0.1}})
    page = "docs/flow_maps.md"
    takes_inputs = True

    name: Literal["ctm"] = "ctm"
    grid: GridPairs = GridPairs(count=17, spacing="karras")  # "18" levels, CIFAR-10; 40 on ImageNet: count 39
    solver: Literal["euler", "heun", "edm_heun"] = "edm_heun"  # as in the consistency objective
    solver_steps: int = Field(default=17, ge=1, le=MOST_STEPS)  # most steps from t to u: "17" CIFAR-10, "39" ImageNet
    guidance_scale: Guidance = 1.0  # of the teacher
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # as in DMD2
    target_decay: float | None = Field(default=0.999, ge=0, lt=1)  # "0.999"; None: the current weights
    distance: Distance = "square"  # ours, in place of LPIPS
    huber: float = Field(default=1e-3, ge=0)  # c of the two others, see `flow_maps.pseudo_huber`
    denoising_weight: float = Field(default=1.0, ge=0)  # "1", with a ratio of gradients that is not here
    denoise: Literal["data", "teacher"] = "data"
    # "P_mean -1.2, P_std 1.2" of sigma, for half of the samples
    denoising_time: TimeSampler = TimeSampler("logit_normal", 0.0, 1.0, mean=-1.2, std=1.2, sigma_data=0.5)
    gan: Ladd | None = None

    @model_validator(mode="after")
    def _possible(self) -> "CTM":
        if self.grid.last is not None or self.grid.time is not None:
            raise ValueError("ctm has one grid, whose levels are equally likely: leave out grid.last and grid.time")
        if self.solver_steps > self.grid.count:
            raise ValueError(
                f"solver_steps: {self.solver_steps} is more than the {self.grid.count} intervals of the grid; lower it"
            )
        if self.denoising_weight and self.denoise == "data" and self.guidance_scale != 1:
            raise ValueError(
                "denoise: data teaches velocities without guidance, and the map's are guided; set denoise: teacher, "
                "guidance_scale: 1 or denoising_weight: 0"
            )
        return self

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "discriminator") if self.gan else ("student",)

    @property
    def full_roles(self) -> tuple[str, ...]:
        return ("discriminator",) if self.target_decay is None else ("discriminator", "student")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def check(self, policy: RolloutPolicy) -> None:
        if not policy.two_time:
            raise ValueError(
                "a consistency trajectory model is conditioned on the level it jumps to: set rollout.two_time: true"
            )
        if policy.embedded_guidance is not None:
            raise ValueError(
                "ctm learns a single guidance scale, its guidance_scale; leave out rollout.embedded_guidance"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        flow_maps.check_backbone(recipe.backbone)
        if self.gan:
            self.gan.check_batch(recipe)

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        """The discriminator and the target network, where they are used. The target network draws the same dropout
        for both endpoints, so it stays in training mode."""
        modules = {} if self.gan is None else self.gan.networks(backbone)
        if self.target_decay is not None:
            modules["target"] = self.make_student(backbone, policy).requires_grad_(False)
        return modules

    def init_state(self) -> State:
        return {} if self.target_decay is None else {"updates": torch.zeros((), dtype=torch.int64)}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        roles = ("discriminator", "student") if self.gan else ("student",)
        return tuple(Turn(role, (role,)) for role in roles)

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        """target <- mu target + (1 - mu) student"""
        if self.target_decay is None or turn.name != "student":
            return
        move(networks["target"], networks.student, self.target_decay)
        state["updates"] += 1

    def target_network(self, networks: Networks, state: State) -> Denoiser:
        """G_sg. A moving average starts from the student's first weights, also those that `init_from` loads."""
        if self.target_decay is None:
            return networks.student
        if not int(state["updates"]):
            move(networks["target"], networks.student, 0.0)
        return networks["target"]  # type: ignore[return-value]

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert batch.latents is not None
        path, s = self.levels(batch)
        x_t = networks.student.schedule.add_noise(batch.latents, batch.normal("noise"), path[0]).to(batch.dtype)
        outer = self.target_network(networks, state)
        if turn.name == "discriminator":
            assert self.gan is not None
            with torch.no_grad():
                fake = endpoint(networks.student, outer, batch, x_t, path[0], s)
            return self.gan.discriminator_loss(networks, batch, fake, batch.latents)
        with torch.no_grad(), torch.random.fork_rng([x_t.device] if x_t.is_cuda else []):  # the same dropout twice
            x_u = self.solved(networks, batch, x_t, path)
            target = endpoint(networks.student, outer, batch, x_u, path[-1], s)
        estimate = endpoint(networks.student, outer, batch, x_t, path[0], s)
        error = estimate - target
        total = flow_maps.weighted_distance(error, self.distance, self.huber, torch.ones_like(s))
        terms = {"error": error.detach().square().mean().sqrt(), "solver_steps": total.new_tensor(len(path) - 1)}
        if self.denoising_weight:
            denoising = self.denoising(networks, batch)
            total = total + self.denoising_weight * denoising
            terms["denoising"] = denoising.detach()
        if self.gan is not None:
            gan = self.gan.student_loss(networks, batch, estimate)
            total = total + self.gan.weight * gan
            terms["gan"] = gan.detach()
        return Loss(total, {"loss": total.detach()} | terms)

    def levels(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """The grid's levels from t down to u, [B] each, one more than there are solver steps; and s, [B].

        All samples have the same number of steps h, and P(h) = h / (1 + ... + solver_steps)."""
        ticket = batch.integer("solver_steps", self.solver_steps * (self.solver_steps + 1) // 2)
        steps = (math.isqrt(8 * ticket + 1) + 1) // 2  # of the tickets 0, 1, 2, ..., h are for h steps
        grid = self.grid.levels(0).to(batch.ids.device)

        def index(name: str, low: int, high: Tensor | int) -> Tensor:
            """A uniform integer from low to high."""
            drawn = low + (batch.uniform(name).double() * (high - low + 1)).long()
            return torch.minimum(drawn, torch.as_tensor(high, device=drawn.device))

        start = index("pair", steps, self.grid.count)
        path = [grid[start - k].to(batch.dtype) for k in range(steps + 1)]
        return path, grid[index("end", 0, start - steps)].to(batch.dtype)

    def solved(self, networks: Networks, batch: Batch, x: Tensor, path: list[Tensor]) -> Tensor:
        """x at the last level of the path, by one step of the solver from each level to the next, along the guided
        teacher."""
        velocity = self.velocity(networks, batch)
        for t, lower in itertools.pairwise(path):
            if self.solver == "euler":
                x = (x - expand(t - lower, x) * velocity(x, t)).to(x.dtype)
            else:
                step = flow_maps.heun_step if self.solver == "heun" else flow_maps.edm_heun_step
                x = step(velocity, x, t, lower).to(x.dtype)
        return x

    def velocity(self, networks: Networks, batch: Batch) -> flow_maps.Velocity:
        return flow_maps.guided_velocity(
            networks.teacher, batch.cond, batch.uncond, self.guidance_scale, self.guidance_interval
        )

    def denoising(self, networks: Networks, batch: Batch) -> Tensor:
        """mean (t^2 + (1 - t)^2) |u(x_t, t, t) - v|^2, with gradient to the student."""
        assert batch.latents is not None
        t, noise = self.denoising_levels(batch), batch.normal("denoising")
        x_t = networks.student.schedule.add_noise(batch.latents, noise, t).to(batch.dtype)
        target = noise - batch.latents if self.denoise == "data" else self.velocity(networks, batch)(x_t, t)
        error = flow_maps.average_velocity(networks.student, batch.cond)(x_t, t, t) - target
        return (expand(t**2 + (1 - t) ** 2, error) * error.square()).mean()

    def denoising_levels(self, batch: Batch) -> Tensor:
        """[B]: half by `denoising_time`, and half with 1 - HIGH_NOISE to 1 as their place in EDM's spacing."""
        u = batch.uniform("denoising_time")
        high = karras(1 - HIGH_NOISE * u.double(), self.denoising_time.sigma_data)
        lognormal = places(batch, "denoising_kind") < 0.5
        return torch.where(lognormal, self.denoising_time(u), high).to(u).clamp_min(flow_maps.SHORTEST)


def endpoint(inner: Denoiser, outer: Denoiser, batch: Batch, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """G_outer(G_inner(x, t, s), s, 0) [B, ...], with gradient to the weights of `inner` alone. At s = 0 the outer map
    is the identity, and at s = t the inner one."""
    x_s = jump(inner, batch, x, t, s)
    with frozen(outer):
        return jump(outer, batch, x_s, s, torch.zeros_like(s))


def jump(network: Denoiser, batch: Batch, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x - (t - s) u(x, t, s) [B, ...], in the dtype of x; x itself where t = s, also at 0."""
    u = flow_maps.average_velocity(network, batch.cond)
    return (x - expand(t - s, x) * u(x, t.clamp_min(flow_maps.SHORTEST), s)).to(x.dtype)
