"""Does a streamed video keep its contrast and its motion? The moments of AR(1) videos, frame by frame."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fastgen import noise
from fastgen.backbones.ar1_law import AR1Law, to_complex
from fastgen.metrics.base import Directions
from fastgen.metrics.points import LawMetric


class FrameMetric(LawMetric):
    """The error of a moment at each frame, averaged over labels with their shares as weights.

    The headline is the worst frame. `_last` is the last frame, where drift has gone farthest. `_floor` is the worst
    frame of equally many exact videos, drawn from the evaluation's seed: what a perfect student scores."""

    backbones = ("ar1_video",)
    law: AR1Law

    @abstractmethod
    def error(self, frames: Tensor, label: int) -> Tensor:
        """[frames], from complex frames [n, F, copies] of a label, relative to its mean."""

    def by_frame(self, exact: bool = False) -> Tensor:
        """[frames] float64: the errors of the samples, or of exact videos in their place."""
        total, shape = torch.zeros((), dtype=torch.float64), self.law.shape[1:]
        for group in self.groups(least=2):
            videos = group.points.unflatten(1, (-1, *shape))
            if exact:
                key, label = noise.make_key(self.context.seed, "exact frames"), torch.full_like(group.ids, group.label)
                videos = self.law.sample(group.ids, label, key, videos.shape[1])
            centred = to_complex(videos) - self.law.second_order(group.label, 1)[0]
            total = total + group.share * self.error(centred, group.label)
        return total

    def compute(self) -> dict[str, float]:
        own = self.by_frame()
        numbers = (own.max(), own[-1], self.by_frame(exact=True).max())
        return dict(zip(self.directions, map(float, numbers), strict=True))


class VarianceError(FrameMetric):
    """|V_k - V|, V_k = E|z_k - m|^2 / 2: the spread of frame k about its prompt's mean, against the exact one, which
    is 1 for a stated prompt. Videos that fade have V_k < 1. A mean that drifts counts, too."""

    name = "variance_error"
    directions: ClassVar[Directions] = {
        "variance_error": "lower",
        "variance_error_last": "lower",
        "variance_error_floor": "neither",
    }

    def error(self, frames: Tensor, label: int) -> Tensor:
        variance = frames.abs().square().mean((0, 2)) / 2
        return (variance - self.law.second_order(label, 1)[1][0, 0].real).abs()


class LagError(FrameMetric):
    """|c_k - c|, c_k = E[(z_{k+1} - m) conj(z_k - m)] / E|z_k - m|^2: the complex factor by which a frame predicts the
    next one, against the exact one, which is rho for a stated prompt. Its modulus is the damping and its angle the
    motion. As it is relative to the variance, a video that fades and moves well has no error here.

    compute raises ValueError for videos of one frame."""

    name = "lag_error"
    directions: ClassVar[Directions] = {"lag_error": "lower", "lag_error_last": "lower", "lag_error_floor": "neither"}

    def error(self, frames: Tensor, label: int) -> Tensor:
        if frames.shape[1] < 2:
            raise ValueError("lag_error compares a frame with the next one; set backbone.num_frames to at least 2")
        now, following = frames[:, :-1], frames[:, 1:]
        lag = (following * now.conj()).mean((0, 2)) / now.abs().square().mean((0, 2))
        cov = self.law.second_order(label, 2)[1]
        return (lag - cov[1, 0] / cov[0, 0]).abs()
