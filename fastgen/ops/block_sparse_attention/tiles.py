"""Tiles: runs of consecutive tokens, the unit that a block list keeps or drops.

A tile may start at any row and may hold fewer tokens than its capacity. So the edges of chunks, frames and windows can
be tile edges without padding any tensor. The visible part of a cache is a list of tiles, wherever its slots are. Rows
that belong to no tile (stale cache slots, padding) are never read.
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

MAX_CAPACITY = 256  # an entry holds length - 1 in its low 8 bits
MAX_TOKENS = 2**31 // MAX_CAPACITY  # and the first row in the other 23


@dataclass(frozen=True)
class Tiles:
    """starts, lengths: first row and number of tokens of each tile, in ascending order and without overlap.
    capacity: the most tokens that a tile may hold, a power of two from 16 to 256. A tile that holds as many is full;
    any other is ragged.
    num_tokens: number of rows of the tensor that is tiled; rows in no tile are never read.

    Raises ValueError for tiles that are empty, too long, out of order or outside the tensor."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    capacity: int
    num_tokens: int

    def __post_init__(self) -> None:
        if self.capacity not in (16, 32, 64, 128, 256):
            raise ValueError(f"capacity must be 16, 32, 64, 128 or 256, got {self.capacity}")
        if self.num_tokens >= MAX_TOKENS:
            raise ValueError(f"at most {MAX_TOKENS - 1} tokens can be tiled, got {self.num_tokens}")
        if len(self.starts) != len(self.lengths) or not self.starts:
            raise ValueError(
                f"tiles need equally many starts and lengths, and at least one: got {len(self.starts)} starts and "
                f"{len(self.lengths)} lengths"
            )
        if not all(1 <= length <= self.capacity for length in self.lengths):
            raise ValueError(
                f"each tile must hold 1 to {self.capacity} tokens, got {min(self.lengths)} to {max(self.lengths)}"
            )
        ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
        if (
            self.starts[0] < 0
            or ends[-1] > self.num_tokens
            or any(e > s for e, s in zip(ends, self.starts[1:], strict=False))
        ):
            raise ValueError(f"tiles must ascend without overlap inside {self.num_tokens} tokens")

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def _hash(self) -> int:
        return hash((self.starts, self.lengths, self.capacity, self.num_tokens))

    def __hash__(self) -> int:
        """Computed only once, because every call looks its tiles up."""
        return self._hash

    @cached_property
    def covered_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def covers_all(self) -> bool:
        """Whether every row belongs to a tile."""
        return self.covered_tokens == self.num_tokens

    @cached_property
    def is_uniform(self) -> bool:
        """Whether every tile i starts at i * capacity and no row is left out, like the blocks of other libraries."""
        return self.covers_all and all(start == i * self.capacity for i, start in enumerate(self.starts))

    def split_at(self, token: int) -> int:
        """The number of tiles before `token`. Raises ValueError if a tile lies on both sides of it."""
        index = bisect.bisect_left(self.starts, token)
        if index and self.starts[index - 1] + self.lengths[index - 1] > token:
            raise ValueError(f"token {token} lies inside tile {index - 1}, which starts at {self.starts[index - 1]}")
        return index

    def followed_by(self, other: "Tiles") -> "Tiles":
        """Tiles of two tensors laid end to end: these, then `other`'s. Raises ValueError if the capacities differ."""
        if self.capacity != other.capacity:
            raise ValueError(
                f"tiles of capacity {self.capacity} and {other.capacity} cannot be joined; give both the same capacity"
            )
        shifted = tuple(start + self.num_tokens for start in other.starts)
        tokens = self.num_tokens + other.num_tokens
        return Tiles(self.starts + shifted, self.lengths + other.lengths, self.capacity, tokens)


def tile_tokens(num_tokens: int, capacity: int, cuts: Sequence[int] = ()) -> Tiles:
    """Tiles over all tokens, with an edge at each of `cuts`. The last tile before a cut may be ragged."""
    edges = sorted({0, num_tokens, *cuts})
    if num_tokens < 1 or edges[0] < 0 or edges[-1] > num_tokens:
        raise ValueError(
            f"num_tokens must be positive and cuts must lie between 0 and num_tokens, got {num_tokens}, {list(cuts)}"
        )
    starts = [start for low, high in pairwise(edges) for start in range(low, high, capacity)]
    lengths = [end - start for start, end in pairwise([*starts, num_tokens])]
    return Tiles(tuple(starts), tuple(lengths), capacity, num_tokens)


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)  # the cached tensor may be used in a training step later
def entries(tiles: Tiles, device: torch.device) -> Tensor:
    """[len(tiles)] int32: start * 256 + length - 1 of each tile, the entries of block lists. Cached on the device."""
    packed = [start * MAX_CAPACITY + length - 1 for start, length in zip(tiles.starts, tiles.lengths, strict=True)]
    return torch.tensor(packed, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)  # the cached tensor may be used in a training step later
def tile_of_token(tiles: Tiles, device: torch.device) -> Tensor:
    """[num_tokens] int64: the tile of each row, len(tiles) for rows in no tile. Cached on the device."""
    result = torch.full((tiles.num_tokens,), len(tiles))
    for index, (start, length) in enumerate(zip(tiles.starts, tiles.lengths, strict=True)):
        result[start : start + length] = index
    return result.to(device)


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)  # the cached tensor may be used in a training step later
def full_first(tiles: Tiles, device: torch.device) -> tuple[Tensor, int]:
    """The order [len(tiles)] int64 that puts full tiles before ragged ones, each ascending, and how many are full."""
    order = sorted(range(len(tiles)), key=lambda index: (tiles.lengths[index] < tiles.capacity, index))
    num_full = sum(length == tiles.capacity for length in tiles.lengths)
    return torch.tensor(order, device=device), num_full
