"""Progressive distillation: a student of N steps learns two steps of one with 2 N (arXiv 2202.00512).

    paper        here                  what it is
    x^_theta     networks.student      clean prediction
    x^_eta       networks.teacher,     the guided teacher in the first stage, afterwards the student of the stage
                 networks["previous"]  before
    t', t''      middle, s             the levels half a step and one step below t
    x~           target                the clean prediction from which one DDIM step goes where the two steps went
    N            2^j policy.num_steps  steps in stage j, which counts down to 0

The algorithm, for every student update of a stage:
    t = one of the stage's levels, s the next lower one, x_t from data and noise
    x_s = two DDIM steps t -> middle -> s of the previous student
    x~  = (x_s - sigma_s / sigma_t x_t) / (alpha_s - sigma_s / sigma_t alpha_t)
    student <- w mean |G(x_t, t) - x~|^2,   w = max(SNR, 1), or (1 + sqrt(SNR))^2, which makes it a velocity's;
               SNR = alpha_t^2 / sigma_t^2
    the average of the student's weights is updated once.
Between two stages the student becomes `previous`; the learning rate begins again, if the optimizer's decays.

The last stage has the levels of the policy, and each stage before it twice as many: every interval is halved. On the
flow-matching path, with weight: velocity, this is the regression of v on the mean of two velocities of half a step.

The student is only right at its own levels, and at every stage its optimum is what the stage before did: with
stages: j, the finest Euler grid has 2^j policy.num_steps steps, and its error stays in all students. Guidance acts
in the first stage alone (the student is guided from then on), as in arXiv 2210.03142 with a fixed scale.
"""

from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.flow.time_pairs import between
from fastgen.networks import Networks, move
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS, MOST_UPDATES
from fastgen.rollout import RolloutPolicy, transition
from fastgen.schedule import Schedule


@plain_dataclass(frozen=True)
class StageTurn(Turn):
    """halvings: the stage has 2^halvings times the steps of the policy. first: whether its teacher is the teacher.
    begins: whether the student of the stage before is yet to be stored."""

    halvings: int = 0
    first: bool = True
    begins: bool = False


Updates = Annotated[int, Field(ge=1, le=MOST_UPDATES)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Progressive(Objective):
    trained_roles = ("student",)
    full_roles = ("student",)  # its weights are copied into `previous`

    page = "docs/flow_maps.md"

    name: Literal["progressive"] = "progressive"
    stages: int = Field(default=3, ge=1, le=12)  # how often the number of steps is halved; ours
    # updates of each stage; "50k" in the paper, and 100k for the stages of 2 and 1 steps
    stage_updates: tuple[Updates, ...] | Updates = 50_000
    # truncated: "truncated SNR", max(SNR, 1), the paper's choice; velocity: of flow matching
    weight: Literal["truncated", "velocity"] = "truncated"
    guidance_scale: Guidance = 1.0  # of the teacher, in the first stage

    @property
    def lengths(self) -> tuple[int, ...]:
        """The updates of each stage."""
        given = self.stage_updates
        return (given,) * self.stages if isinstance(given, int) else given

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def check(self, policy: RolloutPolicy) -> None:
        if policy.num_steps > 1 and policy.transition != "ode":
            raise ValueError(
                f"progressive learns DDIM steps, and transition: {policy.transition} makes other ones; use ode"
            )
        if policy.conditioning_time is not None:
            raise ValueError("progressive trains the student at its true levels; remove rollout.conditioning_time")
        if policy.num_steps * 2**self.stages > MOST_STEPS:
            raise ValueError(f"stages: {self.stages} halvings of {policy.num_steps} steps are too many; lower it")

    def check_recipe(self, recipe: Recipe) -> None:
        if len(self.lengths) != self.stages:
            raise ValueError(
                f"stage_updates must be one number, or one for each of the {self.stages} stages, got "
                f"{list(self.lengths)}"
            )
        if sum(self.lengths) != recipe.train.steps:
            raise ValueError(
                f"the stages have {sum(self.lengths)} updates in all and train.steps is {recipe.train.steps}; the "
                "last stage, which has the steps of the rollout, must end with the run: make them equal"
            )

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        return (
            {"previous": self.make_student(backbone, policy).requires_grad_(False).eval()} if self.stages > 1 else {}
        )

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        begun, stage = 0, 0
        while stage + 1 < self.stages and step >= begun + self.lengths[stage]:
            begun += self.lengths[stage]
            stage += 1
        return (
            StageTurn(
                "student",
                ("student",),
                progress=(step - begun, self.lengths[stage]),
                halvings=self.stages - 1 - stage,
                first=stage == 0,
                begins=stage > 0 and step == begun,
            ),
        )

    def init_state(self) -> State:
        return {"stored": torch.zeros((), dtype=torch.int64)}

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        state["stored"].zero_()

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert isinstance(turn, StageTurn) and batch.latents is not None
        if turn.begins and not int(state["stored"]):
            move(networks["previous"], networks.student, 0.0)
            state["stored"].fill_(1)
        schedule = networks.student.schedule
        t, s = self.levels(networks.policy, batch, turn.halvings)
        x_t = schedule.add_noise(batch.latents, batch.normal("noise"), t).to(batch.dtype)
        target = self.target(turn, networks, batch, x_t, t, s)
        error = networks.student(x_t, t, batch.cond) - target
        alpha, sigma = schedule.coefficients(t, x_t)
        weight = (alpha / sigma) ** 2
        weight = weight.clamp_min(1) if self.weight == "truncated" else ((alpha + sigma) / sigma) ** 2
        total = (weight * error.square()).mean()
        terms = {"loss": total.detach(), "error": error.detach().square().mean().sqrt()}
        return Loss(total, terms | {"steps": total.new_tensor(networks.policy.num_steps * 2**turn.halvings)})

    @torch.no_grad()
    def target(self, turn: StageTurn, networks: Networks, batch: Batch, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x~ [B, ...], the clean prediction whose DDIM step from t to s makes two steps of the stage before."""
        middle, x = between(s, t, torch.full_like(t, 0.5)), x_t
        for start, end in ((t, middle), (middle, s)):
            if turn.first:
                teacher = networks.teacher
                scale = teacher.per_expert(self.guidance_scale, start)
                x0 = signals.guided(teacher, x, start, batch.cond, batch.uncond, scale)
            else:
                x0 = networks["previous"](x, start, batch.cond)
            x = transition(networks.student.schedule, x0, x, start, end, None).to(x_t.dtype)
        return clean_prediction(networks.student.schedule, x_t, x, t, s)

    def levels(self, policy: RolloutPolicy, batch: Batch, halvings: int) -> tuple[Tensor, Tensor]:
        """t and the next lower level s, [B] each, of a grid in which every step of the policy is 2^halvings steps."""
        parts = 2**halvings
        ends = batch.uniform("step").new_tensor((*policy.timesteps, 0.0))
        place = (batch.uniform("step") * policy.num_steps * parts).long().clamp(max=policy.num_steps * parts - 1)
        step, part = place // parts, place % parts

        def level(part: Tensor) -> Tensor:
            return between(ends[step], ends[step + 1], part / parts)

        return level(part), level(part + 1)


def clean_prediction(schedule: Schedule, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The clean prediction whose DDIM step takes x_t to x_s, s < t    (arXiv 2202.00512, Alg. 2)

    x~ = (x_s - sigma_s / sigma_t x_t) / (alpha_s - sigma_s / sigma_t alpha_t)"""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.coefficients(t, x_t), schedule.coefficients(s, x_t)
    ratio = sigma_s / sigma_t
    return (x_s - ratio * x_t) / (alpha_s - ratio * alpha_t)
