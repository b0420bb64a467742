"""The result of attention over a set of keys, and how results over disjoint sets are merged."""

from typing import NamedTuple

import torch
from torch import Tensor


class Result(NamedTuple):
    """out: [B, Lq, H, D], 0 where a query sees no key.
    lse: [B, H, Lq] float32 (float64 for float64 inputs), the natural logarithm of the sum of exp(logits), -inf where a
    query sees no key; None from a backend that cannot compute it. Both carry gradient."""

    out: Tensor
    lse: Tensor | None


def merge(first: Result, second: Result) -> Result:
    """Attention over the union of two disjoint sets of keys, from the results over each.

        lse = log(exp(lse1) + exp(lse2)),    out = out1 exp(lse1 - lse) + out2 exp(lse2 - lse)

    Gradients flow through both outputs and both lse, even where one or both of the sets are empty.
    Raises ValueError if a result has no lse."""
    if first.lse is None or second.lse is None:
        raise ValueError("merging needs the lse of both results; call attention with needs_lse=True")
    largest = torch.maximum(first.lse, second.lse).detach()
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weight1, weight2 = (first.lse - largest).exp(), (second.lse - largest).exp()
    total = weight1 + weight2
    seen = total > 0
    safe = torch.where(seen, total, 1.0)
    lse = torch.where(seen, largest + safe.log(), -torch.inf)
    out = first.out * _to_tokens(weight1 / safe) + second.out * _to_tokens(weight2 / safe)
    return Result(out.to(first.out.dtype), lse)


def _to_tokens(weight: Tensor) -> Tensor:
    """[B, H, L] -> [B, L, H, 1]."""
    return weight.transpose(1, 2)[..., None]
