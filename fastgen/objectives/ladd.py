"""LADD, an adversarial term of other objectives: heads on the frozen teacher's features (arXiv 2403.12015).

    paper      here             what it is
    F          networks.critic      the frozen teacher, or the network fitted to it where the teacher is a formula
    D          discriminator    small heads on its features at several depths, trained
    x_hat_0    x                the student's, at a level `low` (0: clean); renoised to a random level above it

Fake and real are renoised by draws of their own, hinge losses of both sides. Not an objective by itself: scm has it as
SANA-Sprint does, consistency as PCM does."""

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch, Conditioning
from fastgen.flow.time_pairs import between
from fastgen.modules.heads import TokenHeads
from fastgen.networks import Networks, frozen
from fastgen.objectives.base import Loss, feature_network
from fastgen.schedule import TimeSampler


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Ladd:
    """weight: of the student's -mean D. time: where D looks, from `low` (0) to `high` (1) of the interval it is given.
    mismatched: data under the prompts of other samples are further fakes."""

    weight: float = Field(gt=0)  # "0.5", SANA-Sprint; "0.1", PCM
    time: TimeSampler = TimeSampler("logit_normal", 0.0, 1.0, mean=-0.6, std=1.0)  # "N(-0.6, 1)", SANA-Sprint
    mismatched: bool = False  # true in SANA-Sprint's code

    def networks(self, backbone: Backbone) -> dict[str, nn.Module]:
        sizes = backbone.make_empty()
        modules: dict[str, nn.Module] = {"discriminator": TokenHeads(sizes.feature_dim, len(sizes.feature_modules))}
        return modules | feature_network(backbone)

    def student_loss(
        self, networks: Networks, batch: Batch, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
    ) -> Tensor:
        """-mean D(x) of the student's x [B, ...] at level low [B]; renoised up to at most high [B]. Gradient to x."""
        with frozen(networks["discriminator"], networks.critic):
            return signals.hinge_generator_loss(self.logits(networks, batch, x, "gan", low, high))

    def discriminator_loss(
        self,
        networks: Networks,
        batch: Batch,
        fake: Tensor,
        real: Tensor,
        low: Tensor | None = None,
        high: Tensor | None = None,
    ) -> Loss:
        """The hinge between real and fake, [B, ...] each, without gradient to them."""
        fakes = self.logits(networks, batch, fake.detach(), "gan_fake", low, high)
        reals = self.logits(networks, batch, real.detach(), "gan_real", low, high)
        gap = (reals.mean() - fakes.mean()).detach()
        if self.mismatched:
            others = self.logits(networks, batch, real.detach(), "gan_other", low, high, roll=1)
            fakes = torch.cat([fakes, others])
        total = signals.hinge_discriminator_loss(reals, fakes)
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
        """D [B, depths] of x renoised by the draws of this name. roll: prompts are those of other samples."""
        t, cond, schedule = self.time(batch.uniform(f"{name}_time")), batch.cond, networks.teacher.schedule
        low = torch.zeros_like(t) if low is None else low
        t = between(low, torch.ones_like(t) if high is None else high, t)
        if roll:
            cond = Conditioning({key: value.roll(roll, 0) for key, value in cond.items()})
        x_t, backbone = schedule.renoise(x, batch.normal(f"{name}_noise"), low, t).to(x.dtype), networks.critic
        with backbone.capture() as features:
            backbone(x_t, t, cond)
        return networks["discriminator"](features)
