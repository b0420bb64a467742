"""ODE pairs of the teacher: a noise, and the sample that the teacher's own sampler makes from it.

Pair i is a function of the settings, of i and of its prompt. Its noise is drawn for index i, and the teacher samples
from that noise as its stock pipeline does. `fastgen prepare --pairs` stores pairs. Small teachers can also make them
during a run: data `digits` makes all pairs when the first one is needed, and data `mixture` makes those of each
batch."""

from collections.abc import Callable, Sequence

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone
from fastgen.data.order import shuffled
from fastgen.registry import MOST_SAMPLES, MOST_SEED, MOST_STEPS


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class PairSettings:
    """What a finite set of pairs depends on besides the teacher. steps, guidance_scale: settings of the teacher's
    sampler. seed: of the noise and of the assignment of prompts."""

    count: int = Field(ge=1, le=MOST_SAMPLES)
    steps: int = Field(default=50, ge=1, le=MOST_STEPS)
    guidance_scale: float = Field(default=1.0, ge=0)
    seed: int = Field(default=0, ge=0, le=MOST_SEED)

    @property
    def key(self) -> int:
        return noise.make_key(self.seed, "pairs")  # not the key of evaluations, whose noise students must not see

    def samples(self, num_samples: int) -> Tensor:
        """The index of the sample whose prompt pair i has: [count] int64. Each sample has the same number of pairs, up
        to one."""
        return shuffled(torch.arange(self.count), num_samples, self.key)


class Pairs:
    """A finite set of pairs. read: maps indices to x0 [B, *latent_shape]."""

    def __init__(
        self, settings: PairSettings, num_samples: int, backbone: Backbone, read: Callable[[Sequence[int]], Tensor]
    ):
        self.settings, self.sample_of = settings, settings.samples(num_samples)
        self._backbone, self._read = backbone, read

    def index(self, positions: Tensor, key: int) -> Tensor:
        """The index of the pair at each sample position. Each epoch has its own order."""
        return shuffled(positions, self.settings.count, key)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return pair_noise(self._backbone, index, self.settings.key), self._read(index.tolist())


def pair_noise(backbone: Backbone, ids: Tensor, key: int | str) -> Tensor:
    """The noise of the pairs `ids` [B] int64: standard normal [B, *latent_shape], on the backbone's device."""
    ids = ids.to(backbone.device)
    return noise.normal(ids, backbone.latent_shape, noise.make_key(key, "initial"), backbone.dtype)
