"""What the metrics of points share. They keep all samples, and compare those of each label with the exact distribution
given that label."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.backbones.gaussian_mixture import Mixture
from fastgen.metrics.base import Metric, MetricContext


@dataclass(frozen=True)
class Group:
    """The samples of one label. points: [n, D] float64. ids: [n], their indices in the evaluation. share: n
    divided by the number of all samples."""

    label: int
    share: float
    ids: Tensor
    points: Tensor


def labels_of(mixture: Mixture, prompts: Sequence[str]) -> Tensor:
    """[B] int64: the class that a prompt names, or the last label for the empty prompt. Raises ValueError for other
    prompts."""
    last = len(mixture.logits) - 1
    known = {"": last} | {str(label): label for label in range(last)}
    unknown = [prompt for prompt in prompts if prompt not in known]
    if unknown:
        raise ValueError(
            f"prompts of this mixture must be class labels {list(known)[1:]} or empty, got {unknown[0]!r}"
        )
    return torch.tensor([known[prompt] for prompt in prompts])


class PointMetric(Metric):
    """Collects points [B, D] and labels. Needs the exact mixture."""

    output = "points"

    def __init__(self, context: MetricContext):
        super().__init__(context)
        if context.mixture is None:
            raise ValueError(
                f"{self.name} compares with an exact distribution, which only the backbone gaussian_mixture has"
            )
        self.mixture = context.mixture
        self.points: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        self.points.append(samples.double())
        self.labels.append(labels_of(self.mixture, prompts))

    def state(self) -> dict[str, Tensor]:
        return {"points": torch.cat(self.points), "labels": torch.cat(self.labels)}

    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        self.points, self.labels = [state["points"]], [state["labels"]]

    def groups(self, least: int) -> Iterator[Group]:
        """The samples of each label. Raises ValueError if a label has fewer than `least`."""
        points, labels = torch.cat(self.points), torch.cat(self.labels)
        for label in labels.unique().tolist():
            ids = (labels == label).nonzero().squeeze(1)
            if len(ids) < least:
                raise ValueError(
                    f"{self.name} needs at least {least} samples of every label, but label {label} has "
                    f"{len(ids)}; raise eval.num_samples"
                )
            yield Group(label, len(ids) / len(labels), ids, points[ids])
