"""LADD: an adversarial term for other objectives, with heads on the frozen teacher's features (arXiv 2403.12015).

    paper      here             what it is
    F          networks.critic  the frozen teacher, or the network fitted to it where the teacher is a formula
    D          discriminator    small trained heads on F's features at several depths
    x_hat_0    x                the student's sample at level `low` (0 is clean), renoised to a random level above it

Fake and real samples are renoised with independent draws. Both sides use hinge losses. LADD is not an objective by
itself: scm uses it as SANA-Sprint does, and consistency as PCM does.

Units. The student's term is a mean over logits, whatever the size of a sample. A published weight is for the loss it
stands beside: SANA-Sprint's 0.5 for sCM's tangents of norm 1 (`scm.tangent_norm: l2`) with learned weights, PCM's 0.1
for an element-wise Huber distance (`consistency.distance`). Rows sana_ratio and pcm_ratio compare the gradients of the
two terms at two sizes of sample.

Departure: PCM's code renoises from level s with (t - s) / (1 - s) noise, less than the noise path has for s > 0."""

from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch, Conditioning
from fastgen.flow.time_pairs import between
from fastgen.modules.expert_levels import draw_levels
from fastgen.modules.heads import TokenHeads
from fastgen.networks import Networks, frozen
from fastgen.objectives.base import Loss, feature_network
from fastgen.recipe import Recipe
from fastgen.schedule import TimeSampler


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Ladd:
    """weight: the factor of the student's term, -mean D.
    time: the law of the levels at which D sees samples, from the lower end (0) to the upper end (1) of the interval.
    generator: the student's term: linear, -mean D; or hinge, mean max(0, 1 - D), which has no gradient where D > 1.
    mismatched: real samples under the prompts of other samples of the micro-batch count as additional fakes."""

    weight: float = Field(gt=0)  # "0.5", SANA-Sprint; "0.1", PCM; see Units
    # "N(-0.6, 1)" of log sigma, SANA-Sprint, for latents of std 0.5 (row sana_levels). PCM: uniform, low 0, high 1
    time: TimeSampler = TimeSampler("logit_normal", 0.0, 1.0, mean=-0.6, std=1.0, sigma_data=0.5)
    generator: Literal["linear", "hinge"] = "linear"  # linear: SANA-Sprint; hinge: PCM's code
    mismatched: bool = False  # true in SANA-Sprint's code

    def check_batch(self, recipe: Recipe) -> None:
        """Raises ValueError where a micro-batch has no other sample whose prompt could be taken."""
        if self.mismatched and recipe.train.batch_size < 2:
            raise ValueError(
                "gan.mismatched takes the prompts of other samples of a micro-batch, and train.batch_size is "
                f"{recipe.train.batch_size}; make it at least 2, or leave out mismatched"
            )

    def networks(self, backbone: Backbone) -> dict[str, nn.Module]:
        """The discriminator, and the feature network where one is needed: {role: module}."""
        sizes = backbone.make_empty()
        modules: dict[str, nn.Module] = {"discriminator": TokenHeads(sizes.feature_dim, len(sizes.feature_modules))}
        return modules | feature_network(backbone)

    def student_loss(
        self, networks: Networks, batch: Batch, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
    ) -> Tensor:
        """`generator` at the student's x [B, ...], which is at level low [B] (None: 0).

        D sees x renoised to a level between low and high [B] (None: 1). Gradient flows to x alone."""
        with frozen(networks["discriminator"], networks.critic):
            logits = self.logits(networks, batch, x, "gan", low, high)
        if self.generator == "hinge":
            return torch.relu(1 - logits).mean()
        return signals.hinge_generator_loss(logits)

    def discriminator_loss(
        self,
        networks: Networks,
        batch: Batch,
        fake: Tensor,
        real: Tensor,
        low: Tensor | None = None,
        high: Tensor | None = None,
    ) -> Loss:
        """The hinge loss between real and fake, [B, ...] each. No gradient flows to either."""
        fake_logits = self.logits(networks, batch, fake.detach(), "gan_fake", low, high)
        real_logits = self.logits(networks, batch, real.detach(), "gan_real", low, high)
        gap = (real_logits.mean() - fake_logits.mean()).detach()
        if self.mismatched:
            mismatched_logits = self.logits(networks, batch, real.detach(), "gan_other", low, high, roll=-1)
            fake_logits = torch.cat([fake_logits, mismatched_logits])
        total = signals.hinge_discriminator_loss(real_logits, fake_logits)
        return Loss(total, {"loss": total.detach(), "logit_gap": gap})

    def logits(
        self,
        networks: Networks,
        batch: Batch,
        x: Tensor,
        name: str,
        low: Tensor | None,
        high: Tensor | None,
        roll: int = 0,
    ) -> Tensor:
        """D [B, depths] at x, renoised with the draws of this name.

        roll: each sample gets the prompt of the sample this many rows before it; -1, the next one's (SANA-Sprint)."""
        low = torch.zeros_like(batch.ids, dtype=batch.dtype) if low is None else low
        high = torch.ones_like(low) if high is None else high
        t = draw_levels(batch, f"{name}_time", lambda u: between(low, high, self.time(u)), networks.critic)
        cond = batch.cond
        if roll:
            cond = Conditioning({key: value.roll(roll, 0) for key, value in cond.items()})
        x_t = networks.teacher.schedule.renoise(x, batch.normal(f"{name}_noise"), low, t).to(x.dtype)
        with networks.critic.capture() as features:
            networks.critic(x_t, t, cond)
        return networks["discriminator"](features)
