"""A quadratic reward on points. Its tilt of a mixture of Gaussians has a closed form."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.backbones.base import BackboneConfig
from fastgen.rewards.base import CONFIG, Reward
from fastgen.rewards.linear import check_dimension


@dataclass(frozen=True, config=CONFIG)
class Quadratic(Reward):
    """r(x) = -1/2 (x - c)^T Q (x - c), with c the `center` and Q = diag(curvature), [D] each.

    Tilting by exp(r / beta) turns N(m, S) into
    N((S^-1 + Q / beta)^-1 (S^-1 m + Q c / beta), (S^-1 + Q / beta)^-1)."""

    center: tuple[float, ...]
    curvature: tuple[Annotated[float, Field(ge=0)], ...]

    input = "points"
    differentiable = True
    reads_prompts = False

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        return -0.5 * (x - x.new_tensor(self.center)).square() @ x.new_tensor(self.curvature)

    def check(self, config: BackboneConfig) -> None:
        super().check(config)
        check_dimension(config, "center", self.center)
        check_dimension(config, "curvature", self.curvature)
