"""The Frechet distance between feature distributions."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from fastgen.metrics.base import Directions, Metric, MetricContext

# Sums over the generated features that torchmetrics keeps.
MOMENTS = ("fake_features_sum", "fake_features_cov_sum", "fake_features_num_samples")


class Precomputed(nn.Identity):
    """Tells torchmetrics that its inputs are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


class FID(Metric):
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)) of real and generated features    (Heusel et al., arXiv 1706.08500)

    Computed by torchmetrics in float64. Both sides have n = min(num_samples, len(reference)) images: the first n of
    the reference, and those generated images that `MetricContext.compared` names. The number depends on n and on the
    feature network: compare only FIDs with the same sample count and feature network."""

    name = "fid"
    needs_reference = True
    fewest_samples = 2
    output = "pixels"
    directions: ClassVar[Directions] = {"fid": "lower", "fid_num_samples": "neither"}

    def __init__(self, context: MetricContext):
        super().__init__(context)
        self.features, reference = self.need_features(), self.need_reference()
        self.count, self.compared, self.seen = len(context.compared), set(context.compared), 0
        if self.count < 2:
            raise ValueError(f"fid needs at least 2 images per side, got {self.count}; raise eval.num_samples")
        from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import

        real = self.features.of_reference(reference, self.count)
        self.distance = FrechetInceptionDistance(feature=Precomputed(real.shape[1]))
        self.distance.update(real.double(), real=True)

    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        start, self.seen = self.seen, self.seen + len(samples)
        rows = [i for i in range(len(samples)) if start + i in self.compared]
        if rows:
            self.distance.update(self.features(samples)[rows].double(), real=False)

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self.distance, name).clone() for name in MOMENTS}

    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        for name in MOMENTS:
            getattr(self.distance, name).copy_(state[name])
        self.seen = len(prompts)

    def compute(self) -> dict[str, float]:
        if int(self.distance.fake_features_num_samples) != self.count:
            raise ValueError(f"fid expected {self.count} samples, got {int(self.distance.fake_features_num_samples)}")
        return {"fid": float(self.distance.compute()), "fid_num_samples": float(self.count)}
