"""Were modes dropped, or weighted wrongly?"""

from typing import ClassVar

import torch
from torch import Tensor

from fastgen.backbones.gaussian_mixture import Mixture
from fastgen.metrics.base import Directions
from fastgen.metrics.points import PointMetric


def nearest_component(mixture: Mixture, points: Tensor) -> Tensor:
    """[B]: the component k with the largest N(x; m_k, S_k), for points [B, D].

    This is the most likely component at t = 0 under equal priors. With the priors of the target distribution, a sample
    in a mode that should be empty would be assigned to another mode."""
    means, variances = mixture.means.double(), mixture.variances.double()
    log_density = -0.5 * ((points[:, None] - means) ** 2 / variances + variances.log()).sum(-1)
    return log_density.argmax(1)


class ModeShare(PointMetric):
    """mode_share_error: max over modes of |share of all samples - weight|. mode_share_min_ratio: the smallest ratio
    share / weight of a mode with positive weight; 0 if a mode was dropped.

    With class labels, a sample counts for a mode only under its own label. The share of all samples that have label c
    and are in mode k is compared with the share of c times the weight of k given c. Classes that were swapped
    therefore show as an error of their whole weight."""

    name = "mode_share_error"
    directions: ClassVar[Directions] = {"mode_share_error": "lower", "mode_share_min_ratio": "higher"}

    def compute(self) -> dict[str, float]:
        error, ratio = 0.0, float("inf")
        for group in self.groups(least=1):
            weights = self.law.logits[group.label].softmax(0).double()
            counts = torch.bincount(nearest_component(self.law, group.points), minlength=len(weights))
            shares = counts.double() / len(group.points)
            error = max(error, group.share * float((shares - weights).abs().max()))
            ratio = min(ratio, float((shares / weights)[weights > 0].min()))
        return {"mode_share_error": error, "mode_share_min_ratio": ratio}
