"""What the TrigFlow codes call: a flow-matching network of ours as F(x, a), dx/da for latents of unit std."""

import torch
from torch import Tensor


def expanded(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(-1, *(1,) * (x.dim() - 1))


def flow_state(x: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The flow-matching state [B, ...] and level [B] of a TrigFlow state at angle [B]."""
    size = torch.cos(angle) + torch.sin(angle)
    return x / expanded(size, x), torch.sin(angle) / size


def trig_velocity(network, x: Tensor, angle: Tensor, cond: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """F = cos a noise - sin a x0, where x0 and noise are what the flow network's velocity implies."""
    x_flow, t = flow_state(x, angle)
    v = network(x_flow, t, cond)
    x0, noise = x_flow - expanded(t, x) * v, x_flow + expanded(1 - t, x) * v
    return expanded(torch.cos(angle), x) * noise - expanded(torch.sin(angle), x) * x0
