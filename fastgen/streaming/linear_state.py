"""Linear attention over keys that are summed into a state of one size (SLA, arXiv 2509.24006; Hybrid Forcing).

S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j),   out_i = phi(q_i) S / (phi(q_i) . z + eps)

Sums are in float32 (float64 for float64), under autocast, too, so that training reads what sampling reads.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastgen.streaming.precision import uncast

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
    with uncast(key):
        features = feature_map(key, kind)
        return LinearState(torch.einsum("blhd,blhe->bhde", features, value.to(features.dtype)), features.sum(1))


def linear_attention(query: Tensor, state: LinearState, kind: FeatureMap = "softmax", eps: float = 1e-6) -> Tensor:
    """query: [B, L, H, D]. Returns the same shape, in at least float32."""
    with uncast(query):
        features = feature_map(query, kind)
        products, keys = (part.to(features.dtype) for part in state)
        total = torch.einsum("blhd,bhd->blh", features, keys)
        return torch.einsum("blhd,bhde->blhe", features, products) / (total + eps)[..., None]
