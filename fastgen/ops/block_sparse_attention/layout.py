"""BlockLayout: which tiles of queries see which tiles of keys, and the lists that kernels walk.

Everything here is deterministic, and is built on the device of the block map without synchronising with the host.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.ops.block_sparse_attention.configs import MAX_COLUMNS, kernels_run_on
from fastgen.ops.block_sparse_attention.tiles import MAX_CAPACITY, Tiles, entries, full_first, tile_of_token


class BlockLists(NamedTuple):
    """For each row tile, the column tiles that it meets: first the full ones, then the ragged ones, each in ascending
    order.

    entries: [b, h, rows, M] int32, start * 256 + length - 1 of each column tile; 0 after the first `counts` entries.
    counts: [b, h, rows] int32, the length of each list.  full: [b, h, rows] int32, how many of its tiles are full.
    b and h may be 1, in which case one list serves all."""

    entries: Tensor
    counts: Tensor
    full: Tensor


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """block_map: [b, h, len(q_tiles), len(k_tiles)] bool, b in {1, batch}, h in {1, heads}; True where a query tile
    sees a key tile. Rows of the map may be empty; the output of such queries is 0.
    density: the share of the map that is True, if it is known on the host; None if it depends on the content.

    Raises ValueError if the map does not fit the tiles."""

    block_map: Tensor
    q_tiles: Tiles
    k_tiles: Tiles
    density: float | None = None

    def __post_init__(self) -> None:
        if self.block_map.dtype != torch.bool or self.block_map.dim() != 4:
            raise ValueError(
                f"block_map must be bool [b, h, q, k], got {self.block_map.dtype} {tuple(self.block_map.shape)}"
            )
        tiles = (len(self.q_tiles), len(self.k_tiles))
        if tuple(self.block_map.shape[2:]) != tiles:
            raise ValueError(
                f"block_map is {tuple(self.block_map.shape)}, but there are {tiles[0]} query tiles and {tiles[1]} key "
                "tiles"
            )

    @property
    def device(self) -> torch.device:
        return self.block_map.device

    def to(self, device: torch.device | str) -> "BlockLayout":
        """The same layout on this device. If it is there already, itself, with the lists that it has built."""
        if torch.device(device) == self.device:
            return self
        return BlockLayout(self.block_map.to(device), self.q_tiles, self.k_tiles, self.density)

    @property
    def sees_all(self) -> bool:
        """Whether the host knows that this is plain dense attention over every row."""
        return self.density == 1 and self.q_tiles.covers_all and self.k_tiles.covers_all

    @cached_property
    def key_lists(self) -> BlockLists:
        """For each query tile, the key tiles that it sees."""
        return block_lists(self.block_map, self.k_tiles)

    @cached_property
    def query_lists(self) -> BlockLists:
        """For each key tile, the query tiles that see it (the transposed map)."""
        return block_lists(self.block_map.transpose(2, 3), self.q_tiles)

    def mask(self) -> Tensor:
        """[b, h, query tokens, key tokens] bool: the dense expansion, False for rows in no tile."""
        return expand(self.block_map, self.q_tiles, self.k_tiles)


def static_layout(block_map: Tensor, q_tiles: Tiles, k_tiles: Tiles) -> BlockLayout:
    """A layout from a map [q, k] or [b, h, q, k] on the CPU, from which the density is counted."""
    full = block_map[None, None] if block_map.dim() == 2 else block_map
    return BlockLayout(full, q_tiles, k_tiles, float(full.float().mean()))


def dense_layout(q_tiles: Tiles, k_tiles: Tiles) -> BlockLayout:
    """Every query tile sees every key tile, like a chunk of a rollout over its whole visible cache."""
    return static_layout(torch.ones(len(q_tiles), len(k_tiles), dtype=torch.bool), q_tiles, k_tiles)


def block_lists(block_map: Tensor, columns: Tiles) -> BlockLists:
    """The lists of a map [b, h, rows, len(columns)].

    The position of a tile in its list is the number of kept tiles before it, counting full tiles first, then ragged
    ones. A cumulative sum gives it, and the scatter has distinct positions, so equal maps give equal lists on every
    device. On a GPU, one kernel does it."""
    if kernels_run_on(block_map.device) and len(columns) <= MAX_COLUMNS:
        from fastgen.ops.block_sparse_attention.launch_selection import lists_by_kernel

        return BlockLists(*lists_by_kernel(block_map, columns))
    order, num_full = full_first(columns, block_map.device)
    ordered = block_map[..., order]
    packed = entries(columns, block_map.device)[order].expand(ordered.shape)
    position = ordered.cumsum(-1).sub(1).masked_fill(~ordered, len(columns))  # dropped tiles go to an extra column
    lists = torch.zeros(*ordered.shape[:-1], len(columns) + 1, dtype=torch.int32, device=block_map.device)
    lists = lists.scatter(-1, position, packed)[..., :-1].contiguous()
    count = ordered.sum(-1, dtype=torch.int32)
    return BlockLists(lists, count, ordered[..., :num_full].sum(-1, dtype=torch.int32))


def lists_to_map(lists: BlockLists, columns: Tiles) -> Tensor:
    """The inverse of `block_lists`: the map [b, h, rows, len(columns)] that lists of any order stand for."""
    starts = entries(columns, lists.entries.device) // MAX_CAPACITY
    column = torch.searchsorted(starts, lists.entries // MAX_CAPACITY, right=True).sub(1).clamp(min=0)
    listed = torch.arange(lists.entries.shape[-1], device=column.device) < lists.counts[..., None]
    column = column.masked_fill(~listed, len(columns))
    shape = (*column.shape[:-1], len(columns) + 1)
    return torch.zeros(shape, dtype=torch.bool, device=column.device).scatter(-1, column, True)[..., :-1]


def expand(block_map: Tensor, q_tiles: Tiles, k_tiles: Tiles) -> Tensor:
    """Expands a map of tiles [b, h, q, k] to a mask of tokens [b, h, query tokens, key tokens]."""
    # the added tile stands for rows in no tile: it sees nothing and is seen by nothing
    padded = torch.nn.functional.pad(block_map, (0, 1, 0, 1))
    rows = tile_of_token(q_tiles, block_map.device)
    return padded[:, :, rows][..., tile_of_token(k_tiles, block_map.device)]
