"""Self-E: a student of any number of steps that learns from data, and evaluates its own jumps (arXiv 2512.22374).

    paper            here                  what it is
    G_theta(x,t,s,c) networks.student      clean prediction at level t, told the level s where its step ends
    G_theta^-        networks["target"]    moving average of the student (target_decay), the conditional evaluator
    x_s^             x_s                   the prediction, renoised to s with fresh noise
    x_self           x0 - evaluation(...)  x0^ moved along the evaluation, without gradient
    lambda_{s,t}     pull_share(...)       sigma_t / alpha_t - sigma_s / alpha_s, written as w = lambda / (1 + lambda)
    tau              turn.max_gap          how far below t the level s may lie, as a share of t
    "fake" model     networks.fake_score   denoiser of the student's own predictions (option `fake`)

The algorithm, for every student update:
    t from a law;  s = t for a share of the samples, uniform in [(1 - tau) t, t] for the others;  x_t from data
    x0^    = G(x_t, t, s, c)
    x_s^   = sg(x0^), renoised to s
    x_self = sg[x0^ - (G(x_s^, s, s, empty) - G^-(x_s^, s, s, c))]
    student <- |x0^ - y|^2 / t^2,   y = (1 - w) x0 + w x_self, scaled to the norm of x0
    the target network and the average of the student's weights are updated once.

Both evaluators have s as both levels, which makes them denoisers: G(.., c) - G(.., empty) = sigma^2 / alpha grad
log p(c | x_s), the score of a classifier. It moves a jump towards what its prompt describes. At s = t, w is 0 and the
loss is flow matching. At t = 1, where lambda is infinite, the jump learns from its evaluation alone.

fake. The classifier's score is one part of the gradient of KL(student | data); it sharpens, and leaves the law of the
    samples too narrow. `fake` adds the other part from update `start` on: the evaluation is then
        G_fake(x_s^, s) - G^-(x_s^, s, s, c),
    which is that of distribution matching, with the student as its own teacher.

The student has guidance neither in training nor in sampling; the paper samples with a scale of 5.

A limit of the method. At t = 1 the evaluation makes the law of x0^ that of the data, so that fresh noise leads to the
law of x_s. The sampler goes to (1 - s) x0^ + s z with the noise z that x0^ was made from. For data of standard
deviation S the state has (1 - s) S + s instead of sqrt((1 - s)^2 S^2 + s^2) (derived). Short steps have little of this
error, and a step to 0 none. On the ring, eight and sixteen steps are near the floor, and four are not.

Departures. A run starts from the weights of its backbone, not from scratch (`backbone.fit_steps: 0` of a mixture gives
random ones). The paper's fake model is the network itself under another prompt; here it is a network of its own,
which is told the level t that each prediction was made from (ours). w replaces lambda, so that t = 1 is no exception.
"""

from dataclasses import dataclass as plain_dataclass
from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import Inputs
from fastgen.flow import flow_maps
from fastgen.networks import Networks, move
from fastgen.objectives.base import Loss, Objective, State, Turn
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS, MOST_UPDATES
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import Schedule, TimeSampler, expand


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Fake:
    """The model of the student's own predictions.

    start: the update from which it is used. It is trained from the first update on, so that it is ready then."""

    start: int = Field(default=0, ge=0, le=MOST_UPDATES)  # "550k" of the paper, whose early use "is harmful"
    updates: int = Field(default=1, ge=1, le=MOST_STEPS)  # per student update; ours


@plain_dataclass(frozen=True)
class SelfETurn(Turn):
    """max_gap: the largest (t - s) / t in this update. fake: whether the model of the student's samples evaluates."""

    max_gap: float = 1.0
    fake: bool = False


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class SelfE(Objective):
    takes_inputs = True

    page = "docs/flow_maps.md"

    name: Literal["self_e"] = "self_e"
    # "logit-normal with a shift by resolution", Sec. 4; the numbers are those of SD3 (ours)
    time: TimeSampler = TimeSampler("logit_normal", 0.0, 1.0)
    diagonal: float = Field(default=0.5, ge=0, lt=1)  # "0.5": share of samples with s = t
    # updates in which tau grows from 0 to 1; "300k" in the paper, 0 starts at 1
    gap_growth: int = Field(default=300_000, ge=0, le=MOST_UPDATES)
    target_decay: float = Field(default=0.9999, ge=0, lt=1)  # "0.9999" of the EMA that evaluates with the prompt
    normalise: bool = True  # y is scaled to the norm of x0; for data of few dimensions this is a bias: false
    drop: float = Field(default=0.1, gt=0, lt=1)  # share of samples that train without their prompt; ours
    fake: Fake | None = None  # the late stage of the paper

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "fake_score") if self.fake else ("student",)

    @property
    def full_roles(self) -> tuple[str, ...]:
        return ("student",)  # its weights are averaged into the target network

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def check(self, policy: RolloutPolicy) -> None:
        if not policy.any_step:
            raise ValueError(
                "self_e trains a student that is told where its step ends: set rollout.two_time: true and "
                "rollout.transition: ode"
            )
        if policy.embedded_guidance is not None:
            raise ValueError("self_e does not train a guidance input; leave out rollout.embedded_guidance")

    def check_recipe(self, recipe: Recipe) -> None:
        flow_maps.check_backbone(recipe.backbone)
        if getattr(recipe.backbone, "classes", ()) is None and self.fake is None:
            raise ValueError(
                "the mixture has no classes, so its prompts say nothing, and a student that evaluates itself by them "
                "learns flow matching alone; give backbone.classes, or the section objective.fake"
            )

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"target": self.make_student(backbone, policy).requires_grad_(False)}
        if self.fake:
            modules["fake_score"] = backbone.load("fake_score")
            modules["fake_score"].add_inputs({}, backbone.time_dim, ("s",))  # type: ignore[operator]
        return modules

    def init_state(self) -> State:
        return {"updates": torch.zeros((), dtype=torch.int64)}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        gap = min(1.0, (step + 1) / self.gap_growth) if self.gap_growth else 1.0
        if self.fake is None:
            return (SelfETurn("student", ("student",), max_gap=gap),)
        return (
            SelfETurn("fake_score", ("fake_score",), self.fake.updates, max_gap=gap),
            SelfETurn("student", ("student",), max_gap=gap, fake=step >= self.fake.start),
        )

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert isinstance(turn, SelfETurn)
        if not int(state["updates"]):
            move(networks["target"], networks.student, 0.0)
        return (
            self.student_loss(turn, networks, batch)
            if turn.name == "student"
            else self.fake_loss(turn, networks, batch)
        )

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        """target <- mu target + (1 - mu) student"""
        if turn.name == "student":
            move(networks["target"], networks.student, self.target_decay)
            state["updates"] += 1

    def student_loss(self, turn: SelfETurn, networks: Networks, batch: Batch) -> Loss:
        assert batch.latents is not None
        t, s = self.levels(batch, turn.max_gap, self.diagonal)
        cond = dropped(batch, self.drop)
        x0, schedule = batch.latents, networks.student.schedule
        x_t = schedule.add_noise(x0, batch.normal("noise"), t).to(x0.dtype)
        prediction = networks.student(x_t, t, cond, Inputs(s=s))
        with torch.no_grad():
            pull = self.evaluation(turn, networks, batch, cond, prediction.detach(), t, s)
            share = expand(pull_share(schedule, t, s), x0)
            target = (1 - share) * x0 + share * (prediction - pull)
            if self.normalise:
                target = target * expand(norm(x0) / norm(target).clamp_min(1e-8), x0)
        residual = (prediction - target) / expand(t, x0)
        total = residual.square().mean()
        terms = flow_maps.mean_squares(residual, s == t)
        return Loss(total, {"loss": total.detach(), "pull": pull.abs().mean()} | terms)

    def fake_loss(self, turn: SelfETurn, networks: Networks, batch: Batch) -> Loss:
        """The denoising loss on the student's predictions, renoised to the level s of their jump. No sample is on the
        diagonal. The square is that of the velocity times s, which is 1 / s times that of x0 (ours)."""
        assert batch.latents is not None
        t, s = self.levels(batch, turn.max_gap, 0.0)
        cond, schedule = dropped(batch, self.drop), networks.student.schedule
        with torch.no_grad():
            x_t = schedule.add_noise(batch.latents, batch.normal("noise"), t).to(batch.latents.dtype)
            x0 = networks.student(x_t, t, cond, Inputs(s=s))
            x_s = schedule.add_noise(x0, batch.normal("renoise"), s).to(x_t.dtype)
        prediction = networks.fake_score(x_s, s, cond, Inputs(s=t))
        total = signals.denoising_loss(prediction, x0, x_s, s, schedule, "flow_prediction", weight=s)
        return Loss(total, {"loss": total.detach()})

    def evaluation(
        self,
        turn: SelfETurn,
        networks: Networks,
        batch: Batch,
        cond: Conditioning,
        x0: Tensor,
        t: Tensor,
        s: Tensor,
    ) -> Tensor:
        """x0 - x_self [B, ...]: what the student's prediction x0 is to be moved back by. No gradient."""
        x_s = networks.student.schedule.add_noise(x0, batch.normal("renoise"), s).to(x0.dtype)
        real = networks["target"](x_s, s, cond, Inputs(s=s))
        if turn.fake:
            return networks.fake_score(x_s, s, cond, Inputs(s=t)) - real
        return networks.student(x_s, s, batch.uncond, Inputs(s=s)) - real

    def levels(self, batch: Batch, max_gap: float, diagonal: float) -> tuple[Tensor, Tensor]:
        """t and s <= t, [B] each, both at least flow_maps.SHORTEST."""
        t = self.time(batch.uniform("time")).clamp_min(flow_maps.SHORTEST)
        s = (t * (1 - max_gap * batch.uniform("end"))).clamp_min(flow_maps.SHORTEST)
        return t, torch.where(batch.uniform("diagonal") < diagonal, t, s)


def pull_share(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """[B]: w = lambda / (1 + lambda) in [0, 1], lambda = sigma_t / alpha_t - sigma_s / alpha_s for s <= t.

    As (sigma_t alpha_s - sigma_s alpha_t) / (alpha_t alpha_s + sigma_t alpha_s - sigma_s alpha_t), it is 0 at s = t
    and 1 at t = 1 > s."""
    alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    ahead = (sigma_t * alpha_s - sigma_s * alpha_t).clamp_min(0)
    return torch.where(s < t, ahead / (alpha_t * alpha_s + ahead).clamp_min(1e-12), 0.0)


def dropped(batch: Batch, share: float) -> Conditioning:
    """The batch's conditioning, with `batch.uncond` for a share of the samples."""
    rows = batch.uniform("drop") < share
    return Conditioning({k: torch.where(expand(rows, v), batch.uncond[k], v) for k, v in batch.cond.items()})


def norm(x: Tensor) -> Tensor:
    """[B]: the Euclidean norm of each sample."""
    return x.flatten(1).square().sum(1).sqrt()
