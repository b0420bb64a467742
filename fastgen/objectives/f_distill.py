"""f-distill: one-step diffusion models with f-divergence distribution matching (Xu et al., arXiv 2502.15681).

    paper          here                     what it is
    G_theta        networks.student         few-step generator
    p, q           -                        the laws of data and student, both noised to t
    s_p, s_q       teacher, fake_score      their denoisers
    r = p / q      signals.density_ratio    exp of DMD2's discriminator, which is optimal at log(p / q)
    h(r)           divergence_weight        f''(r) r^2
    -              state["ratio"]           [3, bins]: decayed sums of r, of h and of ones, per noise-level bin

This is DMD2 with its GAN. Each sample's score difference is multiplied by h(r) / mean h at the same (x_t, t):
    r = D's ratio at x_t, divided by the mean ratio at that level (the mean of the true ratio is 1)
    g = h(r) / mean h * (mu_fake - mu_real^w) / mean|x - mu_real^w|
Reverse KL has h = 1 and is DMD2. The other divergences give more weight to samples where the data has more (kl, jf) or
less (sf, neyman) mass than the student. Everything else, including the options, is as in DMD2.

Departures. Both means are those of the previous updates, so that a sample's weight does not depend on how an update is
split over processes and micro-batches; the released code uses the means of the current update. D reads the features of
the fake score, as in DMD2, where the released code uses the teacher's. The GAN term draws its own noise levels, where
the released code uses those of g.
"""

from typing import Literal

import torch
from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import signals
from fastgen.batch import Batch
from fastgen.modules.processes import summed
from fastgen.networks import Networks
from fastgen.objectives.base import Loss, State, Turn
from fastgen.objectives.dmd2 import DMD2
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS
from fastgen.rollout import Rollout


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class FDistill(DMD2):
    name: Literal["f_distill"] = "f_distill"  # type: ignore[assignment]
    f_divergence: signals.Divergence = "js"  # the released code's default; kl on CIFAR-10
    # of a mean softplus against half a mean square over all elements (row f_distill_generator): SD1.5, CIFAR-10 and
    # Wan in the released configs; SDXL 5e-3
    gan_weight: float = Field(default=1e-3, ge=0)
    # number of noise-level bins, the released code (row f_distill_weights, with the clamps of `signals.density_ratio`)
    ratio_bins: int = Field(default=10, ge=1, le=MOST_STEPS)
    # fraction of the sums that each update keeps; theirs, of the means: 0.5 on ImageNet, elsewhere 0 (no row: at 0)
    ratio_memory: float = Field(default=0.5, ge=0, lt=1)

    @field_validator("gan_weight")
    @classmethod
    def _discriminator(cls, value: float) -> float:
        if not value:
            raise ValueError("the density ratio comes from the discriminator: gan_weight must be above 0")
        return value

    def check_recipe(self, recipe: Recipe) -> None:
        super().check_recipe(recipe)
        if self.renoise_range != "all" and self.stops == "per_sample" and recipe.backbone.own_boundaries():
            raise ValueError(
                f"renoise_range: {self.renoise_range} with stops: per_sample gives each sample levels of its own, and "
                "the ratio is read from the features of one expert of the pipeline: set stops: shared, or "
                "renoise_range: all"
            )

    def init_state(self) -> State:
        """Starts as if one sample with r = 1 had been seen in every bin."""
        weight = signals.divergence_weight(self.f_divergence, torch.ones(self.ratio_bins))
        ones = torch.ones_like(weight)
        return {"ratio": torch.stack([ones, weight, ones]), "seen": torch.zeros(3, self.ratio_bins)}

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        if turn.name != "student":
            return self.fake_loss(networks, batch)
        rollout = self.rollout(networks, batch, grad=True)
        weight, terms = self.ratio_weight(networks, batch, rollout, state)
        loss = self.matching_loss(networks, batch, rollout, weight)
        return Loss(loss.total, loss.terms | terms)

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        """The sums of this update become the means of the following ones, unless it saw what is not finite: such an
        update is skipped, and would leave no finite weight behind it."""
        super().finish(turn, networks, state)
        if turn.name == "student":
            if bool(state["seen"].isfinite().all()):
                state["ratio"].mul_(self.ratio_memory).add_(state["seen"])
            state["seen"].zero_()

    @torch.no_grad()
    def ratio_weight(
        self, networks: Networks, batch: Batch, rollout: Rollout, state: State
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """h(r) / mean h [B] at the (x_t, t) of the score difference, and the terms to log.

        Also adds r and h to the state, for the means of the following updates."""
        x_t, t = self.renoised(networks, batch, rollout)
        ratio = signals.density_ratio(self.discriminator_logits(networks, batch, x_t, t, rollout.stop))
        position = (t - self.renoise_time.low) / (self.renoise_time.high - self.renoise_time.low)
        index = (position * self.ratio_bins).long().clamp(max=self.ratio_bins - 1)
        total_ratio, total_weight, count = state["ratio"]
        level_mean = (total_ratio + 1e-6) / (count + 1e-6)  # 1 in a bin without recent samples
        weight = signals.divergence_weight(self.f_divergence, ratio / level_mean[index])
        seen = torch.stack([ratio, weight, torch.ones_like(ratio)])
        sums = torch.zeros_like(state["seen"]).index_add_(1, index, seen)
        state["seen"] += summed(sums)  # over processes
        terms = {"ratio": ratio.mean(), "effective_share": signals.effective_share(weight)}
        return weight * count.sum() / total_weight.sum(), terms
