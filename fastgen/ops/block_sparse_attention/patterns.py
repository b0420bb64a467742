"""Static patterns of video tokens, sliding tiles and radial attention, each with its mask; and the order of tokens."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.ops.block_sparse_attention.layout import BlockLayout
from fastgen.ops.block_sparse_attention.static_layouts import layout_of
from fastgen.ops.block_sparse_attention.tiles import Tiles, tile_tokens


@dataclass(frozen=True)
class TileGrid:
    """Tokens of a video [frames, rows, columns] in cuboids, so that one cuboid is one tile.

    grid: tokens along each axis.  tile: tokens of a cuboid along each axis, at most 256 together; cuboids at the
    far edges are smaller where it does not divide the grid. Tokens are put in this order once a forward."""

    grid: tuple[int, int, int]
    tile: tuple[int, int, int]

    def __post_init__(self) -> None:
        if min(*self.grid, *self.tile) < 1 or math.prod(self.tile) > 256:
            raise ValueError(f"grid and tile must be positive, a tile of at most 256 tokens, got {self}")

    @property
    def num_tiles(self) -> tuple[int, int, int]:
        """Cuboids along each axis."""
        frames, rows, columns = (math.ceil(side / step) for side, step in zip(self.grid, self.tile, strict=True))
        return frames, rows, columns

    def coordinates(self) -> Tensor:
        """[tokens, 3] int64: the cuboid of each token, in the video's own order (columns fastest)."""
        axes = [torch.arange(side) // step for side, step in zip(self.grid, self.tile, strict=True)]
        return torch.cartesian_prod(*axes)

    def order(self) -> Tensor:
        """[tokens] int64: tokens[order] are in cuboid order."""
        return torch.argsort(self._cuboid(), stable=True)

    def inverse(self) -> Tensor:
        """[tokens] int64: tokens[order][inverse] are the tokens again."""
        return torch.argsort(self.order())

    def tiles(self) -> Tiles:
        """One tile a cuboid, for tokens in cuboid order."""
        lengths = torch.bincount(self._cuboid()).tolist()
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        capacity = max(16, 1 << (max(lengths) - 1).bit_length())
        return Tiles(tuple(starts), tuple(lengths), capacity, sum(lengths))

    def _cuboid(self) -> Tensor:
        _, rows, columns = self.num_tiles
        coordinate = self.coordinates()
        return (coordinate[:, 0] * rows + coordinate[:, 1]) * columns + coordinate[:, 2]


@dataclass(frozen=True)
class SlidingTile:
    """Sliding tile attention (arXiv 2502.04507): a query cuboid sees the cuboids of a window around it.

    window: cuboids along each axis, odd, or at least as many as there are. The window's centre is moved inward at the
    edges, so that it keeps its full width there."""

    grid: TileGrid
    window: tuple[int, int, int]

    def __post_init__(self) -> None:
        for width, tiles in zip(self.window, self.grid.num_tiles, strict=True):
            if width < 1 or (width % 2 == 0 and width < tiles):
                raise ValueError(
                    f"window must be odd along each axis, or cover it: {self.window} of {self.grid.num_tiles}"
                )

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """Rows of queries and keys in cuboid order, int64, broadcast -> bool."""
        cuboid = self.grid.coordinates()[self.grid.order()]
        seen = torch.ones(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool)
        for axis, (width, tiles) in enumerate(zip(self.window, self.grid.num_tiles, strict=True)):
            if width < tiles:
                half = width // 2
                centre = cuboid[query, axis].clamp(half, tiles - 1 - half)
                seen &= (centre - cuboid[key, axis]).abs() <= half
        return seen

    def layout(self) -> BlockLayout:
        tiles = self.grid.tiles()
        return layout_of(self.mask, tiles, tiles)


@dataclass(frozen=True)
class Radial:
    """Radial attention (arXiv 2506.19852) in tiles: the band of a pair of frames halves with each octave of distance.

        width(d) = decay * frame_tokens / 2^floor(log2 max(d, 1)),  d = |query frame - key frame|

    d <= 1: the whole pair of frames. Else tiles at the same place in their frames whose distance is below width(d);
    once width(d) is below a tile, only the same place, in every ceil(capacity / width(d))-th pair of frames.
    sink: keys of frame 0 are seen by all.  Tiles start anew with each frame."""

    frames: int
    frame_tokens: int
    capacity: int
    decay: float = 1.0
    sink: bool = True

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frame_tokens < 1 or self.decay <= 0:
            raise ValueError(f"frames, frame_tokens and decay must be positive, got {self}")

    def width(self, distance: int) -> float:
        """The band of two frames at this distance, in tokens."""
        return self.decay * self.frame_tokens / (1 << (max(distance, 1).bit_length() - 1))

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """Rows of queries and keys, int64, broadcast -> bool."""
        distance = (query // self.frame_tokens - key // self.frame_tokens).abs()
        place = [(rows % self.frame_tokens) // self.capacity for rows in (query, key)]
        apart = (place[0] - place[1]).abs() * self.capacity
        width = torch.tensor([self.width(d) for d in range(self.frames)], dtype=torch.float64)[distance]
        every = (self.capacity / width).ceil().long()
        thin = (apart == 0) & (distance % every == 0)
        seen = (distance <= 1) | torch.where(width >= self.capacity, apart < width, thin)
        return seen | (key < self.frame_tokens) if self.sink else seen

    def layout(self) -> BlockLayout:
        cuts = [frame * self.frame_tokens for frame in range(self.frames)]
        tiles = tile_tokens(self.frames * self.frame_tokens, self.capacity, cuts)
        return layout_of(self.mask, tiles, tiles)
