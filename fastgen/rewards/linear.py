"""A linear reward on points, which tilts a mixture of Gaussians in closed form."""

from collections.abc import Sequence

from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.backbones.base import BackboneConfig
from fastgen.rewards.base import CONFIG, Reward


@dataclass(frozen=True, config=CONFIG)
class Linear(Reward):
    """r(x) = a^T x, with a the `direction`, [D]. exp(r / beta) moves the mean of N(m, S) to m + S a / beta."""

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
    """Raises ValueError if a field has not one number for each coordinate of the mixture's points."""
    if config.num_dims not in (None, len(values)):
        raise ValueError(f"{name} has {len(values)} numbers, and the points of the mixture {config.num_dims}")
