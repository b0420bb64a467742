"""Students that predict a flow for every level down to their next call (pi-Flow, arXiv 2510.14974).

    paper             here                    what it is
    policy pi(x, t)   Segment.velocity        the velocity of the student's flow at every (x, t) of a segment
    t_src, t_dst      top, bottom             the levels at which a segment begins, by a call of the network, and ends
    DX policy         Line                    clean predictions at N levels of the segment
    GMFlow policy     Mixture                 a Gaussian mixture of what x_top may come from
    network-free ODE  follow(...)             the flow from one level to another, without a call of the network

A usual student predicts one x0 of x_top, and its step is a straight line. Here the same call predicts a whole segment,
which a clean prediction at every level gives for flow matching:   dx/dt = (x - x0(x, t)) / t.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.policy import SegmentFlow
from fastgen.schedule import expand

FIRST_LOG_STD = -2.0  # of the components' velocities, before anything is learned; ours
FIRST_SPREAD = 0.1  # of the components' means around the pretrained prediction, which alone would stay one; ours


@dataclass(frozen=True)
class Segment(ABC):
    """What a network predicts of x_top [B, ...] at the levels `top` [B], for those down to `bottom` [B]."""

    top: Tensor
    bottom: Tensor

    @abstractmethod
    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        """The clean prediction at x [B, ...] and level t [B], between bottom and top and above 0."""

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """(x - x0(x, t)) / t"""
        return (x - self.x0(x, t)) / expand(t, x)

    def detached(self) -> "Segment":
        """The same without gradient."""
        return replace(self, **{k: v.detach() for k, v in vars(self).items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class Line(Segment):
    """points: [B, N, ...], clean predictions at N >= 2 levels that divide the segment evenly, the first one at its
    top. Between them x0 is linear in t, and it is the same for every x."""

    points: Tensor

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        last = self.points.shape[1] - 1
        place = ((self.top - t) / (self.top - self.bottom) * last).clamp(0, last)
        before = place.floor().clamp(max=last - 1).long()
        rows = torch.arange(len(t), device=t.device)
        here, there = self.points[rows, before], self.points[rows, before + 1]
        return torch.lerp(here, there, expand(place - before, here).to(here.dtype))


@dataclass(frozen=True)
class Mixture(Segment):
    """The law of x0 given x_top, at every place a mixture of K Gaussians, and so that of x0 given a later x_t:

        p(x0 | x_t) ~ p(x0 | x_top) exp(nu x0 - zeta x0^2 / 2)
        zeta = ((1 - t) / t)^2 - ((1 - t_top) / t_top)^2,   nu = (1 - t) x_t / t^2 - (1 - t_top) x_top / t_top^2

    with x0 its mean. If p(x0 | x_top) is exact, so is the velocity at every x_t below it.

    x_top: [B, C, ...]. means: [B, K, C, ...]. log_weights: [B, K, 1, ...]. log_std: [B, 1, 1, ...], of all components.
    The channels C of one place belong to one vector; places are independent."""

    x_top: Tensor
    means: Tensor
    log_weights: Tensor
    log_std: Tensor

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        (t, x), (top, x_top) = (expand(t, x), x), (expand(self.top, x), self.x_top)
        zeta = (((1 - t) / t).square() - ((1 - top) / top).square())[:, None]
        nu = ((1 - t) * x / t**2 - (1 - top) * x_top / top**2)[:, None]
        variance = (2 * self.log_std).exp()
        shrink = 1 / (1 + variance * zeta)
        gain = (self.means * (nu - zeta * self.means / 2)).sum(2, keepdim=True) * shrink
        weights = (self.log_weights + gain).softmax(1)
        return (weights * (self.means + variance * nu) * shrink).sum(1)

    def without(self, dropped: Tensor) -> "Mixture":
        """Without some of the components. dropped: [B, K] bool; where all are, none is."""
        dropped = dropped & ~dropped.all(1, keepdim=True)
        hidden = dropped.reshape(dropped.shape + (1,) * (self.log_weights.dim() - 2))
        return replace(self, log_weights=self.log_weights.masked_fill(hidden, -torch.inf))


def follow(segment: Segment, x: Tensor, t: Tensor, s: Tensor, substeps: int) -> Tensor:
    """The flow of a segment from x [B, ...] at level t [B] to the lower level s [B], by equal substeps

        x_{t'} = (t' / t) x_t + (1 - t' / t) x0,

    with the x0 in the middle of each, at the state where its x0 at t leads. (The paper takes the latter, in 128
    substeps.) The error falls with the square of their number. In at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    for i in range(substeps):
        here, middle, there = (t + (s - t) * (k / substeps) for k in (i, i + 0.5, i + 1))
        halfway = moved(x, segment.x0(x, here), here, middle)
        x = moved(x, segment.x0(halfway, middle), here, there)
    return x


def moved(x: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The straight step from x [B, ...] at level t [B] to the lower level s [B]."""
    return torch.lerp(x0, x, expand(s / t, x))


def ends(t: Tensor, levels: Sequence[float]) -> Tensor:
    """[B]: the level at which the segment that begins at t [B] ends: the one after the nearest of the sampler's
    levels, or 0 after the last."""
    table = t.new_tensor((*levels, 0.0))
    return table[1:][(t[:, None] - table[:-1]).abs().argmin(1)]


def followed(segment: Segment, x_top: Tensor, substeps: int) -> Tensor:
    """The one clean prediction [B, ...] by which an ode step from x_top lands where the segment's flow ends."""
    ratio = expand(segment.bottom / segment.top, x_top)
    return (follow(segment, x_top, segment.top, segment.bottom, substeps) - ratio * x_top) / (1 - ratio)


class SegmentHead(nn.Module):
    """What a network's last layer gives besides its usual prediction, from the same input [..., width]: the other
    predictions, and for a mixture the logits of its weights and the logarithm of the standard deviation over the
    level, which is that of a velocity. outlet: the numbers of the usual prediction in one token.
    places: how many of them are independent of each other."""

    def __init__(self, width: int, outlet: int, flow: SegmentFlow, places: int = 1):
        super().__init__()
        self.more = nn.Linear(width, (flow.size - 1) * outlet)
        if flow.kind == "mixture":
            self.weights, self.log_std = nn.Linear(width, flow.size * places), nn.Linear(width, places)

    def begin(self, outlet: nn.Linear) -> "SegmentHead":
        """Itself, with predictions that are those of the network's last layer, and for a mixture lie a little beside
        them. A network with it then makes the steps that it made before, or nearly so."""
        self.to(device=outlet.weight.device, dtype=outlet.weight.dtype)
        count = self.more.out_features // outlet.out_features
        with torch.no_grad():
            self.more.weight.copy_(outlet.weight.repeat(count, 1))
            self.more.bias.copy_(outlet.bias.repeat(count))
            if hasattr(self, "weights"):
                draw = torch.randn(self.more.bias.shape, generator=torch.Generator().manual_seed(0))
                self.more.bias.add_((FIRST_SPREAD * draw).to(self.more.bias))
                for layer, bias in ((self.weights, 0.0), (self.log_std, FIRST_LOG_STD)):
                    nn.init.zeros_(layer.weight)
                    nn.init.constant_(layer.bias, bias)
        return self


def handing(segments: list[Segment] | None) -> dict[str, Any]:
    """The argument of a network that predicts segments: `handed`, to which it appends the one that it predicts, in the
    place of following it. {} for any other call."""
    return {} if segments is None else {"handed": segments}


def result(segment: Segment, x_top: Tensor, substeps: int, handed: list[Segment] | None) -> Tensor:
    """What the network returns: the clean prediction of the whole step; or, if the segment is handed out, that at its
    top."""
    if handed is None:
        return followed(segment, x_top, substeps)
    handed.append(segment)
    return segment.x0(x_top, segment.top)
