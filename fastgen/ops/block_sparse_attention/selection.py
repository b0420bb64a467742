"""Layouts chosen by content: pooled scores, then the top k tiles or a cumulative mass, around a forced set.

Everything runs on the device of the scores without synchronising with the host. Ties go to the tile with the lower
index, so equal scores give equal layouts. A selection has no gradient: gradient reaches the pooled queries and keys
only through VSA's coarse branch.
"""

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.ops.block_sparse_attention.configs import MAX_COLUMNS, kernels_run_on
from fastgen.ops.block_sparse_attention.layout import BlockLayout
from fastgen.ops.block_sparse_attention.naive import softmax_scale
from fastgen.ops.block_sparse_attention.tiles import MAX_CAPACITY, Tiles, entries, tile_of_token
from fastgen.streaming.precision import uncast


def pool(tokens: Tensor, tiles: Tiles) -> Tensor:
    """[B, L, H, D] -> [B, H, len(tiles), D] float32 (float64 for float64): the mean of each tile's tokens.

    Differentiable and deterministic. Rows in no tile have no influence."""
    batch, _, heads, dim = tokens.shape
    wide = torch.promote_types(tokens.dtype, torch.float32)
    if tiles.is_uniform:
        padding = -tiles.num_tokens % tiles.capacity
        padded = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, padding))
        total = padded.view(batch, len(tiles), tiles.capacity, heads, dim).sum(2, dtype=wide)
    else:
        rows, held = _rows_of_tiles(tiles, tokens.device)
        total = tokens[:, rows].masked_fill(~held[..., None, None], 0.0).sum(2, dtype=wide)
    lengths = entries(tiles, tokens.device) % MAX_CAPACITY + 1
    return (total / lengths[:, None, None]).transpose(1, 2)


def _rows_of_tiles(tiles: Tiles, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two tensors [len(tiles), capacity]: the row at each place of a tile, and whether the tile has that place."""
    packed = entries(tiles, device).long()[:, None]
    offset = torch.arange(tiles.capacity, device=device)
    held = offset <= packed % MAX_CAPACITY
    return packed // MAX_CAPACITY + offset * held, held


def pooled_scores(query: Tensor, key: Tensor, q_tiles: Tiles, k_tiles: Tiles, scale: float | None = None) -> Tensor:
    """[B, H, q, k] float32, under autocast, too: logits between mean queries and mean keys. SLA subtracts the mean
    key first. That only adds a constant to each row, which changes neither of the selections below, so it is left out.

    query, key: [B, L, H, D]; the key has the rows of all sources."""
    with uncast(query):
        product = pool(query, q_tiles) @ pool(key, k_tiles).transpose(-1, -2)
        return product * softmax_scale(query, scale)


def scores_without_gradient(query: Tensor, key: Tensor, q_tiles: Tiles, k_tiles: Tiles) -> Tensor:
    """`pooled_scores` without gradient, in three launches on a GPU."""
    dim = query.shape[-1]
    if not kernels_run_on(query.device) or dim & (dim - 1):
        with torch.no_grad():
            return pooled_scores(query, key, q_tiles, k_tiles)
    from fastgen.ops.block_sparse_attention.launch_selection import pool_by_kernel

    means = [pool_by_kernel(tokens.detach(), tiles) for tokens, tiles in ((query, q_tiles), (key, k_tiles))]
    flat_query, flat_key = (mean.flatten(0, 1) for mean in means)
    nothing = flat_query.new_empty(())
    scale = softmax_scale(query, None)
    with uncast(query):
        scores = torch.baddbmm(nothing, flat_query, flat_key.transpose(1, 2), beta=0, alpha=scale)
    return scores.unflatten(0, means[0].shape[:2])


def _by_kernel(scores: Tensor) -> bool:
    return kernels_run_on(scores.device) and scores.dtype == torch.float32 and scores.shape[-1] <= MAX_COLUMNS


def top_k_map(scores: Tensor, k: int, forced: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
    """[B, H, q, k] bool: True for the forced tiles and for the k best of the others.

    forced, allowed: bool, broadcast to the scores. Forced tiles count as allowed; a tile that is not allowed is never
    kept. Rows with fewer than k other tiles keep all of them. Raises ValueError for a negative k."""
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    forced, ranked = _candidates(scores, forced, allowed)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    chosen = torch.zeros_like(forced).scatter(-1, best, True)
    return forced | (chosen & (ranked > -torch.inf))


def mass_map(scores: Tensor, mass: float, forced: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
    """[B, H, q, k] bool: the smallest set of tiles, at least one, that has the forced tiles and at least `mass` of
    softmax(scores).

    mass: in (0, 1]. forced, allowed: as in `top_k_map`. The softmax runs over the allowed tiles."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass}")
    forced, ranked = _candidates(scores, forced, allowed)
    open_scores = scores if allowed is None else scores.masked_fill(~(allowed | forced), -torch.inf)
    share = open_scores.softmax(-1).nan_to_num(0.0)  # NaN in a row where no tile is allowed
    missing = mass - (share * forced).sum(-1, keepdim=True)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    sorted_share = share.masked_fill(forced, 0.0).gather(-1, order)
    before = sorted_share.cumsum(-1) - sorted_share
    first = torch.arange(scores.shape[-1], device=scores.device) == 0
    kept = (before < missing) | (first & ~forced.any(-1, keepdim=True))
    chosen = torch.zeros_like(forced).scatter(-1, order, kept)
    return forced | (chosen & (ranked > -torch.inf))


def _candidates(scores: Tensor, forced: Tensor | None, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The forced set at full size, and the scores of the tiles that compete for a place; -inf for all others."""
    scores = scores.detach()
    forced = torch.zeros_like(scores, dtype=torch.bool) if forced is None else forced.expand(scores.shape)
    closed = forced if allowed is None else forced | ~allowed
    return forced, scores.masked_fill(closed, -torch.inf)


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def tiles_touched(tiles: Tiles, ranges: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """[1, 1, 1, len(tiles)] bool: the tiles that hold a row of any range (first, last + 1). Cached on the device."""
    touched = torch.zeros(len(tiles) + 1, dtype=torch.bool)
    tile = tile_of_token(tiles, torch.device("cpu"))
    for first, last in ranges:
        touched[tile[first:last]] = True
    return touched[:-1].view(1, 1, 1, -1).to(device)


@dataclass(frozen=True)
class Selection(ABC):
    """A rule that gives each head of each sample its own layout. On a GPU this takes a handful of launches.

    forced: ranges of key rows, (first, last + 1), whose tiles are always kept. In streaming these are the sink, the
    current chunk and the last past chunk. The selected tiles come in addition."""

    q_tiles: Tiles
    k_tiles: Tiles
    forced: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)

    def __call__(self, query: Tensor, key: Tensor) -> BlockLayout:
        """query, key: [B, L, H, D]; the key has the rows of all sources."""
        return self.from_scores(scores_without_gradient(query, key, self.q_tiles, self.k_tiles))

    def from_scores(self, scores: Tensor) -> BlockLayout:
        """scores: [B, H, q, k]."""
        return BlockLayout(self.block_map(scores), self.q_tiles, self.k_tiles, self.density)

    def forced_tiles(self, device: torch.device) -> Tensor:
        return tiles_touched(self.k_tiles, self.forced, device)

    @abstractmethod
    def block_map(self, scores: Tensor) -> Tensor: ...

    @property
    @abstractmethod
    def density(self) -> float | None:
        """The share of tiles that will be kept, or None if it depends on the content."""


@dataclass(frozen=True)
class TopK(Selection):
    """The forced tiles and the k best of the others."""

    k: int

    def block_map(self, scores: Tensor) -> Tensor:
        forced = self.forced_tiles(scores.device)
        if _by_kernel(scores):
            from fastgen.ops.block_sparse_attention.launch_selection import select_by_kernel

            return select_by_kernel(scores.detach(), forced, top_k=self.k)
        return top_k_map(scores, self.k, forced)

    @property
    def density(self) -> float:
        forced = int(self.forced_tiles(torch.device("cpu")).sum())
        return min(len(self.k_tiles), self.k + forced) / len(self.k_tiles)


@dataclass(frozen=True)
class Mass(Selection):
    """The smallest set that has the forced tiles and this share of the pooled attention (SpargeAttn, arXiv
    2502.18137)."""

    mass: float

    def block_map(self, scores: Tensor) -> Tensor:
        forced = self.forced_tiles(scores.device)
        if _by_kernel(scores):
            from fastgen.ops.block_sparse_attention.launch_selection import select_by_kernel

            return select_by_kernel(scores.detach(), forced, mass=self.mass)
        return mass_map(scores, self.mass, forced)

    @property
    def density(self) -> None:
        return None


def kept_tiles(sparsity: float, k_tiles: Tiles) -> int:
    """VSA's k: ceil((1 - sparsity) * tiles), at least 1."""
    return min(len(k_tiles), max(1, math.ceil((1 - sparsity) * len(k_tiles))))
