"""What the codes with sigma as their time call: a denoiser of ours for data of standard deviation 0.5."""

from torch import Tensor
from trig_networks import expanded

SIGMA_DATA = 0.5


def denoised(network, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """D(x, sigma) of x = x0 + sigma noise, from the velocity of a flow network for data of std 1: x0 = x_t - t v."""
    t = sigma / (sigma + SIGMA_DATA)
    x_t = x * expanded(1 - t, x) / SIGMA_DATA
    return SIGMA_DATA * (x_t - expanded(t, x) * network(x_t, t, cond))
