"""How fast are samples made?"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.metrics.base import Directions, Metric, MetricContext


class Throughput(Metric):
    """images_per_second: the number of samples divided by the wall time of sampling and decoding. Their prompts are
    encoded before the clock starts: a backbone keeps them, and of several samplers the first would pay for all. (What
    a backbone does not keep is encoded again on the clock, for all alike: prompts that are read together with a
    picture.) The first batch, in which networks load and kernels are chosen, is left out if there are more; an
    evaluation of a single batch makes it twice. network_evaluations: network calls per sample."""

    name = "throughput"
    output = "any"
    directions: ClassVar[Directions] = {"images_per_second": "higher", "network_evaluations": "lower"}

    def __init__(self, context: MetricContext):
        super().__init__(context)
        if context.timing is None:
            raise ValueError("throughput measures a sampler, and a folder of images has none; leave it out")
        self.timing = context.timing

    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        """Nothing to do: the evaluation fills the timing."""

    def state(self) -> dict[str, Tensor]:
        return {"batches": torch.tensor(self.timing.batches, dtype=torch.float64).reshape(-1, 2)}

    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        self.timing.batches = [(int(count), seconds) for count, seconds in state["batches"].tolist()]

    def compute(self) -> dict[str, float]:
        batches = self.timing.batches[1:] or self.timing.batches
        if not batches:
            raise ValueError("throughput needs at least one batch")
        rate = sum(count for count, _ in batches) / sum(seconds for _, seconds in batches)
        return {"images_per_second": rate, "network_evaluations": float(self.timing.network_evaluations)}
