"""The shipped digits, and exact samples of a mixture."""

from typing import Any, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone
from fastgen.data.base import DataSource, Samples, SampleSource, Stream


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DigitsData(SampleSource):
    """scikit-learn's handwritten digits, the training two thirds, each in all four wordings; 32 pixels a side."""

    name: Literal["digits"] = "digits"

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"latents", "pixels"})

    def samples(self, backbone: Backbone) -> Samples:
        from fastgen.digits import PROMPTS, load_digits, prompt_for

        pixels, labels = load_digits("train")
        prompts = [prompt_for(int(label), wording) for label in labels for wording in range(len(PROMPTS))]
        return Samples(prompts, torch.arange(len(labels)).repeat_interleave(len(PROMPTS)), pixels.__getitem__)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MixtureData(DataSource):
    """Class labels drawn by their weight, and exact samples of the mixture, for the gaussian_mixture backbone."""

    name: Literal["mixture"] = "mixture"

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"latents"})

    def check(self, backbone: Any) -> None:
        if backbone.name != "gaussian_mixture":
            raise ValueError(f"mixture data needs the gaussian_mixture backbone, not {backbone.name}")

    def open(self, backbone: Backbone, seed: int) -> Stream:
        return MixtureStream(backbone, noise.make_key(seed, "data"))


class MixtureStream(Stream):
    def __init__(self, backbone: Any, key: int):
        self._mixture, self._key, self._classes = backbone.mixture, key, backbone.config.classes
        self._num_classes, self._weights = backbone.num_classes, backbone.config.weights

    def labels(self, positions: Tensor) -> Tensor:
        """The class of each position; the label of the empty prompt when there are no classes."""
        if not self._classes:
            return torch.zeros_like(positions)
        weights = torch.tensor(self._weights or (1.0,) * len(self._classes), dtype=torch.float64)
        share = torch.zeros(self._num_classes, dtype=torch.float64).index_add_(0, torch.tensor(self._classes), weights)
        u = noise.uniform(positions, (), noise.make_key(self._key, "label"), torch.float64)
        return torch.bucketize(u, (share / share.sum()).cumsum(0)).clamp(max=self._num_classes - 1)

    def prompts(self, positions: Tensor) -> list[str]:
        return [str(c) for c in self.labels(positions).tolist()] if self._classes else [""] * len(positions)

    def latents(self, positions: Tensor) -> Tensor:
        return self._mixture.sample(positions, self.labels(positions), self._key)
