"""A causal network for golden rows on videos, under fastgen's contract and as a plain call.

Each frame is denoised by GoldenNetwork, whose condition is the sample's plus the mean of the last frame before its
chunk: that of the clean video where one is given, otherwise that of the noisy one."""

import torch
from golden_rows import GoldenDenoiser, GoldenNetwork
from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.denoiser import Inputs
from fastgen.streaming.schedule import ChunkSchedule


def causal(network: GoldenNetwork, x_t: Tensor, t: Tensor, cond: Tensor, past: Tensor, frames: int) -> Tensor:
    """x_t, past: [B, F, 4, H, W]; t: [B, F]; cond: [B, 4]; frames: of a chunk. Returns [B, F, 4, H, W]."""
    means = past.flatten(3).mean(3)  # [B, F, 4]
    seen = [means[:, f // frames * frames - 1] if f >= frames else torch.zeros_like(cond) for f in range(x_t.shape[1])]
    condition = cond[:, None] + torch.stack(seen, dim=1)
    return network(x_t.flatten(0, 1), t.flatten(), condition.flatten(0, 1)).view_as(x_t)


class CausalGolden(GoldenDenoiser):
    takes_chunks = True

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        assert isinstance(inputs.causal, ChunkSchedule) and isinstance(self.network, GoldenNetwork)
        past = x_t if inputs.clean is None else inputs.clean
        return causal(self.network, x_t, t, cond["embedding"], past, inputs.causal.frames)
