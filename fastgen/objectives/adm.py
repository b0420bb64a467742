"""ADM: Adversarial Distribution Matching (DMDX, arXiv 2507.18569).

    paper            here                 what it is
    G_theta          networks.student     few-step generator, initialised from the teacher, or by ADP (adp.py)
    F, real score    networks.teacher     frozen denoiser, guided
    F, fake score    networks.fake_score  denoiser of the student's own samples, trained online
    D_tau            discriminator        heads at several depths of the frozen teacher, called at level t - dt
    x_hat_0          rollout.x            the student's sample at a random stop of the backward simulation
    x^fake, x^real   x_fake, x_real       the results of one step of the probability-flow ODE, both from the same x_t
    dt               ode_step             T / 64

The algorithm, for every student update, in the paper's order:
    fake_updates times:
        x = rollout of the student, without gradient
        fake_score     <- denoising loss on x renoised to a random level
    once:
        x = rollout of the student, with gradient through the last executed step
        x_t = x renoised to a random level t
        x_fake = ODE step of the fake score from x_t to t - dt
        student        <- -mean D(x_fake), the gradient passing through D, its frozen backbone, the ODE step and x_t
    discriminator_updates times:
        x_t as above, without gradient
        x_fake, x_real = ODE steps of the fake score and of the guided teacher from x_t
        discriminator  <- mean max(0, 1 - D(x_real)) + mean max(0, 1 + D(x_fake))
    the average of the student's weights is updated once.

No score difference is computed; D has to learn it. For flow matching x_fake - x_real = dt (v_real - v_fake). Where the
two scores agree, the two steps agree to the bit for every dt, and D learns nothing more. Because both steps start from
the same x_t, the gradient of D and its noise shrink with dt by the same factor, and Adam is insensitive to that scale.
While |D| < 1 the hinge loss is linear; to first order in dt it is 2 - dt E[grad D . (v_fake - v_real)]. D then grows
until the corners of the hinge at +-1 turn it into a step function. `r1_weight` (ours; FastGen's approximate R1) bounds
D before that. At the optimum grad D is then proportional to the part of v_fake - v_real that is a gradient field,
which is DMD2's direction (derived).

The student's gradient is then (1 - t) (v_fake - v_real), which is about 1 - t times that of DMD2 (derived). Low noise
levels, at which each sample is drawn to its own mode, therefore outweigh high ones, which spread samples over all
modes. A `renoise_time` with a shift above 1 counteracts this. On the digits at four steps FD fell to 2.9 with it
(shift 5, two updates of D), and without it had risen to 5.5 (four updates of D); one seed each, with DMD2's heads.

Each of D's heads multiplies two linear maps of a feature (ours). D has to learn a difference of log-densities, which
is quadratic for Gaussians, and only the quadratic part shows how wide the student's modes are. With a SiLU between two
layers, as in DMD2's heads, D's gradient on the digits agreed less with DMD2's direction after 75 updates (cosine 0.43
instead of 0.55; one seed).

In bfloat16 the noise of D's gradient does not shrink with dt: rounding errors, 2^-8 of a value, are as large as the
difference. Raise ode_step there.

The mixture teacher is a formula and has no features. D then reads the features of the network that is fitted to it
(role `features`).
"""

from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.modules.expert_levels import draw_levels
from fastgen.modules.heads import StopHeads
from fastgen.networks import Networks, frozen
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn, feature_network
from fastgen.objectives.fake_score import denoising_loss, make_fake_score, stop_input
from fastgen.registry import MOST_STEPS, MOST_WIDTH
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation, draw_stops, transition
from fastgen.schedule import PredictionType, TimeSampler


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ADM(Objective):
    takes_chunks = True

    name: Literal["adm"] = "adm"
    # ours: SD3's stock scale; unguided teachers of text models fail. Several: one per expert, from high noise to low
    guidance_scale: Guidance = 7.0
    ode_step: float = Field(default=1 / 64, gt=0, lt=1)  # "T/64", the paper; nothing public pins it
    # 1, 4 and 8 are nearly equal after ADP (the paper; nothing public pins it)
    fake_updates: int = Field(default=4, ge=1, le=MOST_STEPS)
    # the fake updates of a student update share one rollout, where rollouts are what takes the time; ours
    share_rollout: bool = False
    # the paper: fake score, generator and D alternate
    discriminator_updates: int = Field(default=1, ge=1, le=MOST_STEPS)
    renoise_time: TimeSampler = TimeSampler(low=0.02, high=0.98)  # ours, as in DMD2
    fake_time: TimeSampler = TimeSampler(low=0.001, high=0.999)  # ours, as in DMD2
    fake_space: PredictionType | None = None  # the space of the fake score's loss; None: its own prediction type
    stops: Literal["shared", "per_sample"] = "shared"  # shared: one stop index per update
    condition_on_stop: bool = False  # ours: conditions the fake score and the heads on the stop, as in dmd2.py
    head_width: int = Field(default=64, ge=1, le=MOST_WIDTH)  # ours
    r1_weight: float = Field(default=0.0, ge=0)  # ours, see above; 0: the paper's loss
    # standard deviation in units of x_t, in a mean square without a half: FastGen's (row fastgen_r1)
    r1_noise: float = Field(default=0.1, gt=0)

    @model_validator(mode="after")
    def _level(self) -> "ADM":
        if self.ode_step >= self.renoise_time.low:
            raise ValueError(
                f"ode_step {self.ode_step:g} must be smaller than renoise_time.low {self.renoise_time.low:g}, so that "
                "every step ends above level 0; lower ode_step, or raise renoise_time.low"
            )
        return self

    @property
    def takes_first_timesteps(self) -> bool:
        return not self.condition_on_stop

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
            Turn("fake_score", ("fake_score",), self.fake_updates, one_rollout=self.share_rollout),
            Turn("student", ("student",)),
            Turn("discriminator", ("discriminator",), self.discriminator_updates),
        )

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        losses = {"fake_score": self.fake_loss, "student": self.student_loss, "discriminator": self.discriminator_loss}
        return losses[turn.name](networks, batch)

    def fake_loss(self, networks: Networks, batch: Batch) -> Loss:
        """The denoising loss on the student's samples."""
        rollout = self.rollout(networks, batch, grad=False)
        inputs = stop_input(rollout.stop, self.condition_on_stop)
        loss = denoising_loss(networks, batch, rollout.x, self.fake_time, self.fake_space, inputs)
        return Loss(loss, {"loss": loss.detach()})

    def student_loss(self, networks: Networks, batch: Batch) -> Loss:
        """-mean D(x_fake), the generator's side of the hinge loss."""
        rollout = self.rollout(networks, batch, grad=True)
        x_t, t = self.renoised(networks, batch, rollout)
        with frozen(networks.fake_score, networks["discriminator"], networks.critic):
            fake = networks.fake_score(x_t, t, batch.cond, stop_input(rollout.stop, self.condition_on_stop))
            x_fake = self.take_ode_step(networks, fake, x_t, t)
            loss = signals.hinge_generator_loss(self.logits(networks, batch, x_fake, t, rollout.stop))
        return Loss(loss, {"loss": loss.detach()})

    def discriminator_loss(self, networks: Networks, batch: Batch) -> Loss:
        """The hinge loss between the teacher's step and the fake score's step from the same x_t.

        Also logged: how far D tells the two apart (logit_gap), the size of D (logit_size), and the mean distance
        between the two steps divided by ode_step (step_gap; for flow matching, the distance of the velocities)."""
        with torch.no_grad():
            rollout = self.rollout(networks, batch, grad=False)
            x_t, t = self.renoised(networks, batch, rollout)
            fake = networks.fake_score(x_t, t, batch.cond, stop_input(rollout.stop, self.condition_on_stop))
            scale = networks.teacher.per_expert(self.guidance_scale, t)
            real = signals.guided(networks.teacher, x_t, t, batch.cond, batch.uncond, scale)
            x_fake = self.take_ode_step(networks, fake, x_t, t)
            x_real = self.take_ode_step(networks, real, x_t, t)
        fake_logits = self.logits(networks, batch, x_fake, t, rollout.stop)
        real_logits = self.logits(networks, batch, x_real, t, rollout.stop)
        total = signals.hinge_discriminator_loss(real_logits, fake_logits)
        terms = {
            "loss": total.detach(),
            "logit_gap": (real_logits - fake_logits).mean().detach(),
            "logit_size": real_logits.abs().mean().detach(),
            "step_gap": (x_fake - x_real).abs().mean() / self.ode_step,
        }
        terms |= signals.lag_terms(rollout.x, fake, real)
        if self.r1_weight:
            perturbed = x_real + self.r1_noise * batch.normal("r1")
            penalty = (self.logits(networks, batch, perturbed, t, rollout.stop) - real_logits).square().mean()
            total = total + self.r1_weight * penalty
            terms["r1"] = penalty.detach()
        return Loss(total, terms)

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        stop = draw_stops(batch, networks.policy.num_steps, shared=self.stops == "shared")
        return backward_simulation(networks.student, networks.policy, batch, stop, grad)

    def renoised(self, networks: Networks, batch: Batch, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """x_t [B, ...], which carries the rollout's gradient, and t [B]. D needs one expert at the level t - dt."""
        t = draw_levels(batch, "renoise_time", self.renoise_time, networks.critic, offset=self.ode_step)
        return networks.teacher.schedule.add_noise(rollout.x, batch.normal("renoise"), t), t

    def take_ode_step(self, networks: Networks, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_{t - dt} by one step of the ODE (the paper's Phi) whose clean prediction at x_t is x0.

        For flow matching it is x_t - dt v."""
        return transition(networks.teacher.schedule, x0, x_t, t, t - self.ode_step, None)

    def logits(self, networks: Networks, batch: Batch, x: Tensor, t: Tensor, stop: Tensor) -> Tensor:
        """D(x) [B, depths] at x, which is at level t - dt. The frozen backbone is called at that level."""
        with networks.critic.capture() as features:
            networks.critic(x, t - self.ode_step, batch.cond)
        return networks["discriminator"](features, stop)
