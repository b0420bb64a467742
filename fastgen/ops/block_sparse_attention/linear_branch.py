"""The linear-attention branch that is added to a sparse one (SLA, arXiv 2509.24006; Hybrid Forcing's evicted past).

    S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j),   out_i = phi(q_i) S / (phi(q_i) . z + eps)

A zero-initialised projection of the head dimension follows, so that at the start the sum is exactly the sparse output.
The branch is added, not merged by lse, because the two parts do not share a normaliser.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

FeatureMap = Literal["softmax", "relu"]


class LinearState(NamedTuple):
    """products: S above, [B, H, D, D].  keys: z, [B, H, D]. Both are sums over keys: states of disjoint keys add."""

    products: Tensor
    keys: Tensor

    def __add__(self, other: "LinearState") -> "LinearState":  # type: ignore[override]
        return LinearState(self.products + other.products, self.keys + other.keys)


def feature_map(tokens: Tensor, kind: FeatureMap) -> Tensor:
    """phi, not negative: softmax over the head dimension (SLA) or ReLU, in float32 (float64 for float64)."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return wide.softmax(-1) if kind == "softmax" else wide.relu()


def linear_state(key: Tensor, value: Tensor, kind: FeatureMap = "softmax") -> LinearState:
    """key, value: [B, L, H, D]. Returns the state of these keys, which does not depend on their order."""
    features = feature_map(key, kind)
    return LinearState(torch.einsum("blhd,blhe->bhde", features, value.to(features.dtype)), features.sum(1))


def linear_attention(query: Tensor, state: LinearState, kind: FeatureMap = "softmax", eps: float = 1e-6) -> Tensor:
    """query: [B, L, H, D]. Returns the same shape, in the state's dtype."""
    features = feature_map(query, kind)
    total = torch.einsum("blhd,bhd->blh", features, state.keys)
    return torch.einsum("blhd,bhde->blhe", features, state.products) / (total + eps)[..., None]


class LinearBranch(nn.Module):
    """Linear attention over all given keys, then one zero-initialised projection of the head dimension."""

    def __init__(self, head_dim: int, kind: FeatureMap = "softmax") -> None:
        super().__init__()
        self.kind: FeatureMap = kind
        self.project = nn.Linear(head_dim, head_dim, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(self, query: Tensor, state: LinearState) -> Tensor:
        """query: [B, L, H, D]. Returns what to add to the sparse output, in the query's dtype."""
        return self.project(linear_attention(query, state, self.kind).to(query.dtype))
