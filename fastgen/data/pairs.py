"""ODE pairs of the teacher: a noise, and where the teacher's own sampler takes it.

Pair i is a function of the settings, of i and of its prompt: the noise is drawn by i, and the teacher samples from it
as its stock pipeline does. `fastgen prepare --pairs` stores them. Of small teachers, data `digits` makes them when a
run first asks for one, and `mixture` at every batch."""

from collections.abc import Callable, Sequence

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone
from fastgen.data.order import shuffled


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class PairSettings:
    """What a finite number of pairs depends on beside the teacher. steps, guidance_scale: of its sampler. seed: of
    their noise, and of the order of their prompts."""

    count: int = Field(ge=1)
    steps: int = Field(default=50, ge=1)
    guidance_scale: float = Field(default=1.0, ge=0)
    seed: int = Field(default=0, ge=0)

    @property
    def key(self) -> int:
        return noise.make_key(self.seed, "pairs")  # not that of evaluations, whose noise no student has seen

    def samples(self, num_samples: int) -> Tensor:
        """The sample whose prompt pair i has: [count] int64. All samples have equally many, give or take one."""
        return shuffled(torch.arange(self.count), num_samples, self.key)


class Pairs:
    """A finite number of pairs. read: indices to x0 [B, *latent_shape]."""

    def __init__(
        self, settings: PairSettings, num_samples: int, backbone: Backbone, read: Callable[[Sequence[int]], Tensor]
    ):
        self.settings, self.sample_of = settings, settings.samples(num_samples)
        self._backbone, self._read = backbone, read

    def index(self, positions: Tensor, key: int) -> Tensor:
        """The pair of each sample position: every epoch has an order of its own."""
        return shuffled(positions, self.settings.count, key)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return pair_noise(self._backbone, index, self.settings.key), self._read(index.tolist())


def pair_noise(backbone: Backbone, ids: Tensor, key: int | str) -> Tensor:
    """The noise of pairs ids [B] int64: [B, *latent_shape] standard normal, on the backbone's device."""
    ids = ids.to(backbone.device)
    return noise.normal(ids, backbone.latent_shape, noise.make_key(key, "initial"), backbone.dtype)
