"""Small networks on points, behind the contract: the students and fake scores of the mixture backbone."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.inner_flow import Fusion, integrate, told
from fastgen.modules.segment_flow import Line, Mixture, Segment, SegmentHead, ends, handing, result
from fastgen.policy import InnerFlow, SegmentFlow
from fastgen.schedule import Schedule


class TimeEmbedding(nn.Module):
    """Sines and cosines of the timestep, at frequencies from pi / 2 to `fastest` pi, then two linear layers:
    [B] -> [B, width]."""

    def __init__(self, width: int, fastest: float, frequencies: int = 16):
        super().__init__()
        octaves = torch.linspace(-1, math.log2(fastest), frequencies)
        self.frequencies = nn.Buffer(math.pi * 2.0**octaves, persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        angle = timestep[:, None] / 1000 * self.frequencies.to(timestep.dtype)
        return self.layers(torch.cat([angle.sin(), angle.cos()], dim=1))


class PointMLP(nn.Module):
    """A residual MLP on points [B, D] that predicts x0. Time and label are added in every block.

    It is preconditioned like EDM's networks (arXiv 2206.00364 Table 1, for flow matching). With d the mixture's spread
    and v = alpha^2 d^2 + sigma^2:   x0 = (alpha d^2 / v) x + (sigma d / sqrt(v)) F(x / sqrt(v), t)."""

    def __init__(self, dim: int, labels: int, width: int, depth: int, spread: float, time_frequency: float = 32.0):
        super().__init__()
        self.spread = spread
        self.time: nn.Module = TimeEmbedding(width, time_frequency)
        self.label = nn.Embedding(labels, width)
        self.inlet = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.outlet = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, dim))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        skip, size, scale = self.scales(timestep)
        h = self.through(self.inlet(x / size), self.time(timestep) + self.label(label), slice(None))
        return skip * x + scale * self.outlet(h)

    def scales(self, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 1] each: the factor of x, the size of x, and the factor of F."""
        sigma = (timestep if timestep.dim() == 1 else timestep[:, 0])[:, None] / 1000
        alpha = 1 - sigma
        variance = (alpha * self.spread) ** 2 + sigma**2
        size = variance.sqrt()
        return alpha * self.spread**2 / variance, size, sigma * self.spread / size

    def through(self, h: Tensor, condition: Tensor, part: slice) -> Tensor:
        """h [B, width] after some of the blocks."""
        for block in self.blocks[part]:
            h = h + block(h + condition)
        return h


class InnerFlowMLP(PointMLP):
    """A PointMLP whose last blocks are the head of an inner flow (`modules.inner_flow`)."""

    def __init__(self, network: PointMLP, flow: InnerFlow):
        """Shares the weights of `network`."""
        nn.Module.__init__(self)
        self.spread, self.flow = network.spread, flow
        for name, module in network.named_children():
            setattr(self, name, module)
        self.fusion = Fusion(network.inlet.out_features).beside(network.inlet.weight)

    def forward(  # type: ignore[override]
        self, x: Tensor, timestep: Tensor, label: Tensor, noise: Tensor, place: Tensor | None = None
    ) -> Tensor:
        (skip, size, scale), condition = self.scales(timestep), self.time(timestep) + self.label(label)
        split = len(self.blocks) - self.flow.blocks
        features = self.through(self.inlet(x / size), condition, slice(0, split))

        def head(y: Tensor, s: Tensor, r: Tensor) -> Tensor:
            h = self.fusion(features, self.inlet(y.to(x.dtype) / self.spread), s, r)
            return skip * x + scale * self.outlet(self.through(h, condition, slice(split, None)))

        return integrate(head, noise, self.flow.levels) if place is None else head(noise, *place.unbind(-1))


class SegmentFlowMLP(PointMLP):
    """A PointMLP that predicts the flow of whole segments between the levels of a sampler (`modules.segment_flow`)."""

    def __init__(self, network: PointMLP, flow: SegmentFlow, levels: Sequence[float]):
        """Shares the weights of `network`."""
        nn.Module.__init__(self)
        self.spread, self.flow, self.levels = network.spread, flow, tuple(levels)
        for name, module in network.named_children():
            setattr(self, name, module)
        last: Any = network.outlet[-1]
        self.segment_head = SegmentHead(last.in_features, last.out_features, flow).begin(last)

    def forward(  # type: ignore[override]
        self, x: Tensor, timestep: Tensor, label: Tensor, handed: list[Segment] | None = None
    ) -> Tensor:
        (skip, size, scale), condition = self.scales(timestep), self.time(timestep) + self.label(label)
        h = self.outlet[:-1](self.through(self.inlet(x / size), condition, slice(None)))
        head, (top, bottom) = self.segment_head, (timestep / 1000, ends(timestep / 1000, self.levels))
        rest = head.more(h).unflatten(1, (-1, x.shape[1]))
        points = (skip * x)[:, None] + scale[:, None] * torch.cat([self.outlet[-1](h)[:, None], rest], dim=1)
        if self.flow.kind == "line":
            return result(Line(top, bottom, points), x, self.flow.substeps, handed)
        weights, log_std = head.weights(h).log_softmax(1)[:, :, None], (head.log_std(h) + top.log()[:, None])[:, None]
        return result(Mixture(top, bottom, x, points, weights, log_std), x, self.flow.substeps, handed)


class PointDenoiser(Denoiser):
    """A PointMLP behind the contract; its features are the outputs of its blocks."""

    network: PointMLP

    def __init__(self, network: PointMLP, schedule: Schedule):
        super().__init__(network, schedule, "sample")
        self.feature_dim = network.inlet.out_features

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        more = told(inputs.inner, inputs.inner_levels) | handing(inputs.segment)
        return self.network(x_t, self.timestep(t, inputs), cond["label"], **more)

    def add_inner_flow(self, flow: InnerFlow) -> None:
        self.network = InnerFlowMLP(self.network, flow)

    def add_segment_flow(self, flow: SegmentFlow, levels: Sequence[float]) -> None:
        self.network = SegmentFlowMLP(self.network, flow, levels)

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.time = module

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        return list(self.network.blocks)
