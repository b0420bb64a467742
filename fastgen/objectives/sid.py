"""SiD: Score identity Distillation (Zhou et al., arXiv 2404.04057), with its guidance (SiD-LSG, 2406.01561), its
adversarial term (SiDA, 2410.14919) and its few-step form (2505.12674).

    paper          here                 what it is
    G_theta        networks.student     few-step generator, initialised from the teacher
    f_phi, x_real  networks.teacher     frozen denoiser mu_real, guided with kappa_4
    f_psi, x_fake  networks.fake_score  denoiser mu_fake of the student's own samples, trained online
    x_g            rollout.x            the student's sample at a random stop of the backward simulation
    x_t            x_t                  the sample renoised to a random level, with its gradient
    omega          sample_weight        1 / mean|x - mu_real|, without gradient
    D              logits               SiDA's: the mean over channels of the fake score's middle features, per token

The algorithm, for every student update:
    fake_updates times (1 in the papers):
        fake_score <- denoising loss on x renoised, of its prediction guided with kappa_1
                      (SiDA: + discriminator_weight * [softplus D(x_t) + softplus -D(real_t)])
    once:
        delta = mu_real - mu_fake^{kappa_2}, both at x_t
        student <- omega * mean delta . [(mu_real - x) - alpha delta]   (SiDA: + gan_weight * omega softplus -D(x_t))
    the average of the student's weights is updated once.

Unlike in DMD, gradient flows through both denoisers: through x, and through x_t into mu_real and mu_fake, whose
weights are frozen. The loss stands for the Fisher divergence E|delta|^2. At the fake score's optimum
E[delta . (mu_fake - x)] = 0 (the score identity), so that the value of the loss is (1 - alpha) E|delta|^2, which is
below 0 for alpha > 1. Its gradient (derived; tests/test_sid.py) is half that of the divergence for alpha = 1/2. For
alpha = 1 it is half of it with the law of x_t held fixed, which is SIM with a squared distance. alpha = 1.2
extrapolates.

Few steps. The paper matches the even mixture of the outputs of all steps. `stops: per_sample` does this: each sample
comes from a step of its own, and the fake score does not know which. With `stops: shared` (SiD-DiT's code) all samples
of an update come from one step. condition_on_stop (ours, see dmd2.py) matches the output of each step by itself.

Guidance, in diffusers' convention, where scale 1 is none, and 0 leaves the prompt out:
    LSG       guidance_scale, fake_guidance and fake_training_guidance 2, prompt_dropout 0.1. The prediction guided
              with kappa_1 learns to denoise the samples; with kappa_2 = kappa_1 the optimum is the guided teacher.
    Zero-CFG  guidance_scale 1, fake_guidance and fake_training_guidance 0: the teacher is not guided, and the fake
              score has no prompt. The student follows s_real(x | c) - s_fake(x), with the score of all prompts.
    Anti-CFG  guidance_scale 1, fake_guidance below 0, prompt_dropout 0.1. We do not know the published coefficient.
For a fake score that is right with and without prompts, the difference is the unguided one plus
(1 - kappa_2) grad log p_fake(c | x): guidance by the student's own classifier, of weight 1 for Zero-CFG, and 2 for
kappa_2 = -1 (derived).

Departures. We take the mean over the elements of a sample where the code sums. A NaN makes the loop skip the update;
their code leaves such samples out. In SiDA, omega weights the GAN's loss of its own sample, where the code multiplies
two means; both terms count whole, where theirs are halved; the discriminator's loss has no weight by level, and
`gan_start` counts updates instead of images.
"""

import dataclasses
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch, Conditioning
from fastgen.networks import Networks, frozen
from fastgen.objectives.base import Loss, State, Turn
from fastgen.objectives.dmd2 import DMD2
from fastgen.objectives.embedding import with_embedding
from fastgen.objectives.fake_score import denoising_loss, stop_input
from fastgen.registry import MOST_STEPS, MOST_UPDATES
from fastgen.rollout import Rollout, RolloutPolicy
from fastgen.schedule import expand

LARGEST_LOGIT = 10.0  # of the generator's side, SiDA's code


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class SiD(DMD2):
    name: Literal["sid"] = "sid"  # type: ignore[assignment]
    # SiD-LSG, SiDA and SiD-DiT; 1.2 in SiD's EDM runs (rows sid_generator, sid_generator_alpha)
    alpha: float = Field(default=1.0, ge=0)
    fake_updates: int = Field(default=1, ge=1, le=MOST_STEPS)  # the two networks alternate, all papers
    normaliser_floor: float = Field(default=1e-5, gt=0)  # of mean|x - real|, their code (row sid_generator)
    fake_guidance: float = 1.0  # kappa_2 = kappa_3: 2 in SiD-LSG's runs, 4.5 in SiD-DiT's; see above
    fake_training_guidance: float = 1.0  # kappa_1: the same
    # the share of samples that the fake score learns with the empty prompt; 0.1 in SiD-LSG's code, if a kappa is not 1
    prompt_dropout: float = Field(default=0.0, ge=0, lt=1)
    # lambda of SiDA: 0.01 in its EDM runs, beside 100 times SiD's loss, which is 1e-4 here (row sida_generator)
    gan_weight: float = Field(default=0.0, ge=0)
    # of the sum of two mean softplus against a mean over elements: 0.5 / d in SiDA's code, for samples of d elements
    discriminator_weight: float = Field(default=0.01, gt=0)
    # the student's updates before it sees the GAN, whose turns are called warm_up; SiDA's code: 200,000 images, which
    # are 781 updates of 256
    gan_start: int = Field(default=0, ge=0, le=MOST_UPDATES)

    @model_validator(mode="after")
    def _identity(self) -> "SiD":
        if self.ca_time is not None:
            raise ValueError(
                f"{self.name} has one loss of both predictions, and ca_time would take guidance out of it: leave "
                "ca_time out, or use dmd2"
            )
        if self.fake_guidance != self.fake_training_guidance and not self.prompt_dropout:
            raise ValueError(
                f"fake_guidance {self.fake_guidance:g} is not the scale {self.fake_training_guidance:g} that the fake "
                "score is trained with (fake_training_guidance), so its predictions with and without a prompt must be "
                "right by themselves: set prompt_dropout: 0.1, or make the two scales equal"
            )
        if self.gan_start and not self.gan_weight:
            raise ValueError("gan_start says when the GAN of gan_weight begins, and gan_weight is 0: leave it out")
        return self

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "fake_score")

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        """As DMD2's; SiDA's discriminator is the fake score itself."""
        modules = super().auxiliary(backbone, policy)
        modules.pop("discriminator", None)
        return modules

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        fake_turn, student_turn = super().turns(step, state)
        return fake_turn, student_turn if step >= self.gan_start else Turn("warm_up", ("student",))

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        if turn.name == "warm_up":
            return dataclasses.replace(self, gan_weight=0.0, gan_start=0).student_loss(networks, batch)
        return super().loss(turn, networks, batch, state)

    def matching_loss(self, networks: Networks, batch: Batch, rollout: Rollout, weight: Tensor | None = None) -> Loss:
        """The score identity's loss, with gradient through both denoisers, plus SiDA's term and the embedding loss.

        weight: [B], a factor of each sample's loss; None: 1."""
        x_t, t = self.renoised(networks, batch, rollout)
        with frozen(networks.fake_score, networks.teacher):
            fake = self.fake_prediction(networks, batch, rollout.stop, x_t, t)
            real = self.real_prediction(networks, batch, x_t, t)
        omega = self.sample_weight(rollout.x, fake, real)
        omega = omega if weight is None else weight * omega
        total = (omega * identity_loss(rollout.x, fake, real, self.alpha)).mean()
        terms = signals.lag_terms(rollout.x, fake, real) | {"identity": total.detach()}
        if self.gan_weight:
            with frozen(networks.fake_score):
                logits = self.logits(networks, batch, rollout.x, rollout.stop, "gan")
            losses = F.softplus(-logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)).mean(1)
            gan = (omega.detach() * losses).mean()
            total = total + self.gan_weight * gan
            terms["gan"] = gan.detach()
        return with_embedding(self.embedding, networks, batch, rollout.x, total, terms)

    def sample_weight(self, x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
        """omega [B] = 1 / max(mean|x - real|, floor), detached."""
        return 1 / signals.per_sample_mean((x - real).abs()).detach().clamp_min(self.normaliser_floor)

    def fake_prediction(self, networks: Networks, batch: Batch, stop: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """mu_fake^{kappa_2} at x_t, [B, ...]."""
        return self.guided_fake(networks, batch.cond, batch.uncond, stop, self.fake_guidance, x_t, t)

    def guided_fake(
        self,
        networks: Networks,
        cond: Conditioning,
        uncond: Conditioning,
        stop: Tensor,
        scale: float,
        x_t: Tensor,
        t: Tensor,
    ) -> Tensor:
        """uncond + scale (cond - uncond) of the fake score at x_t, [B, ...]; at 0 and 1 with one evaluation."""
        if scale in (0, 1):
            return networks.fake_score(x_t, t, cond if scale else uncond, stop_input(stop, self.condition_on_stop))
        both = stop_input(torch.cat([stop, stop]), self.condition_on_stop)
        return signals.guided(partial(networks.fake_score, inputs=both), x_t, t, cond, uncond, scale)

    def fake_denoising(self, networks: Networks, batch: Batch, rollout: Rollout) -> Tensor:
        """The denoising loss of mu_fake^{kappa_1}, with prompts left out at random."""
        cond = batch.cond
        if self.prompt_dropout:
            left_out = batch.uniform("prompt_dropout") < self.prompt_dropout
            cond = Conditioning({k: torch.where(expand(left_out, v), batch.uncond[k], v) for k, v in cond.items()})
        predict = partial(self.guided_fake, networks, cond, batch.uncond, rollout.stop, self.fake_training_guidance)
        within = self.level_range(networks.policy, rollout)
        return denoising_loss(
            networks, batch, rollout.x, self.fake_time, self.fake_space, within=within, predict=predict
        )

    def discriminator_logits(self, networks: Networks, batch: Batch, x_t: Tensor, t: Tensor, stop: Tensor) -> Tensor:
        """D(x_t, t) [B, tokens]: the middle features of the fake score, averaged over channels."""
        with networks.fake_score.capture() as features:
            networks.fake_score(x_t, t, batch.cond, stop_input(stop, self.condition_on_stop))
        return features[len(features) // 2].mean(2)


def identity_loss(x: Tensor, fake: Tensor, real: Tensor, alpha: float) -> Tensor:
    """[B]: mean over elements of delta . [(real - x) - alpha delta], delta = real - fake            (arXiv 2404.04057)

    x: samples; fake, real: predictions at the renoised samples, [B, ...] each, all with gradient."""
    delta = real - fake
    return signals.per_sample_mean(delta * ((real - x) - alpha * delta))
