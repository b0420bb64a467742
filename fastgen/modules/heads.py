"""Small trained networks next to the denoisers: discriminator heads on captured features, a learned loss weight."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgen.modules.inputs import LevelInput


class TokenHeads(nn.Module):
    """Discriminator heads on features of several depths: logits [B, depths], one per depth.

    Each head is LayerNorm, Linear, SiLU, mean over tokens, Linear. This is DMD2's small head on the fake score's
    features (arXiv 2405.14867 Sec. 4.3), for token networks. The layer sizes are ours."""

    def __init__(self, feature_dim: int, depths: int, hidden: int = 64):
        super().__init__()
        self.inner = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, hidden), nn.SiLU()) for _ in range(depths)
        )
        self.outer = nn.ModuleList(nn.Linear(hidden, 1) for _ in range(depths))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        logits = [outer(inner(f).mean(1)) for f, inner, outer in zip(features, self.inner, self.outer, strict=True)]
        return torch.cat(logits, dim=1)


class ProductHeads(nn.Module):
    """Heads on features of several depths: LayerNorm, the product of two Linear maps, mean over tokens, Linear."""

    def __init__(self, feature_dim: int, depths: int, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(feature_dim) for _ in range(depths))
        self.inner = nn.ModuleList(nn.Linear(feature_dim, 2 * width) for _ in range(depths))
        self.outer = nn.ModuleList(nn.Linear(width, 1) for _ in range(depths))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """features: one [B, N, feature_dim] tensor per depth. Returns logits [B, depths]."""
        logits = []
        for feature, norm, inner, outer in zip(features, self.norms, self.inner, self.outer, strict=True):
            one, other = inner(norm(feature)).chunk(2, dim=-1)
            logits.append(outer((one * other).mean(1)))
        return torch.cat(logits, dim=1)


class StopHeads(nn.Module):
    """Heads on features of several depths: one set of heads per stop of the rollout, or one set for all stops."""

    def __init__(self, feature_dim: int, depths: int, width: int, stops: int):
        super().__init__()
        self.heads = nn.ModuleList(ProductHeads(feature_dim, depths, width) for _ in range(stops))

    def forward(self, features: list[Tensor], stop: Tensor) -> Tensor:
        """features: one [B, N, feature_dim] tensor per depth; stop: [B]. Returns logits [B, depths]."""
        logits = torch.stack([heads(features) for heads in self.heads], dim=1)
        return logits[:, 0] if len(self.heads) == 1 else logits[torch.arange(len(stop), device=stop.device), stop]


class PictureHeads(nn.Module):
    """Token heads on features whose width differs by depth: logits [B, depths]."""

    def __init__(self, feature_dims: Sequence[int], width: int):
        super().__init__()
        self.heads = nn.ModuleList(TokenHeads(dim, 1, width) for dim in feature_dims)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head([f]) for head, f in zip(self.heads, features, strict=True)], dim=1)


class LevelWeight(nn.Module):
    """A learned log-weight w of a noise level: sines and a linear layer, [B] in [0, 1] -> [B]. It starts at zero.

    For sCM's adaptive weighting (arXiv 2410.11081 Sec. 4.2), whose loss is e^w square - w. At the optimum the weighted
    square is 1 at every level."""

    def __init__(self) -> None:
        super().__init__()
        self.waves, self.bias = LevelInput(1), nn.Parameter(torch.zeros(1))

    def forward(self, level: Tensor) -> Tensor:
        return (self.waves(level) + self.bias)[:, 0]
