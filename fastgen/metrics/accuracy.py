"""Does the picture show the digit that the prompt asks for?"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.data.digits import label_of
from fastgen.metrics.base import Directions, Metric, MetricContext
from fastgen.metrics.features import DigitsFeatures, FeatureNetwork


class Accuracy(Metric):
    """Share of all samples, in [0, 1], that the shipped digits classifier assigns to the digit in their prompt.

    update raises ValueError for a prompt without a digit word."""

    name = "accuracy"
    output = "pixels"
    reads_prompts = True
    directions: ClassVar[Directions] = {"accuracy": "higher"}

    @classmethod
    def check_prompts(cls, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            label_of(prompt)

    def __init__(self, context: MetricContext):
        super().__init__(context)
        shared = context.features
        self.features = shared if shared is not None and shared.name == "digits" else FeatureNetwork("digits")
        self.right = self.count = 0

    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        network = self.features.network
        assert isinstance(network, DigitsFeatures)
        wanted = torch.tensor([label_of(prompt) for prompt in prompts])
        logits = network.classifier.head(self.features(samples).to(self.features.device)).cpu()
        self.right += int((logits.argmax(1) == wanted).sum())
        self.count += len(samples)

    def state(self) -> dict[str, Tensor]:
        return {"counts": torch.tensor([self.right, self.count])}

    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        self.right, self.count = state["counts"].tolist()

    def compute(self) -> dict[str, float]:
        if not self.count:
            raise ValueError("accuracy needs at least one sample")
        return {"accuracy": self.right / self.count}
