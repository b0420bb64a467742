"""Static patterns for video tokens (sliding tiles, radial attention), each with its mask, and the order of tokens."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.ops.block_sparse_attention.layout import BlockLayout
from fastgen.ops.block_sparse_attention.static_layouts import layout_of
from fastgen.ops.block_sparse_attention.tiles import Tiles, tile_tokens


@dataclass(frozen=True)
class TileGrid:
    """The tokens of a video [frames, rows, columns], ordered by cuboids so that each cuboid is one tile.

    grid: number of tokens along each axis.  tile: number of tokens of a cuboid along each axis, at most 256 in all.
    Where the tile does not divide the grid, the cuboids at the far edges are smaller. Tokens are put in this order
    once per forward."""

    grid: tuple[int, int, int]
    tile: tuple[int, int, int]

    def __post_init__(self) -> None:
        if min(*self.grid, *self.tile) < 1 or math.prod(self.tile) > 256:
            raise ValueError(f"grid and tile must be positive, and a tile must hold at most 256 tokens; got {self}")

    @property
    def num_tiles(self) -> tuple[int, int, int]:
        """Cuboids along each axis."""
        frames, rows, columns = (math.ceil(side / step) for side, step in zip(self.grid, self.tile, strict=True))
        return frames, rows, columns

    def coordinates(self) -> Tensor:
        """[tokens, 3] int64: the cuboid of each token, with tokens in the video's own order (columns fastest)."""
        axes = [torch.arange(side) // step for side, step in zip(self.grid, self.tile, strict=True)]
        return torch.cartesian_prod(*axes)

    def order(self) -> Tensor:
        """[tokens] int64: tokens[order] is in cuboid order."""
        return torch.argsort(self._cuboid(), stable=True)

    def inverse(self) -> Tensor:
        """[tokens] int64: tokens[order][inverse] restores the original order."""
        return torch.argsort(self.order())

    def tiles(self) -> Tiles:
        """One tile per cuboid, for tokens in cuboid order."""
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
    """Sliding tile attention (arXiv 2502.04507): each query cuboid sees the cuboids in a window around it.

    window: number of cuboids along each axis; odd, or at least the grid's own number. At the edges the centre of the
    window is moved inward, so that the window keeps its full width."""

    grid: TileGrid
    window: tuple[int, int, int]

    def __post_init__(self) -> None:
        for width, tiles in zip(self.window, self.grid.num_tiles, strict=True):
            if width < 1 or (width % 2 == 0 and width < tiles):
                raise ValueError(
                    f"window must be odd along each axis or cover the axis, got {self.window} of "
                    f"{self.grid.num_tiles} cuboids"
                )

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """Query rows and key rows in cuboid order, int64, broadcast against each other -> bool."""
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
    """Radial attention (arXiv 2506.19852) in tiles: the band halves each time the distance between two frames doubles.

        width(d) = decay * frame_tokens / 2^floor(log2 max(d, 1)),  d = |query frame - key frame|

    d <= 1: the two frames see each other whole. Otherwise two tiles see each other if their places in their frames are
    less than width(d) tokens apart. Once width(d) is less than a tile, only tiles at the same place see each other,
    and only where d is a multiple of ceil(capacity / width(d)).
    sink: all queries see the keys of frame 0.  Each frame starts a new tile."""

    frames: int
    frame_tokens: int
    capacity: int
    decay: float = 1.0
    sink: bool = True

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frame_tokens < 1 or self.decay <= 0:
            raise ValueError(f"frames, frame_tokens and decay must be positive, got {self}")

    def width(self, distance: int) -> float:
        """The width, in tokens, of the band between two frames at this distance."""
        return self.decay * self.frame_tokens / (1 << (max(distance, 1).bit_length() - 1))

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """Query rows and key rows, int64, broadcast against each other -> bool."""
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
