"""What the metrics of points share. They keep all samples, and compare those of each label with the exact distribution
given that label."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.backbones.ar1_law import AR1Law
from fastgen.backbones.gaussian_mixture import Mixture
from fastgen.metrics.base import Metric, MetricContext

LAWS: dict[str, type] = {"gaussian_mixture": Mixture, "ar1_video": AR1Law}  # by backbone


@dataclass(frozen=True)
class Group:
    """The samples of one label. points: [n, D] float64. ids: [n], their indices in the evaluation. share: n
    divided by the number of all samples."""

    label: int
    share: float
    ids: Tensor
    points: Tensor


def labels_of(law: Mixture | AR1Law, prompts: Sequence[str]) -> Tensor:
    """[B] int64: the class that a prompt names, or the last label for the empty prompt. Raises ValueError for other
    prompts."""
    last = law.num_labels
    known = {"": last} | {str(label): label for label in range(last)}
    unknown = [prompt for prompt in prompts if prompt not in known]
    if unknown:
        raise ValueError(f"prompts of this law must be class labels {list(known)[1:]} or empty, got {unknown[0]!r}")
    return torch.tensor([known[prompt] for prompt in prompts])


class LawMetric(Metric):
    """Collects points [B, D] and labels. Needs the exact law, a mixture or that of videos."""

    output = "points"
    backbones = tuple(LAWS)

    def __init__(self, context: MetricContext):
        super().__init__(context)
        if not isinstance(context.law, tuple(LAWS[name] for name in self.backbones)):
            raise ValueError(
                f"{self.name} compares with an exact distribution, that of the backbone {' or '.join(self.backbones)}"
            )
        self.law: Any = context.law
        self.points: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        self.points.append(samples.double())
        self.labels.append(labels_of(self.law, prompts))

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


class PointMetric(LawMetric):
    """A metric of points against a mixture."""

    backbones = ("gaussian_mixture",)
    law: Mixture
