"""The coarse branch of video sparse attention (VSA, arXiv 2505.13389): attention between tile means, gated.

    P = softmax(mean_q mean_k^T scale),    out = gate * repeat(P mean_v) + sparse,  sparse over the top k tiles of P

The selection has no gradient. Queries and keys also get gradient through P, and the gate decides how much P counts.
"""

import torch
from torch import Tensor, nn

from fastgen.ops.block_sparse_attention.selection import pool, pooled_scores
from fastgen.ops.block_sparse_attention.tiles import Tiles, tile_of_token
from fastgen.streaming.precision import uncast


def coarse_attention(
    query: Tensor, key: Tensor, value: Tensor, q_tiles: Tiles, k_tiles: Tiles, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """query, key, value: [B, L, H, D]. Returns the coarse output [B, Lq, H, D] in the query's dtype, 0 for rows in no
    tile, and the scores [B, H, q, k], which a selection may use. Both carry gradient."""
    scores = pooled_scores(query, key, q_tiles, k_tiles, scale)
    with uncast(query):
        means = scores.softmax(-1) @ pool(value, k_tiles)
    padded = torch.nn.functional.pad(means, (0, 0, 0, 1))  # an extra tile for rows in no tile
    out = padded[:, :, tile_of_token(q_tiles, query.device)].transpose(1, 2)
    return out.to(query.dtype), scores


class CoarseGate(nn.Module):
    """The gate of the coarse branch, a linear function of each token. It starts at 0, so that the model starts with
    the sparse branch alone. This departs from VSA's own code, which initialises it like any linear layer."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, heads * head_dim)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, hidden_states: Tensor, coarse: Tensor) -> Tensor:
        """hidden_states: [B, L, width].  coarse: [B, L, H, D]. Returns gate * coarse."""
        return self.project(hidden_states).unflatten(-1, (self.heads, -1)) * coarse
