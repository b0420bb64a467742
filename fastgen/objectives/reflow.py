"""Reflow: rectified flows on the teacher's own pairs (arXiv 2209.03003), and SlimFlow's form of it (arXiv 2407.12718).

    paper        here                 what it is
    v_theta      networks.student     velocity, initialised from the teacher or, with init_from, from the stage before
    (X_0, X_1)   batch.pairs          a noise, and the sample to which the guided teacher's sampler takes it
    X_0'         noise                the pair's noise, with fresh noise mixed in (anneal)
    beta         turn.fresh           the share of fresh noise, from 1 to 0
    t'           middle               where the guided path changes hands, as a level
    v_phi        networks["guide"]    the flow that guides the distillation: the student as its run began

The algorithm, for every student update:
    stage: straighten     t ~ U(0, 1),  x_t = (1 - t) x0 + t noise
        student <- mean |v(x_t, t) - (noise - x0)|^2
    stage: distill        the same at t = 1 alone, so that one step takes noise to x0
        + weight * mean |v(z, 1) - sg v_guided|^2 for fresh noise z                        (SlimFlow, `guide`)
    the average of the student's weights is updated once.

The flow that is learned has the pairs' marginals, and its paths cross less than the teacher's: it is straight where
every x_t belongs to one pair only, and then one Euler step is exact. Run it, make pairs with its export, and run it
again for a 3-rectified flow; or run stage: distill with init_from the straightened flow (InstaFlow, arXiv 2309.06380).

anneal (SlimFlow). A network that is smaller than the teacher has no weights to start from. It learns the pairs with
    noise' = sqrt(1 - beta^2) noise + beta fresh,   beta from 1 (flow matching on the teacher's samples) to 0 (reflow).
guide (SlimFlow). In stage: distill, fresh noise has no pair. The target is a two-step solution of the flow v_phi:
        x_m = z - (1 - m) v_phi(z, 1),   v_guided = z - (x_m - m v_phi(x_m, m)),   m ~ U(0.2, 0.8)
    which is the paper's form, or, with first: student, that of the released code: its first step is the student's own.

Pairs inherit what the teacher's sampler gets wrong, its guidance included. Departures: LPIPS is not used, and nothing
is mirrored at random; a mirrored pair is right only where the teacher has that symmetry.
"""

from dataclasses import dataclass as plain_dataclass
from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import Denoiser
from fastgen.flow import flow_maps
from fastgen.flow.time_pairs import between
from fastgen.networks import Networks, move
from fastgen.objectives.base import Loss, Objective, State, Turn
from fastgen.recipe import Recipe
from fastgen.registry import MOST_UPDATES
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler, expand


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class FlowGuide:
    """SlimFlow's flow-guided distillation.

    weight: of the term, a mean square as the other one is.
    first: whose step from noise it is, the guide's (the paper) or the student's own (the released code).
    low, high: the levels between which the second step begins."""

    weight: float = Field(default=1.0, gt=0)  # 1 in the released code (row slim_flow_guide)
    first: Literal["guide", "student"] = "guide"
    low: float = Field(default=0.2, gt=0, lt=1)  # "0.2" to "0.8" (row slim_flow_guide)
    high: float = Field(default=0.8, gt=0, lt=1)

    @model_validator(mode="after")
    def _ordered(self) -> "FlowGuide":
        if self.low >= self.high:
            raise ValueError(f"guide: low must be below high, got {self.low:g} and {self.high:g}")
        return self


@plain_dataclass(frozen=True)
class ReflowTurn(Turn):
    """fresh: beta, the share of fresh noise in this update."""

    fresh: float = 0.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Reflow(Objective):
    trained_roles = ("student",)
    needs_whole_videos = "the ends of its pairs are whole videos, and a straight path between them has no past"

    page = "docs/flow_maps.md"

    name: Literal["reflow"] = "reflow"
    stage: Literal["straighten", "distill"] = "straighten"
    time: TimeSampler = TimeSampler(low=0.0, high=1.0)  # "t ~ U(0, 1)", of stage: straighten
    # updates in which beta falls from 1 to 0, linearly; "300k" in SlimFlow's script, 0: no fresh noise
    anneal: int = Field(default=0, ge=0, le=MOST_UPDATES)
    guide: FlowGuide | None = None

    @model_validator(mode="after")
    def _stages(self) -> "Reflow":
        if self.stage == "straighten" and self.guide is not None:
            raise ValueError("guide is SlimFlow's term for one step from noise; set stage: distill, or leave it out")
        if self.stage == "distill" and self.anneal:
            raise ValueError(
                "anneal mixes fresh noise into the pairs, and a step from such noise has no single sample to end at; "
                "it is for stage: straighten"
            )
        if self.stage == "distill" and self.time != TimeSampler(low=0.0, high=1.0):
            raise ValueError("stage: distill trains level 1 alone; leave out time")
        return self

    @property
    def full_roles(self) -> tuple[str, ...]:
        return ("student",) if self.guide else ()  # its weights are copied into the guide

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"pairs"})

    def check(self, policy: RolloutPolicy) -> None:
        if self.stage == "distill" and policy.num_steps > 1:
            raise ValueError(
                f"stage: distill trains one step, and rollout.timesteps has {policy.num_steps}; give [1.0]"
            )
        if policy.num_steps > 1 and policy.transition != "ode":
            raise ValueError(
                f"a rectified flow is sampled along its ODE, and transition: {policy.transition} leaves it; use ode"
            )
        if policy.conditioning_time is not None:
            raise ValueError("reflow trains the student at its true levels; remove rollout.conditioning_time")

    def check_recipe(self, recipe: Recipe) -> None:
        flow_maps.check_backbone(recipe.backbone)

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        return {"guide": self.make_student(backbone, policy).requires_grad_(False).eval()} if self.guide else {}

    def init_state(self) -> State:
        return {"updates": torch.zeros((), dtype=torch.int64)} if self.guide else {}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        fresh = max(0.0, 1 - step / self.anneal) if self.anneal else 0.0
        return (ReflowTurn("student", ("student",), fresh=fresh),)

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        if self.guide:
            state["updates"] += 1

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert isinstance(turn, ReflowTurn) and batch.pairs is not None
        noise, x0 = batch.pairs
        if turn.fresh:
            noise = (1 - turn.fresh**2) ** 0.5 * noise + turn.fresh * batch.normal("fresh")
        t = torch.ones_like(batch.uniform("time")) if self.stage == "distill" else self.time(batch.uniform("time"))
        x_t = networks.student.schedule.add_noise(x0, noise, t).to(noise.dtype)
        total = (velocity(networks.student, batch, x_t, t) - (noise - x0)).square().mean()
        terms = {"error": total.detach().sqrt()}
        if self.anneal:
            terms["fresh"] = total.new_tensor(turn.fresh)
        if self.guide:
            if not int(state["updates"]):
                move(networks["guide"], networks.student, 0.0)
            guided = self.guided_loss(networks, batch, self.guide)
            total = total + self.guide.weight * guided
            terms["guided"] = guided.detach()
        return Loss(total, terms | {"loss": total.detach()})

    def guided_loss(self, networks: Networks, batch: Batch, guide: FlowGuide) -> Tensor:
        """mean |v(z, 1) - sg v_guided|^2 for fresh noise z."""
        z, middle = batch.normal("guided"), between(guide.low, guide.high, batch.uniform("middle"))
        one = torch.ones_like(middle)
        prediction, flow = velocity(networks.student, batch, z, one), networks["guide"]
        with torch.no_grad():
            first = prediction if guide.first == "student" else velocity(flow, batch, z, one)  # type: ignore[arg-type]
            x_m = z - expand(1 - middle, z) * first
            end = x_m - expand(middle, z) * velocity(flow, batch, x_m, middle)  # type: ignore[arg-type]
        return (prediction - (z - end)).square().mean()


def velocity(network: Denoiser, batch: Batch, x: Tensor, t: Tensor) -> Tensor:
    return network(x, t, batch.cond, predict="flow_prediction")
