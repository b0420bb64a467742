"""Data of the small built-in teachers: handwritten digits, and exact samples of Gaussian mixtures and AR(1) videos."""

from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import noise
from fastgen.backbones.ar1_law import AR1Law
from fastgen.backbones.base import Backbone
from fastgen.data.base import DataSource, Stream
from fastgen.data.pairs import PairSettings, pair_noise
from fastgen.data.readers import READERS
from fastgen.data.samples import Samples, SampleSource, SampleStream
from fastgen.registry import MOST_STEPS


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DigitsData(SampleSource):
    """The training two thirds of scikit-learn's handwritten digits, 32 x 32 pixels, each with all four prompt
    wordings.
    pairs: ODE pairs of the teacher, which every run samples when it first needs them."""

    name: Literal["digits"] = "digits"
    pairs: PairSettings | None = None

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"latents", "pixels"} | ({"pairs"} if self.pairs else set()))

    def open(self, backbone: Backbone, seed: int, unit: int = 1, readers: int = READERS) -> Stream:
        samples, pairs = self.samples(backbone), None
        if self.pairs is not None:
            from fastgen.data.pair_sampling import made_pairs  # imports diffusers

            pairs = made_pairs(self.pairs, samples.prompts, backbone)
        return SampleStream(samples, backbone, noise.make_key(seed, "data"), pairs)

    def samples(self, backbone: Backbone) -> Samples:
        from fastgen.data.digits import PROMPTS, load_digits, prompt_for

        pixels, labels = load_digits("train")
        prompts = [prompt_for(int(label), wording) for label in labels for wording in range(len(PROMPTS))]
        return Samples(prompts, torch.arange(len(labels)).repeat_interleave(len(PROMPTS)), pixels.__getitem__)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class MixtureData(DataSource):
    """Data for the gaussian_mixture backbone: class labels drawn in proportion to their weights, exact samples of the
    mixture, and ODE pairs of the exact teacher, which are made for each batch. pair_steps, pair_guidance_scale:
    settings of the ODE sampler."""

    name: Literal["mixture"] = "mixture"
    pair_steps: int = Field(default=50, ge=1, le=MOST_STEPS)
    pair_guidance_scale: float = Field(default=1.0, ge=0)

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"latents", "pairs"})

    def check(self, backbone: Any) -> None:
        if backbone.name != "gaussian_mixture":
            raise ValueError(f"mixture data needs the gaussian_mixture backbone, not {backbone.name}")

    def open(self, backbone: Backbone, seed: int, unit: int = 1, readers: int = READERS) -> Stream:
        return MixtureStream(backbone, noise.make_key(seed, "data"), self)


class MixtureStream(Stream):
    def __init__(self, backbone: Any, key: int, data: MixtureData):
        self._backbone, self._data = backbone, data
        self._mixture, self._key, self._classes = backbone.law, key, backbone.config.classes
        self._num_classes, self._weights = backbone.num_classes, backbone.config.weights

    def labels(self, positions: Tensor) -> Tensor:
        """The class of each position. If there are no classes, it is 0, the label of the empty prompt."""
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

    def pairs(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        key = noise.make_key(self._key, "pairs")
        x0 = self._teacher.latents(self.prompts(positions), positions.tolist(), key)
        return pair_noise(self._backbone, positions, key), x0

    @cached_property
    def _teacher(self) -> Any:
        from fastgen.sampling.sampler import teacher_sampler  # imports diffusers

        return teacher_sampler(self._backbone, self._data.pair_steps, self._data.pair_guidance_scale)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AR1Data(DataSource):
    """Data for the ar1_video backbone: labels in equal shares, exact videos of each, and exact ODE pairs.

    pairs: whose ODE they are of. bidirectional: the teacher's, over the whole video at once. causal: of each frame
    given the frames before it (Causal Forcing, arXiv 2602.02214), which a causal student can follow exactly."""

    name: Literal["ar1_video"] = "ar1_video"
    pairs: Literal["bidirectional", "causal"] = "causal"

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"latents", "pairs"})

    def check(self, backbone: Any) -> None:
        if backbone.name != "ar1_video":
            raise ValueError(f"ar1_video data needs the ar1_video backbone, not {backbone.name}")

    def open(self, backbone: Backbone, seed: int, unit: int = 1, readers: int = READERS) -> Stream:
        return AR1Stream(backbone.law, noise.make_key(seed, "data"), self.pairs == "causal")


class AR1Stream(Stream):
    def __init__(self, law: AR1Law, key: int, causal: bool):
        self._law, self._key, self._causal = law, key, causal

    def labels(self, positions: Tensor) -> Tensor:
        u = noise.uniform(positions, (), noise.make_key(self._key, "label"), torch.float64)
        return (u * self._law.num_labels).long()

    def prompts(self, positions: Tensor) -> list[str]:
        return [str(label) for label in self.labels(positions).tolist()]

    def latents(self, positions: Tensor) -> Tensor:
        return self._law.sample(positions, self.labels(positions), self._key)

    def pairs(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._law.pair(positions, self.labels(positions), self._key, self._causal)


def exact_data(backbone: Backbone) -> DataSource:
    """The data source of a backbone whose law is known."""
    return AR1Data() if isinstance(backbone.law, AR1Law) else MixtureData()
