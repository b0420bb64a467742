"""Were modes dropped, or weighted wrongly?"""

from typing import ClassVar

import torch
from torch import Tensor

from fastgen.backbones.gaussian_mixture import Mixture
from fastgen.metrics.base import Directions
from fastgen.metrics.points import PointMetric


def nearest_component(mixture: Mixture, points: Tensor) -> Tensor:
    """[B]: the component k with the largest N(x; m_k, S_k), points [B, D].

    The posterior component at t = 0 with equal priors: priors of the target law would assign a sample of a mode that
    should be empty to one that should not."""
    means, variances = mixture.means.double(), mixture.variances.double()
    log_density = -0.5 * ((points[:, None] - means) ** 2 / variances + variances.log()).sum(-1)
    return log_density.argmax(1)


class ModeShare(PointMetric):
    """mode_share_error: max over modes of |share of all samples - weight|. mode_share_min_ratio: the smallest share /
    weight of a mode with positive weight; 0 if a mode was dropped.

    With class labels a sample counts for a mode only under its own label: the share of all samples that carry label c
    and lie in mode k is held against the share of c times the weight of k given c, so that classes that were swapped
    show as an error of their whole weight."""

    name = "mode_share_error"
    directions: ClassVar[Directions] = {"mode_share_error": "lower", "mode_share_min_ratio": "higher"}

    def compute(self) -> dict[str, float]:
        error, ratio = 0.0, float("inf")
        for group in self.groups(least=1):
            weights = self.mixture.logits[group.label].softmax(0).double()
            counts = torch.bincount(nearest_component(self.mixture, group.points), minlength=len(weights))
            shares = counts.double() / len(group.points)
            error = max(error, group.share * float((shares - weights).abs().max()))
            ratio = min(ratio, float((shares / weights)[weights > 0].min()))
        return {"mode_share_error": error, "mode_share_min_ratio": ratio}
