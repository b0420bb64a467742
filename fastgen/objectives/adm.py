"""ADM: Adversarial Distribution Matching (DMDX, arXiv 2507.18569).

    paper            here                 what it is
    G_theta          networks.student     few-step generator, initialised from the teacher, or by ADP (adp.py)
    F, real score    networks.teacher     frozen denoiser, guided
    F, fake score    networks.fake_score  denoiser of the student's own samples, trained online
    D_tau            discriminator        heads at several depths of the frozen teacher, which is told the level t - dt
    x_hat_0          rollout.x            student sample, at a random stop of the backward simulation
    x^fake, x^real   x_fake, x_real       where one step of the probability-flow ODE takes the same x_t
    dt               ode_step             T / 64

The algorithm, for every student update, in the paper's order:
    fake_updates times:
        x = rollout of the student, no gradient
        fake_score     <- denoising loss on x renoised to a random level
    once:
        x = rollout of the student, gradient through the last executed step;  x_t = x renoised to a random level t
        x_fake = ODE step of the fake score from x_t to t - dt
        student        <- -mean D(x_fake), the gradient passing through D, its frozen backbone, the ODE step and x_t
    discriminator_updates times:
        x_t as above, no gradient;  x_fake, x_real = ODE steps of the fake score and of the guided teacher
        discriminator  <- mean max(0, 1 - D(x_real)) + mean max(0, 1 + D(x_fake))
    the average of the student's weights moves, once.

There is no score difference: D has to learn it. For flow matching x_fake - x_real = dt (v_real - v_fake): where the
two scores agree the steps agree to the bit, whatever dt is, and D learns nothing more. As both steps start from one
x_t, the gradient of D and its noise shrink alike with dt, and Adam does not see its size. While |D| < 1 the hinge is
linear, to first order in dt it is 2 - dt E[grad D . (v_fake - v_real)], and D grows until the corners at +-1 make a
step function of it. `r1_weight` (ours; FastGen's approximate R1) bounds D before that: the optimum then has grad D
proportional to the part of v_fake - v_real that is a gradient field, which is DMD2's direction (derived).

The student's gradient is then (1 - t) (v_fake - v_real), that of DMD2 times about 1 - t (derived): low noise, where
each sample looks after its own mode, outweighs high noise, which spreads samples over all of them. A `renoise_time`
with a shift above 1 works against it: on the digits at four steps FD fell to 2.9 (shift 5, two updates of D), and
without had risen to 5.5 (four updates of D); one seed each, with DMD2's heads.

D's heads multiply two linear maps of a feature (ours): what D has to learn, a difference of log-densities, is
quadratic for Gaussians, and that part alone says how wide the student's modes are. With a SiLU between two layers, as
in DMD2's heads, D's gradient on digits agreed less with DMD2's direction after 75 updates (cosine 0.43, not 0.55; one
seed).

In bfloat16 its noise does not shrink: rounding, 2^-8 of a value, is of the size of the difference; raise ode_step.

The mixture teacher is a formula without features; D then reads those of the network fitted to it (role `features`).
"""

from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.modules.heads import StopHeads
from fastgen.networks import Networks, frozen
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn, feature_network
from fastgen.objectives.fake_score import denoising_loss, make_fake_score, stop_input
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation, draw_stops, transition
from fastgen.schedule import PredictionType, TimeSampler


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ADM(Objective):
    name: Literal["adm"] = "adm"
    # ours: SD3's stock scale; with text models the unguided teacher fails. Several: one an expert, from high noise
    guidance_scale: Guidance = 7.0
    ode_step: float = Field(default=1 / 64, gt=0, lt=1)  # "T/64"
    fake_updates: int = Field(default=4, ge=1)  # 1, 4 and 8 are nearly equal after ADP
    discriminator_updates: int = Field(default=1, ge=1)  # fake, generator, D alternate
    renoise_time: TimeSampler = TimeSampler(low=0.02, high=0.98)  # ours, DMD2's
    fake_time: TimeSampler = TimeSampler(low=0.001, high=0.999)  # ours, DMD2's
    fake_space: PredictionType | None = None  # space of the fake score's loss; None: its own prediction type
    stops: Literal["shared", "per_sample"] = "shared"  # shared: one stop index an update
    condition_on_stop: bool = False  # ours: fake score and heads are told the stop, as in DMD2 here
    head_width: int = Field(default=64, ge=1)  # ours
    r1_weight: float = Field(default=0.0, ge=0)  # ours, see above; 0: the paper's loss
    r1_noise: float = Field(default=0.1, gt=0)  # FastGen's, in units of x_t

    @model_validator(mode="after")
    def _level(self) -> "ADM":
        if self.ode_step >= self.renoise_time.low:
            raise ValueError(
                f"ode_step {self.ode_step:g} leads from renoise_time.low {self.renoise_time.low:g} to below level 0; "
                "lower it, or raise renoise_time.low"
            )
        return self

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "fake_score", "discriminator")

    @property
    def full_roles(self) -> tuple[str, ...]:
        return ("discriminator",)

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        fake_score = make_fake_score(backbone, policy, self.condition_on_stop)
        stops = policy.num_steps if self.condition_on_stop else 1
        heads = StopHeads(fake_score.feature_dim, len(fake_score.feature_modules), self.head_width, stops)
        modules: dict[str, nn.Module] = {"fake_score": fake_score, "discriminator": heads}
        return modules | feature_network(backbone)

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (
            Turn("fake_score", ("fake_score",), self.fake_updates),
            Turn("student", ("student",)),
            Turn("discriminator", ("discriminator",), self.discriminator_updates),
        )

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        losses = {"fake_score": self.fake_loss, "student": self.student_loss, "discriminator": self.discriminator_loss}
        return losses[turn.name](networks, batch)

    def fake_loss(self, networks: Networks, batch: Batch) -> Loss:
        """Denoising of the student's samples."""
        rollout = self.rollout(networks, batch, grad=False)
        inputs = stop_input(rollout.stop, self.condition_on_stop)
        loss = denoising_loss(networks, batch, rollout.x, self.fake_time, self.fake_space, inputs)
        return Loss(loss, {"loss": loss.detach()})

    def student_loss(self, networks: Networks, batch: Batch) -> Loss:
        """-mean D(x_fake): the generator's side of the hinge."""
        rollout = self.rollout(networks, batch, grad=True)
        x_t, t = self.renoised(networks, batch, rollout)
        with frozen(networks.fake_score, networks["discriminator"], networks.critic):
            fake = networks.fake_score(x_t, t, batch.cond, stop_input(rollout.stop, self.condition_on_stop))
            x_fake = self.stepped(networks, fake, x_t, t)
            loss = signals.hinge_generator_loss(self.logits(networks, batch, x_fake, t, rollout.stop))
        return Loss(loss, {"loss": loss.detach()})

    def discriminator_loss(self, networks: Networks, batch: Batch) -> Loss:
        """The hinge between the teacher's step and the fake score's, from the same x_t. Logged beside it: how far D
        tells them apart, and how far apart the two velocities (x0 predictions, over the level) are."""
        with torch.no_grad():
            rollout = self.rollout(networks, batch, grad=False)
            x_t, t = self.renoised(networks, batch, rollout)
            fake = networks.fake_score(x_t, t, batch.cond, stop_input(rollout.stop, self.condition_on_stop))
            scale = networks.teacher.per_expert(self.guidance_scale, t)
            real = signals.guided(networks.teacher, x_t, t, batch.cond, batch.uncond, scale)
            x_fake, x_real = (self.stepped(networks, x0, x_t, t) for x0 in (fake, real))
        fake_logits, real_logits = (self.logits(networks, batch, x, t, rollout.stop) for x in (x_fake, x_real))
        total = signals.hinge_discriminator_loss(real_logits, fake_logits)
        terms = {
            "loss": total.detach(),
            "logit_gap": (real_logits - fake_logits).mean().detach(),
            "logit_size": real_logits.abs().mean().detach(),
            "step_gap": (x_fake - x_real).abs().mean() / self.ode_step,
            "fake_lag": signals.score_lag(rollout.x, fake, real),
        }
        if self.r1_weight:
            moved = x_real + self.r1_noise * batch.normal("r1")
            penalty = (self.logits(networks, batch, moved, t, rollout.stop) - real_logits).square().mean()
            total, terms["r1"] = total + self.r1_weight * penalty, penalty.detach()
        return Loss(total, terms)

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        stop = draw_stops(batch, networks.policy.num_steps, shared=self.stops == "shared")
        return backward_simulation(networks.student, networks.policy, batch, stop, grad)

    def renoised(self, networks: Networks, batch: Batch, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """x_t [B, ...], with the rollout's gradient, and t [B]."""
        t = self.renoise_time(batch.uniform("renoise_time"))
        return networks.teacher.schedule.add_noise(rollout.x, batch.normal("renoise"), t), t

    def stepped(self, networks: Networks, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Phi: x_{t - dt} by one step of the ODE whose clean prediction at x_t is x0; for flow matching x_t - dt v."""
        return transition(networks.teacher.schedule, x0, x_t, t, t - self.ode_step, None)

    def logits(self, networks: Networks, batch: Batch, x: Tensor, t: Tensor, stop: Tensor) -> Tensor:
        """D(x) [B, depths] of x at level t - dt, which the frozen backbone is told."""
        backbone = networks.critic
        with backbone.capture() as features:
            backbone(x, t - self.ode_step, batch.cond)
        return networks["discriminator"](features, stop)
