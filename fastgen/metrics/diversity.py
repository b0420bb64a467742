"""How different are the samples of one prompt from each other?"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.metrics.base import Directions, Metric, MetricContext

MAX_PER_PROMPT = 500


class Diversity(Metric):
    """Mean Euclidean distance between the features of two different samples of one prompt:

        mean over prompts of  2 / (n (n - 1)) sum_{i < j} |f_i - f_j|

    The mean over pairs is unbiased. Only the first 500 samples of a prompt count. Prompts with a single sample are
    left out; compute raises ValueError if no prompt remains. A student that lost modes scores below its teacher. So
    does one whose samples are merely cleaner, so read diversity together with recall."""

    name = "diversity"
    output = "pixels"
    directions: ClassVar[Directions] = {"diversity": "higher"}
    compares_within_prompts = True
    reads_prompts = True

    def __init__(self, context: MetricContext):
        super().__init__(context)
        self.features = self.need_features()
        self.kept: defaultdict[str, list[Tensor]] = defaultdict(list)

    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        self._keep(self.features(samples), prompts)

    def _keep(self, features: Tensor, prompts: Sequence[str]) -> None:
        for feature, prompt in zip(features, prompts, strict=True):
            if len(self.kept[prompt]) < MAX_PER_PROMPT:
                self.kept[prompt].append(feature)

    def state(self) -> dict[str, Tensor]:
        rows = [row for kept in self.kept.values() for row in kept]
        return {"features": torch.stack(rows) if rows else torch.zeros(0, 0)}

    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        """The rows are grouped by prompt, in the order in which the prompts first appear."""
        start = 0
        for prompt, count in Counter(prompts).items():
            stop = start + min(count, MAX_PER_PROMPT)
            self._keep(state["features"][start:stop], [prompt] * (stop - start))
            start = stop

    def compute(self) -> dict[str, float]:
        groups = [torch.stack(rows).double() for rows in self.kept.values() if len(rows) > 1]
        if not groups:
            raise ValueError("diversity needs a prompt with two samples; leave it out, or give fewer prompts")
        return {"diversity": float(torch.stack([torch.pdist(rows).mean() for rows in groups]).mean())}
