"""An inner flow: a network whose last blocks run several times for one call of the others (TMD, arXiv 2601.09881).

    paper                here                  what it is
    main backbone, m     trunk, features       the first blocks, called once at (x_t, t)
    flow head            head                  the last `blocks` of the network, called once for each level
    y, y_1, y_s          target, noise, y      what the network predicts of x_t, noise, and their mixture at level s

Given x_t, the clean sample is uncertain, and so is what the network is to predict of it, y: x0, or noise - x0. A usual
network predicts the mean. Here the head carries noise y_1 to a draw of y, along the flow of the mixtures

    y_s = (1 - s) y + s y_1,    u(y_s, s, r) = (y_s - h(y_s, s, r)) / s
    y_r = y_s - (s - r) u = (r / s) y_s + (1 - r / s) h(y_s, s, r)

h is what the head returns and u the average velocity of this flow over [r, s]. At s = r, h is E[y | y_s, x_t].

Departure (derived). The paper writes u = y_1 - h, with the draw y_1 that the flow began with. Then the identity of the
average velocity is not that of the flow, because E[y_1 | y_s] is not y_1 below s = 1: for y ~ N(0, 1) the best head
makes samples whose standard deviation is 0.62 in one inner step, and 0.50 in many. With (y_s - h) / s it is 1 in any
number. At s = 1 both are the same, so that a head that ignores y and s, as a pretrained one does, is the same start.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.modules.inputs import LevelInput
from fastgen.schedule import expand

Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # h(y_s, s, r)


def integrate(head: Head, noise: Tensor, levels: Sequence[float]) -> Tensor:
    """y_0 [B, ...] from y_1 = noise, by one call of the head from each level to the next and from the last one to 0.
    levels: decreasing from 1. In at least float32; gradient flows through all calls."""
    y = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for s, r in itertools.pairwise((*levels, 0.0)):
        here, there = (y.new_full((len(y),), level) for level in (s, r))
        y = (r / s) * y + (1 - r / s) * head(y, here, there).to(y.dtype)
    return y


def average_velocity(head: Head) -> Head:
    """The u(y, s, r) of a head. s: [B], above 0."""
    return lambda y, s, r: (y - head(y, s, r)) / expand(s, y)


class Fusion(nn.Module):
    """What the head's first block gets: features + W tokens + levels(s, s - r), which starts at the features alone.

    The paper's fusion is a gate that starts at zero, too; this form is ours. features, tokens: [B, N, width] or
    [B, width], those of the trunk and of y. s, r: [B]."""

    def __init__(self, width: int):
        super().__init__()
        self.tokens = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.tokens.weight)
        self.levels = nn.ModuleDict({"s": LevelInput(width), "gap": LevelInput(width)})

    def forward(self, features: Tensor, tokens: Tensor, s: Tensor, r: Tensor) -> Tensor:
        told = self.levels["s"](s) + self.levels["gap"](s - r)
        told = told[:, None] if features.dim() == 3 else told
        return features + self.tokens(tokens) + told.to(features.dtype)

    def beside(self, like: Tensor) -> "Fusion":
        """Itself in the dtype and on the device of a network's weight; its zeros are never on the meta device."""
        return self.to(dtype=like.dtype, device=None if like.is_meta else like.device)


def told(state: Tensor | None, levels: Tensor | None) -> dict[str, Any]:
    """The arguments of a network with an inner flow: `noise`, from which it integrates, or y with the levels s and r
    ([B, 2]) of a single call of its head. {} for any other network."""
    return {} if state is None else {"noise": state, "place": levels}
