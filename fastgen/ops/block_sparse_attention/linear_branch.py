"""The linear-attention branch that is added to a sparse one (SLA, arXiv 2509.24006; Hybrid Forcing's evicted past).

The mathematics is `streaming.linear_state`. A zero-initialised projection of the head dimension follows, so that at
the start the sum is exactly the sparse output. The branch is added, not merged by lse, because the two parts do not
share a normaliser.
"""

from torch import Tensor, nn

from fastgen.streaming.linear_state import FeatureMap, LinearState, linear_attention, linear_state

__all__ = ["LinearBranch", "LinearState", "linear_attention", "linear_state"]


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
