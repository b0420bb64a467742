"""sCM: continuous-time consistency models (arXiv 2410.11081), with flow-matching networks as they are.

    paper            here                        what it is
    x_t, t           x, angle                    TrigFlow: cos a x0 + sin a sigma_d z, with an angle a from 0 to pi / 2
    sigma_d F        trig_velocity(...)          dx/da of a flow network, converted without training (SANA-Sprint)
    f_theta          networks.student            cos a x - sin a sigma_d F, its clean prediction
    dx_t/dt          dx_da                       the guided teacher's dx/da, or cos a sigma_d z - sin a x0 from data
    g                g                           cos a df/da; the derivative is one JVP without gradient
    r, c             turn.trust, normaliser      tangent warm-up; tangent normalisation g / (|g| + c)
    w_phi(t)         networks["weighting"]       learned log-weight of a level
    omega            scale                       guidance scale, drawn for each sample; also an input of the student,
                                                 with rollout.embedded_guidance

The algorithm, for every student update:
    x at a random angle, from data and noise; or x along the teacher's own trajectory from noise (source: trajectory)
    g = -cos^2 a (sigma_d F^- - dx/da) - r cos a sin a (x + sigma_d dF/da),   then g / (|g| + c)
    student, weighting <- e^w / (sigma_d tan a) 1/D |F(x, a) - sg(F^- + g)|^2 - w
    the average of the student's weights is updated once.

SANA-Sprint (arXiv 2503.09641): flow-matching networks in TrigFlow. They are called at the flow-matching level and
    state. `gan`, its adversarial term, is LADD: heads on the frozen teacher's features learn to tell the student's
    clean predictions from data.
TBCM (hustvl/TBCM): source: trajectory, which needs no images. The teacher's guided ODE runs from noise. One level is
    drawn in each of `trajectory_steps` intervals (in its code, uniformly in the angle), and the states at all of them
    form one batch. The rows of one path are correlated, so use a small train.batch_size.
rCM (arXiv 2510.08431): `matching` adds DMD2 on the student's own samples (`rcm`), from the end of the tangent warm-up
    on.

The exact F has g = 0 only at r = 1.

Units. A weight between two terms is a number for losses of one unit, and the square above has three: |g| may be the
vector norm or a root mean square, squares may be means or sums, and the scale of the latents enters c and the laws.
    tangent_norm l2, reduction mean   sCM, SANA-Sprint, diffusers: the defaults, so that the weights of their papers
        can be written as they are. g has norm 1 whatever the number of elements D. With learned weights, the optimum
        of w makes the gradient of a sample's F 2 g, of norm 2: SANA-Sprint's gan.weight 0.5 stands beside it.
    tangent_norm rms   FastGen. g has norm sqrt(D), so c does not depend on D; the gradient's norm is 2 / sqrt(D).
    reduction sum   rCM, with l2. Both squares are then summed: the ratio of the terms stays, and the gradients do not
        shrink to the size of an optimizer's eps, which they do without learned weights.
    matching_weight weighs |x - sg(x - grad)|^2 against |F - sg(F^- + g)|^2, both without a factor 1/2, as in rCM.
        With l2 its gradients are lambda sqrt(D) to 1. DMD2's own loss has the half, which is taken out here.
    sigma_data 0.5   sCM and SANA-Sprint scale their latents to this standard deviation, and state c and their laws of
        levels for it. Latents are not scaled here: c is doubled, and the laws carry sigma_data: 0.5.
        1 / (sigma_d tan a) only shifts the learned w.
Rows sana_ratio and rcm_ratio compare the gradients of the terms at two values of D with those of the authors' code.

Departures. The network is the teacher's own, without sCM's embedding and normalisation. It receives the level in the
teacher's unit, whose embedding may oscillate too fast for the derivative. (SANA-Sprint first fine-tunes its teacher to
take t instead of 1000 t.) Here `warmup` and derivative: difference are the remedies.
"""

import itertools
import math
from dataclasses import dataclass as plain_dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import NO_INPUTS, Denoiser, Inputs
from fastgen.flow import flow_maps
from fastgen.flow.flow_maps import Velocity, guided_velocity
from fastgen.flow.tangents import Backend, tangent
from fastgen.flow.time_pairs import ScaleRange, between, check_told, drawn_scale, shifted
from fastgen.modules.heads import LevelWeight
from fastgen.networks import Networks
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.objectives.ladd import Ladd
from fastgen.objectives.rcm import Matching
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS, MOST_UPDATES
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler, expand, flow_to_trig, flow_to_trig_velocity, trig_angle, trig_to_flow


@plain_dataclass(frozen=True)
class TrustTurn(Turn):
    """trust: the factor r of the derivative in g, 1 after the warm-up."""

    trust: float = 1.0


@plain_dataclass(frozen=True)
class States:
    """States x [N, ...] on the flow path at level t [N], the velocity there, and the conditioning and inputs of the
    student."""

    x: Tensor
    t: Tensor
    velocity: Tensor
    cond: Conditioning
    inputs: Inputs


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class SCM(Objective):
    examples = ({}, {"source": "trajectory"}, {"gan": {"weight": 0.5}}, {"matching": {}})
    page = "docs/flow_maps.md"
    takes_inputs = True
    takes_derivatives = True

    name: Literal["scm"] = "scm"
    teach: Literal["teacher", "data"] = "teacher"
    source: Literal["data", "trajectory"] = "data"
    # standard deviation of the latents, as the backbone gives them. (sCM and SANA-Sprint scale theirs to 0.5.)
    sigma_data: float = Field(default=1.0, gt=0)
    # log sigma ~ N(-1, 1.4^2) sCM, (0.2, 1.6) SANA-Sprint, for sigma_data 0.5; (0.7, 1.6) rCM, for 1. Row sana_levels
    time: TimeSampler = TimeSampler("logit_normal", 0.0, 1.0, mean=-1.0, std=1.4, sigma_data=0.5)
    # updates; "10k" sCM, 4000 SANA-Sprint, 1000 rCM; 0 uses the whole derivative from the start
    warmup: int = Field(default=10_000, ge=0, le=MOST_UPDATES)
    # what r multiplies: all of the derivative, or in rCM's code not dF/da (`flow_maps.trig_tangent`). Row rcm_tangent
    warmup_form: Literal["scm", "rcm"] = "scm"
    tangent_norm: Literal["l2", "rms"] = "l2"
    # "c = 0.1", sCM and SANA-Sprint, for latents of std 0.5 (rows sana_scm, fastgen_scm); rCM: 0.1 for std 1
    normaliser: float = Field(default=0.2, gt=0)
    reduction: Literal["mean", "sum"] = "mean"  # of both squares over a sample's elements; sum: rCM's code
    learned_weight: bool = True  # "adaptive weighting", sCM and SANA-Sprint; rCM: false
    derivative: Backend = "jvp"
    # of the angle; AnyFlow's number, which is one of t. Longer steps smooth what time embeddings add to dF/da
    difference_step: float = Field(default=5e-3, gt=0)
    guidance_scale: Guidance = 1.0
    # in diffusers' convention: [1, 2] sCM; SANA-Sprint draws 4, 4.5 or 5 (row sana_scm has 4.5), here [4, 5]
    guidance_range: ScaleRange | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # as in DMD2
    # intervals; TBCM's code has 16 levels. No row pins it, nor the shift
    trajectory_steps: int = Field(default=15, ge=2, le=MOST_STEPS)
    trajectory_shift: float = Field(default=2.5, gt=0)  # TBCM's code, of flow levels
    gan: Ladd | None = None  # SANA-Sprint: weight 0.5, with tangent_norm l2 and learned weights
    # "p = 0.5": share of D's samples that are made from a = pi / 2. Rows sana_adversarial, sana_discriminator
    max_time: float = Field(default=0.5, ge=0, le=1)
    matching: Matching | None = None  # rCM; guidance_scale and most other keys in it are those of dmd2
    # "lambda = 0.01", with tangent_norm l2: 1 / 100 in the code, of sums without 1/2. Row rcm_ratio
    matching_weight: float = Field(default=0.01, gt=0)

    @model_validator(mode="after")
    def _possible(self) -> "SCM":
        if self.teach == "data" and (self.source, self.guidance_scale, self.guidance_range) != ("data", 1.0, None):
            raise ValueError(
                "teach: data does not call the teacher: leave out source, guidance_scale and guidance_range"
            )
        if self.matching is not None and self.matching.gan_weight:
            raise ValueError(
                "matching.gan_weight must be 0: scm has its own adversarial term, gan, on the teacher's features"
            )
        return self

    @property
    def learned_levels(self) -> None:
        """All."""

    @property
    def trained_roles(self) -> tuple[str, ...]:
        optional = {"weighting": self.learned_weight, "discriminator": self.gan, "fake_score": self.matching}
        return ("student", *(role for role, used in optional.items() if used))

    @property
    def full_roles(self) -> tuple[str, ...]:
        return ("weighting", "discriminator", *(self.matching.full_roles if self.matching else ()))

    @property
    def needs(self) -> frozenset[str]:
        own = frozenset({"latents"}) if self.source == "data" or self.gan else frozenset[str]()
        return own | self.matching.needs if self.matching else own

    def check(self, policy: RolloutPolicy) -> None:
        if policy.two_time:
            raise ValueError(
                "a consistency model is not conditioned on the level where its step ends; remove rollout.two_time"
            )
        if policy.num_steps > 1 and policy.transition != "renoise":
            raise ValueError(
                f"a consistency model only learns steps to 0, and transition: {policy.transition} steps to other "
                "levels; use renoise"
            )
        check_told(policy, self.guidance_range)
        if self.matching is not None:
            self.matching.check(policy)

    def check_recipe(self, recipe: Recipe) -> None:
        flow_maps.check_backbone(recipe.backbone)
        if self.gan:
            self.gan.check_batch(recipe)
        if self.matching:
            self.matching.check_recipe(recipe)

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"weighting": LevelWeight()} if self.learned_weight else {}
        if self.matching is not None:
            modules |= self.matching.auxiliary(backbone, policy)
        if self.gan is not None:
            modules |= self.gan.networks(backbone)
        return modules

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        trust = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        roles = ("student", "weighting") if self.learned_weight else ("student",)
        turns: list[Turn] = []
        if self.matching is not None and trust == 1:
            shared = self.matching.share_rollout
            turns.append(Turn("fake_score", ("fake_score",), self.matching.fake_updates, one_rollout=shared))
        if self.gan is not None:
            turns.append(Turn("discriminator", ("discriminator",)))
        turns.append(TrustTurn("student", roles, trust=trust))
        return tuple(turns)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        if turn.name == "fake_score":
            assert self.matching is not None
            return self.matching.fake_loss(networks, batch)
        if turn.name == "discriminator":
            assert self.gan is not None and batch.latents is not None
            with torch.no_grad():
                fake = self.generated(networks, batch)
            return self.gan.discriminator_loss(networks, batch, fake, batch.latents)
        assert isinstance(turn, TrustTurn)
        states = self.trajectory(networks, batch) if self.source == "trajectory" else self.noised(networks, batch)
        total, terms = self.consistency_loss(networks, states, turn.trust)
        if self.gan is not None:
            gan = self.gan.student_loss(networks, batch, self.generated(networks, batch))
            total = total + self.gan.weight * gan
            terms["gan"] = gan.detach()
        if self.matching is not None and turn.trust == 1:
            matching = self.matching.student_loss(networks, batch)
            factor = 2 * self.elements(states.x)  # DMD2's loss is half a mean of squares
            total = total + self.matching_weight * factor * matching.total
            terms |= {name: value for name, value in matching.terms.items() if name != "loss"}
        return Loss(total, {"loss": total.detach()} | terms)

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        if self.matching is not None:
            self.matching.finish(turn, networks, state)

    # --- consistency

    def consistency_loss(self, networks: Networks, states: States, trust: float) -> tuple[Tensor, dict[str, Tensor]]:
        """sCM's loss at these states, a scalar with gradient to the student and the weighting, and the terms to log.

        trust: r, the factor of the derivative in g."""
        angle = trig_angle(states.t, self.sigma_data)
        x = flow_to_trig(states.x, angle, self.sigma_data)
        dx_da = flow_to_trig_velocity(states.velocity, x, angle, self.sigma_data)
        velocity = self.trig_velocity(networks.student, states.cond, states.inputs)
        differentiate = partial(tangent, backend=self.derivative, step=self.difference_step)
        rcm = self.warmup_form == "rcm"
        value, g = flow_maps.trig_tangent(velocity, x, angle, dx_da, trust, differentiate, whole_derivative=rcm)
        size = signals.per_sample_mean(g.square()).sqrt()
        if self.tangent_norm == "l2":
            size = size * g[0].numel() ** 0.5
        g = torch.nan_to_num(g / expand(size + self.normaliser, g), posinf=0.0, neginf=0.0)  # "skip NaN", per sample
        square = signals.per_sample_mean(((velocity(x, angle) - value) / self.sigma_data - g).square())
        square = square * self.elements(g)
        terms = {"tangent": size.nanmean(), "trust": size.new_tensor(trust)}
        if not self.learned_weight:
            return square.mean(), terms
        weight = networks["weighting"](angle / (math.pi / 2))
        prior = (torch.cos(angle) / (self.sigma_data * torch.sin(angle))).clamp_max(1 / flow_maps.SHORTEST)
        return (weight.exp() * prior * square - weight).mean(), terms

    def elements(self, x: Tensor) -> int:
        """The factor that turns a mean over the elements of x [B, ...] into what `reduction` says."""
        return x[0].numel() if self.reduction == "sum" else 1

    def trig_velocity(self, network: Denoiser, cond: Conditioning, inputs: Inputs) -> Velocity:
        """sigma_d F(x / sigma_d, a), which is dx/da of a flow-matching network, as a function of x [B, ...] and the
        angle [B]."""

        def velocity(x: Tensor, angle: Tensor) -> Tensor:
            x_flow, t = trig_to_flow(x, angle, self.sigma_data)
            flow_velocity = network(x_flow, t, cond, inputs, predict="flow_prediction")
            return flow_to_trig_velocity(flow_velocity, x, angle, self.sigma_data)

        return velocity

    def guidance(self, networks: Networks, batch: Batch) -> tuple[Guidance | Tensor, Inputs]:
        """The teacher's guidance scale, and the student's inputs, which hold the scale where it is embedded."""
        if self.guidance_range is None:
            return self.guidance_scale, NO_INPUTS
        scale = drawn_scale(batch, self.guidance_range)
        if networks.policy.embedded_guidance is None:
            return scale, NO_INPUTS
        return scale, Inputs(guidance=scale)

    def teacher_velocity(self, networks: Networks, batch: Batch, scale: Guidance | Tensor) -> Velocity:
        """The guided teacher's velocity, for this batch's prompts."""
        return guided_velocity(networks.teacher, batch.cond, batch.uncond, scale, self.guidance_interval)

    def noised(self, networks: Networks, batch: Batch) -> States:
        """The batch's data, noised to random levels."""
        assert batch.latents is not None
        t = self.time(batch.uniform("time")).clamp_min(flow_maps.SHORTEST)
        noise = batch.normal("noise")
        x = networks.student.schedule.add_noise(batch.latents, noise, t).to(noise.dtype)
        scale, inputs = self.guidance(networks, batch)
        if self.teach == "data":
            velocity = noise - batch.latents
        else:
            velocity = self.teacher_velocity(networks, batch, scale)(x, t)
        return States(x, t, velocity, batch.cond, inputs)

    @torch.no_grad()
    def trajectory(self, networks: Networks, batch: Batch) -> States:
        """States on the teacher's ODE from noise, one per interval of the grid, at a level drawn in the interval. The
        states of all samples are stacked: N is B * trajectory_steps.

        An Euler step of the flow state is the same as rotating the TrigFlow state along its dx/da, because both keep
        the pair (x0, noise)."""
        scale, inputs = self.guidance(networks, batch)
        grid = shifted(torch.linspace(0, 1, self.trajectory_steps + 1, dtype=torch.float64), self.trajectory_shift)
        levels = [
            between(low, high, batch.uniform(f"level{i}")).clamp_min(flow_maps.SHORTEST)
            for i, (low, high) in enumerate(itertools.pairwise(grid.tolist()))
        ]
        velocity = self.teacher_velocity(networks, batch, scale)
        path = flow_maps.euler_path(velocity, batch.normal("initial"), levels[::-1])
        x, t, v = (torch.cat(parts) for parts in zip(*path, strict=True))
        given: dict[str, Any] = {name: torch.cat([value] * len(path)) for name, value in inputs.given.items()}
        inputs = Inputs(**given)
        return States(x, t, v, Conditioning.cat([batch.cond] * len(path)), inputs)

    def generated(self, networks: Networks, batch: Batch) -> Tensor:
        """The student's clean predictions for D, from data at random levels. A share max_time of them is made from
        pure noise."""
        assert batch.latents is not None
        t = self.time(batch.uniform("time"))
        noise = batch.normal("noise")
        t = torch.where(batch.uniform("max_time") < self.max_time, torch.ones_like(t), t)
        x = networks.student.schedule.add_noise(batch.latents, noise, t).to(noise.dtype)
        _, inputs = self.guidance(networks, batch)
        return networks.student(x, t, batch.cond, inputs)
