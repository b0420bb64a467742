"""The sample mean and covariance, compared with the exact ones."""

from typing import ClassVar

import torch
from torch import Tensor

from fastgen.backbones.gaussian_mixture import Mixture
from fastgen.metrics.base import Directions
from fastgen.metrics.points import PointMetric


def exact_moments(mixture: Mixture, label: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] given the label:  m = sum_k w_k m_k,
    C = sum_k w_k (S_k + (m_k - m)(m_k - m)^T)."""
    weights = mixture.logits[label].softmax(0).double()
    mean = weights @ mixture.means.double()
    centred = mixture.means.double() - mean
    return mean, torch.diag(weights @ mixture.variances.double()) + centred.T @ (weights[:, None] * centred)


class MeanError(PointMetric):
    """|sample mean - exact mean|, Euclidean, averaged over labels with their shares as weights."""

    name = "mean_error"
    directions: ClassVar[Directions] = {"mean_error": "lower"}

    def compute(self) -> dict[str, float]:
        errors = [
            g.share * float((g.points.mean(0) - exact_moments(self.law, g.label)[0]).norm())
            for g in self.groups(least=1)
        ]
        return {"mean_error": sum(errors)}


class CovError(PointMetric):
    """Frobenius norm of the difference between the (unbiased) sample covariance and the exact one, averaged over
    labels with their shares as weights."""

    name = "cov_error"
    directions: ClassVar[Directions] = {"cov_error": "lower"}

    def compute(self) -> dict[str, float]:
        dim = self.law.means.shape[1]
        errors = [
            g.share * float((g.points.T.cov().reshape(dim, dim) - exact_moments(self.law, g.label)[1]).norm())
            for g in self.groups(least=2)
        ]
        return {"cov_error": sum(errors)}
