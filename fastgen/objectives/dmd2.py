"""DMD2: Improved Distribution Matching Distillation (Yin et al., arXiv 2405.14867).

    paper          here                 what it is
    G_theta        networks.student     few-step generator, initialised from the teacher
    mu_real        networks.teacher     frozen denoiser, guided
    mu_fake        networks.fake_score  denoiser of the student's own samples, trained online
    D              discriminator        small heads on the fake score's features (optional)
    x              rollout.x            the student's sample at a random stop of the backward simulation

The algorithm, for every student update:
    fake_updates times (two time-scale rule, Sec. 4.2):
        x = rollout of the student, without gradient
        fake_score  <- denoising loss on x renoised to a random level
        D           <- GAN loss of real images against x, both renoised (Sec. 4.3; only with gan_weight > 0)
    once:
        x = rollout of the student, with gradient through the last executed step (Sec. 4.4)
        student     <- surrogate of g = (mu_fake - mu_real^w) / mean|x - mu_real^w| at x renoised   (+ GAN loss)
    the average of the student's weights is updated once.

A single fake score that is shared by all stops of the rollout only knows the mixture of their outputs. The samples of
all steps are then matched to the teacher *together*, not each step on its own. With `condition_on_stop` (our
extension) the fake score is conditioned on the stop index, and the output of every step is matched to the teacher by
itself.

Three options take a few lines each, and are off by default:
    ca_time    Decoupled DMD (arXiv 2511.22677). Guidance is taken out of the score difference and becomes a separate
               term. That term has its own renoising, to a level t' below the level t_k of the executed step:
                   g = lambda_DM (mu_fake - mu_real)(x_t) / n  -  (w - 1) (mu_real - mu_uncond)(x_t') / n'
    ida_decay  Implicit distribution alignment (SenseFlow, arXiv 2506.00523). After each student update
                   fake_score <- lambda fake_score + (1 - lambda) student
    embedding  Embedding Loss (arXiv 2604.22379). The student's loss gets weight * MMD(x, real data), see embedding.py
Variants that weight samples, keep a state or use the two predictions otherwise are separate objectives built from the
methods here: f_distill, re_dmd, sc_dmd, disback, sid, sim, vdot.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch, Conditioning
from fastgen.modules.expert_levels import draw_levels
from fastgen.modules.heads import TokenHeads
from fastgen.modules.inputs import unextended
from fastgen.networks import Networks, blend, frozen
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.objectives.embedding import Embedding, check_batch, with_embedding
from fastgen.objectives.fake_score import denoising_loss, make_fake_score, stop_input
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation, draw_stops, next_levels, step_from_data
from fastgen.schedule import PredictionType, TimeSampler, expand


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class DMD2(Objective):
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ({}, {"gan_weight": 5e-3})
    page = "docs/dmd2_family.md"
    takes_inputs = True
    takes_chunks = True

    name: Literal["dmd2"] = "dmd2"
    # w of uncond + w (cond - uncond): 1.75 SD1.5, 8 SDXL (released configs; rows dmd2_*), 4 Self-Forcing, 4.5 CausVid
    # (3 and 3.5 there, of cond + w (cond - uncond)); 1 is off. Several: one per expert, from high noise to low
    guidance_scale: Guidance = 1.0
    guidance_interval: Annotated[tuple[float, float], Field()] = (0.0, 1.0)  # guidance where low < t <= high; ours
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)  # ours; 0 is off
    # "5 fake updates per generator update", Sec. 4.2; FastGen's student_update_freq of 5 is 4. A count: no row
    fake_updates: int = Field(default=5, ge=1, le=MOST_STEPS)
    # the fake updates of a student update share one rollout, where rollouts are what takes the time; ours
    share_rollout: bool = False
    # U{20..980} and U{0..999} of 1000, where step i is level (i + 1) / 1000: the released code (rows
    # dmd2_distribution_matching, dmd2_fake_score). Videos: {shift: 5, ends: clamp} (row self_forcing_levels)
    renoise_time: TimeSampler = TimeSampler(low=0.02, high=0.98)
    fake_time: TimeSampler = TimeSampler(low=0.001, high=0.999)
    fake_space: PredictionType | None = None  # the space of the fake score's loss; None: its own prediction type
    # where renoise_time and fake_time lie after a step from t_k to t_{k+1}. all: the whole law; above: not below
    # t_{k+1} (Self-Forcing's ts_schedule); step: between t_{k+1} and t_k (its ts_schedule_max, too)
    renoise_range: Literal["all", "above", "step"] = "all"
    stops: Literal["shared", "per_sample"] = "shared"  # shared: one stop index per update, the released code
    # simulated: what the student's own steps lead to; data: noised real samples (DMD2 of FastGen, CausVid)
    student_input: Literal["simulated", "data"] = "simulated"
    condition_on_stop: bool = False  # ours, see above
    # of mean|x - real|, in normalised latents; FastGen adds it to the mean (row f_distill_generator), DMD2 has none
    normaliser_floor: float = Field(default=1e-6, gt=0)
    # lambda_G, of a mean softplus against half a mean square over all elements: 5e-3 SDXL, 3e-3 ImageNet (released
    # configs; rows dmd2_generator_*); 0: data-free
    gan_weight: float = Field(default=0.0, ge=0)
    # lambda_D, of the sum of two mean softplus against a mean squared error without a half, of the fake score's own
    # prediction type (epsilon there): the released configs. Rows dmd2_discriminator and dmd2_fake_score pin the parts
    discriminator_weight: float = Field(default=0.01, gt=0)
    gan_time: TimeSampler = TimeSampler(low=0.001, high=0.999)  # "diffusion GAN", U{0..999} (row dmd2_discriminator)
    # Decoupled DMD: the levels of the guidance term of a step from t_k, between low and high * t_k. {} is the paper's
    # hybrid. CDM's code has {ends: clamp}, and its guidance 7 is guidance_scale 8 here (row decoupled_dmd_generator)
    ca_time: TimeSampler | None = None
    dm_weight: float = Field(default=1.0, ge=0)  # lambda_DM, with ca_time; lambda_CA is guidance_scale - 1
    ida_decay: float | None = Field(default=None, ge=0, lt=1)  # lambda; 0.97 in LightX2V's code (row senseflow_ida)
    embedding: Embedding | None = None

    @field_validator("guidance_interval")
    @classmethod
    def _interval(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError(f"guidance_interval must be [low, high] with 0 <= low < high <= 1, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _decoupled(self) -> "DMD2":
        if self.ca_time is None:
            if self.dm_weight != 1:
                raise ValueError(
                    "dm_weight weights the score difference against the guidance term of ca_time: give ca_time too"
                )
            return self
        scales = self.guidance_scale if isinstance(self.guidance_scale, tuple) else (self.guidance_scale,)
        if all(scale == 1 for scale in scales):
            raise ValueError("ca_time renoises the guidance term, and guidance_scale 1 has none: raise guidance_scale")
        if self.guidance_interval != (0, 1) or self.guidance_rescale:
            raise ValueError(
                "with ca_time the guidance term has its own noise levels and is not part of the teacher's "
                "prediction: leave out guidance_interval and guidance_rescale"
            )
        return self

    def check(self, policy: RolloutPolicy) -> None:
        self.check_input(policy)
        self.check_range(policy)
        time, last = self.ca_time, policy.timesteps[-1]
        if time is not None and time.high * last <= time.low:
            raise ValueError(
                f"ca_time leaves no noise level below that of the last step: low = {time.low} must be below "
                f"high * {last} = {time.high * last:g}"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        check_batch(self.embedding, recipe)

    def check_input(self, policy: RolloutPolicy) -> None:
        """Raises ValueError where noised data cannot be the student's input."""
        if self.student_input == "simulated":
            return
        if policy.chunks is not None:
            raise ValueError(
                "student_input: data takes one step of a whole video from its noised data, and a student with "
                "rollout.chunks is trained on chunks that it made itself; use student_input: simulated"
            )
        if policy.timesteps == (1.0,):
            raise ValueError(
                "student_input: data has no data in it for a one-step student, whose input at level 1 is noise; leave "
                "student_input out"
            )

    def check_range(self, policy: RolloutPolicy) -> None:
        """Raises ValueError where renoise_range leaves no level for the samples of a step."""
        if self.renoise_range == "all":
            return
        if policy.num_steps == 1:
            raise ValueError(
                f"renoise_range: {self.renoise_range} tells the steps of a student apart, and this one has one step; "
                "leave renoise_range out"
            )
        for name, time in (("renoise_time", self.renoise_time), ("fake_time", self.fake_time)):
            for t, end in zip(policy.timesteps, (*policy.timesteps[1:], 0.0), strict=True):
                top = t if self.renoise_range == "step" else 1.0
                if end >= time.high or top <= time.low:
                    raise ValueError(
                        f"renoise_range: {self.renoise_range} leaves no level to the step from {t:g} to {end:g}: "
                        f"{name} goes from {time.low:g} to {time.high:g}; widen {name}, or change rollout.timesteps"
                    )

    @property
    def takes_inner(self) -> bool:  # type: ignore[override]
        # the student is called by rollouts alone, and none of its weights are blended with a network's that lacks some
        return self.student_input == "simulated" and self.ida_decay is None

    @property
    def takes_first_timesteps(self) -> bool:
        # which speak of one list for all frames
        return not (self.condition_on_stop or self.ca_time or self.renoise_range != "all")

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "fake_score", "discriminator") if self.gan_weight else ("student", "fake_score")

    @property
    def full_roles(self) -> tuple[str, ...]:
        return ("discriminator",) if self.ida_decay is None else ("discriminator", "student", "fake_score")

    @property
    def needs(self) -> frozenset[str]:
        takes_data = self.gan_weight or self.student_input == "data" or self.embedding
        return frozenset({"latents"}) if takes_data else frozenset()

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        fake_score = make_fake_score(backbone, policy, self.condition_on_stop)
        modules: dict[str, nn.Module] = {"fake_score": fake_score}
        if self.gan_weight:
            modules["discriminator"] = TokenHeads(fake_score.feature_dim, len(fake_score.feature_modules))
        return modules | (self.embedding.networks_needed(backbone) if self.embedding else {})

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        roles = self.trained_roles[1:]
        fake_turn = Turn("fake_score", roles, self.fake_updates, one_rollout=self.share_rollout)
        return (fake_turn, Turn("student", ("student",)))

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        return self.student_loss(networks, batch) if turn.name == "student" else self.fake_loss(networks, batch)

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        if "student" in turn.roles and self.ida_decay is not None:
            blend(unextended(networks.fake_score), unextended(networks.student), self.ida_decay)

    def student_loss(self, networks: Networks, batch: Batch) -> Loss:
        return self.matching_loss(networks, batch, self.rollout(networks, batch, grad=True))

    def matching_loss(self, networks: Networks, batch: Batch, rollout: Rollout, weight: Tensor | None = None) -> Loss:
        """The surrogate of the score difference, plus the generator's side of the GAN and the embedding loss.

        weight: the factor of each sample's g, [B], or of each element's, a tensor that broadcasts over g; None: 1."""
        grad, terms = self.score_gradient(networks, batch, rollout)
        grad = grad if weight is None else expand(weight, grad) * grad
        total = signals.surrogate(rollout.x, grad)
        terms |= {"dm_grad": grad.abs().mean()}
        if self.gan_weight:
            gan = self.generator_gan(networks, batch, rollout)
            total = total + self.gan_weight * gan
            terms["gan"] = gan.detach()
        return with_embedding(self.embedding, networks, batch, rollout.x, total, terms)

    def generator_gan(self, networks: Networks, batch: Batch, rollout: Rollout) -> Tensor:
        """The generator's side of the GAN, a scalar. Gradient flows to the samples alone."""
        with frozen(networks.fake_score, networks["discriminator"]):
            return signals.gan_generator_loss(self.logits(networks, batch, rollout.x, rollout.stop, "gan"))

    def fake_loss(self, networks: Networks, batch: Batch) -> Loss:
        """The denoising loss on the student's samples, plus the discriminator's side of the GAN."""
        return self.critic_loss(networks, batch, self.rollout(networks, batch, grad=False))

    def critic_loss(self, networks: Networks, batch: Batch, rollout: Rollout) -> Loss:
        """`fake_loss` at these samples."""
        denoising = self.fake_denoising(networks, batch, rollout)
        terms = {"loss": denoising.detach()}
        if not self.gan_weight:
            return Loss(denoising, terms)
        gan, gan_terms = self.discriminator_gan(networks, batch, rollout)
        return Loss(denoising + self.discriminator_weight * gan, terms | gan_terms)

    def discriminator_gan(
        self, networks: Networks, batch: Batch, rollout: Rollout
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's side of the GAN, a scalar, and its terms to log."""
        assert batch.latents is not None
        fake_logits = self.logits(networks, batch, rollout.x, rollout.stop, "gan_fake")
        real_logits = self.logits(networks, batch, batch.latents, rollout.stop, "gan_real")
        gan = signals.gan_discriminator_loss(real_logits, fake_logits)
        return gan, {"gan": gan.detach(), "logit_gap": (real_logits - fake_logits).mean().detach()}

    def fake_denoising(self, networks: Networks, batch: Batch, rollout: Rollout) -> Tensor:
        """The denoising loss of the fake score on the student's samples."""
        inputs = stop_input(rollout.stop, self.condition_on_stop)
        within = self.level_range(networks.policy, rollout)
        return denoising_loss(networks, batch, rollout.x, self.fake_time, self.fake_space, inputs, within)

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        stop = draw_stops(batch, networks.policy.num_steps, shared=self.stops == "shared")
        simulate = backward_simulation if self.student_input == "simulated" else step_from_data
        return simulate(networks.student, networks.policy, batch, stop, grad)

    @torch.no_grad()
    def score_gradient(self, networks: Networks, batch: Batch, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """g [B, ...] at the student's samples, and the terms of the fake score's lag (`signals.lag_terms`)."""
        x_t, t = self.renoised(networks, batch, rollout)
        fake = self.fake_prediction(networks, batch, rollout.stop, x_t, t)
        real = self.real_prediction(networks, batch, x_t, t)
        grad = self.field(rollout.x, fake, real)
        if self.ca_time is not None:
            grad = self.dm_weight * grad + self.guidance_gradient(networks, batch, rollout, self.ca_time)
        return grad, signals.lag_terms(rollout.x, fake, real)

    def fake_prediction(self, networks: Networks, batch: Batch, stop: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """mu_fake at x_t, [B, ...]."""
        return networks.fake_score(x_t, t, batch.cond, stop_input(stop, self.condition_on_stop))

    def real_prediction(self, networks: Networks, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
        """mu_real^w at x_t, [B, ...]; with ca_time, mu_real."""
        scale = self.guidance_scale if self.ca_time is None else 1.0
        return signals.guided(
            networks.teacher,
            x_t,
            t,
            batch.cond,
            batch.uncond,
            networks.teacher.per_expert(scale, t),
            self.guidance_interval,
            self.guidance_rescale,
        )

    def field(self, x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
        """g [B, ...] at the samples x, from the two predictions."""
        return signals.score_difference(x, fake, real, self.normaliser_floor)

    def guidance_gradient(self, networks: Networks, batch: Batch, rollout: Rollout, time: TimeSampler) -> Tensor:
        """-(w - 1) (mu_real - mu_uncond) / mean|x - mu_real| [B, ...], at x renoised with separate draws.

        time: the law of t', between time.low and time.high * t_k (stretch), or times t_k and then clamped (clamp).
        The normaliser uses the unguided teacher (byliutao/cdm's code)."""
        teacher = networks.teacher
        top = rollout.steps[-1].t
        t = draw_levels(batch, "ca_time", lambda u: time.ended(time.shifted(u), top), teacher)
        x_t = teacher.schedule.add_noise(rollout.x, batch.normal("ca_noise"), t)
        both = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), Conditioning.cat([batch.cond, batch.uncond]))
        real, uncond = both.chunk(2)
        w = teacher.per_expert(self.guidance_scale, t)
        if isinstance(w, Tensor):
            w = expand(w, real)
        augmentation = (w - 1) * (real - uncond)
        return signals.score_difference(rollout.x, real - augmentation, real, self.normaliser_floor)

    def renoised(self, networks: Networks, batch: Batch, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """x_t [B, ...] and t [B], at which the two scores are compared."""
        law = partial(self.renoise_time, within=self.level_range(networks.policy, rollout))
        t = draw_levels(batch, "renoise_time", law, networks.teacher)
        return networks.teacher.schedule.add_noise(rollout.x, batch.normal("renoise"), t), t

    def level_range(self, policy: RolloutPolicy, rollout: Rollout) -> tuple[Tensor, Tensor] | None:
        """The levels ([B], [B]) between which the samples of this rollout are renoised, by `renoise_range`."""
        if self.renoise_range == "all":
            return None
        t = rollout.steps[-1].t
        return next_levels(policy, rollout.stop, t), t if self.renoise_range == "step" else torch.ones_like(t)

    def logits(self, networks: Networks, batch: Batch, x0: Tensor, stop: Tensor, name: str) -> Tensor:
        """D [B, depths] at x0 renoised with the draws of this name."""
        t = draw_levels(batch, f"{name}_time", self.gan_time, networks.fake_score)
        x_t = networks.teacher.schedule.add_noise(x0, batch.normal(f"{name}_noise"), t)
        return self.discriminator_logits(networks, batch, x_t, t, stop)

    def discriminator_logits(self, networks: Networks, batch: Batch, x_t: Tensor, t: Tensor, stop: Tensor) -> Tensor:
        """D(x_t, t) [B, depths], from the features of the fake score."""
        with networks.fake_score.capture() as features:
            networks.fake_score(x_t, t, batch.cond, stop_input(stop, self.condition_on_stop))
        return networks["discriminator"](features)
