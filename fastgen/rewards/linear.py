"""A linear reward on points. Its tilt of a mixture of Gaussians has a closed form."""

from collections.abc import Sequence

from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.backbones.base import BackboneConfig
from fastgen.rewards.base import CONFIG, Reward


@dataclass(frozen=True, config=CONFIG)
class Linear(Reward):
    """r(x) = a^T x, with a the `direction`, [D]. Tilting N(m, S) by exp(r / beta) moves the mean to
    m + S a / beta."""

    direction: tuple[float, ...]

    input = "points"
    differentiable = True
    reads_prompts = False

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        return x @ x.new_tensor(self.direction)

    def check(self, config: BackboneConfig) -> None:
        super().check(config)
        check_dimension(config, "direction", self.direction)


def check_dimension(config: BackboneConfig, name: str, values: Sequence[float]) -> None:
    """Raises ValueError unless a field has one number for each coordinate of the mixture's points."""
    if config.num_dims not in (None, len(values)):
        raise ValueError(f"{name} has {len(values)} numbers, but the mixture's points have {config.num_dims}")
