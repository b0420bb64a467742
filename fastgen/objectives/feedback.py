"""Human feedback learning beside distillation, as in the second stage of Hyper-SD (arXiv 2404.13686, Sec. 3.2), after
ReFL (arXiv 2304.05977).

    feedback(x0_hat) = mean relu(target - R(x0_hat))       x0_hat: the student's clean prediction at the level t

R are the recipe's differentiable rewards of the decoded prediction, and the mean is over all samples; those without a
score, or with t outside `levels`, count as 0. Gradient flows through the reward and the decoder. Where R is above
`target`, there is none: a student that satisfies the reward is not pushed further, which is what keeps it from
exploiting the reward. Without a target the term is -R.

Departures. Hyper-SD trains an adapter of its own for this term, from the teacher, and adds the two adapters; here one
student has both losses. Its perceptual term, from a segmentation network, is left out. Its training code is not
public."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Batch
from fastgen.networks import Networks

Level = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Feedback:
    """weight: of the term, in units of the objective's loss for one unit of the reward.
    target: alpha, in units of the (calibrated) reward; None: no end.
    levels: the lowest and the highest t at which predictions are scored. ReFL takes late steps alone, as a teacher's
    predictions at high noise are blurred; those of a student of few steps are pictures at every level."""

    weight: float = Field(gt=0)
    target: float | None = None
    levels: tuple[Level, Level] = (0.0, 1.0)

    @model_validator(mode="after")
    def _ordered(self) -> "Feedback":
        if self.levels[0] >= self.levels[1]:
            raise ValueError(f"feedback.levels: the first must be below the second, got {list(self.levels)}")
        return self

    def loss(self, networks: Networks, batch: Batch, clean: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The term, without its weight, and what is logged. clean: [B, *latent_shape], with gradient; t: [B]."""
        score = networks.rewards(clean, batch, grad=True)
        missed = -score.value if self.target is None else F.relu(self.target - score.value)
        counts = score.valid & (t >= self.levels[0]) & (t <= self.levels[1])
        loss = torch.where(counts, missed, 0).mean()
        return loss, {"feedback": loss.detach()} | score.terms()
