"""Layouts of streaming video: causal chunks with window and sink, and teacher forcing, each with its mask function.

Frames are latent frames; all have `frame_tokens` tokens. Attention is bidirectional within a chunk and causal across
chunks. The window W counts all frames that a query sees: the sink, the past and its own chunk. The sink is the first S
frames. With e(q) the end of the query's chunk, a frame f < e(q) is seen if f >= e(q) - (W - S) or f < S.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fastgen.ops.block_sparse_attention.layout import BlockLayout, static_layout
from fastgen.ops.block_sparse_attention.tiles import Tiles, tile_tokens

MaskFunction = Callable[[Tensor, Tensor], Tensor]  # query rows, key rows -> bool, broadcast


@dataclass(frozen=True)
class VideoMask:
    """frame_tokens: number of tokens per frame.  chunk_frames: number of frames in each chunk.  window: W, or None for
    the whole past.  sink: S, the number of first frames that every later query sees. Without a window, the past
    includes them.

    Raises ValueError for a window that cannot hold the sink and the largest chunk."""

    frame_tokens: int
    chunk_frames: tuple[int, ...]
    window: int | None = None
    sink: int = 0

    def __post_init__(self) -> None:
        if self.frame_tokens < 1 or not self.chunk_frames or min(self.chunk_frames) < 1 or self.sink < 0:
            raise ValueError(f"frame_tokens and chunk_frames must be positive, sink not negative, got {self}")
        if self.window is not None and self.window < self.sink + max(self.chunk_frames):
            needed = f"{self.sink} sink frames and a chunk of {max(self.chunk_frames)}"
            raise ValueError(f"a window of {self.window} frames cannot hold {needed}")

    @property
    def ends(self) -> tuple[int, ...]:
        """For each chunk, the first frame after it."""
        return tuple(accumulate(self.chunk_frames))

    @property
    def num_tokens(self) -> int:
        return self.frame_tokens * self.ends[-1]

    def window_start(self, end: int) -> int:
        """The first frame of the moving window of the chunk that ends before frame `end`."""
        return 0 if self.window is None else max(0, end - (self.window - self.sink))

    def causal(self, query: Tensor, key: Tensor) -> Tensor:
        """Query rows and key rows, int64, broadcast -> bool. A query sees its own chunk and the visible past."""
        _, end = self._chunk_of(query)
        frame = key // self.frame_tokens
        return (frame < end) & (self._in_window(frame, end) | (frame < self.sink))

    def teacher_forcing(self, query: Tensor, key: Tensor) -> Tensor:
        """The same for rows of [clean | noisy], each `num_tokens` long.

        Clean queries see clean keys as in `causal`. Noisy queries see their own noisy chunk and, as in a rollout, the
        clean keys of the visible frames before their chunk."""
        clean_query, clean_key = query < self.num_tokens, key < self.num_tokens
        query, key = query % self.num_tokens, key % self.num_tokens
        start, end = self._chunk_of(query)
        frame = key // self.frame_tokens
        own = (start <= frame) & (frame < end)
        past = (frame < start) & (self._in_window(frame, end) | (frame < self.sink))
        return torch.where(clean_query, clean_key & (own | past), torch.where(clean_key, past, own))

    def _chunk_of(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """First frame and end frame of the chunk of each row."""
        ends = torch.tensor(self.ends, device=token.device)
        chunk = torch.searchsorted(ends, token // self.frame_tokens, right=True)
        end = ends[chunk]
        return end - torch.tensor(self.chunk_frames, device=token.device)[chunk], end

    def _in_window(self, frame: Tensor, end: Tensor) -> Tensor:
        return torch.ones_like(frame < end) if self.window is None else frame >= end - (self.window - self.sink)

    def cuts(self) -> list[int]:
        """The rows at which visibility may change (edges of chunks, windows and sink). No tile may cross one."""
        frames = {*self.ends, *(self.window_start(end) for end in self.ends), min(self.sink, self.ends[-1])}
        return [frame * self.frame_tokens for frame in sorted(frames)]


def causal_layout(mask: VideoMask, capacity: int) -> BlockLayout:
    """Queries and keys are all tokens in order, as in diffusion forcing and ODE regression."""
    tiles = tile_tokens(mask.num_tokens, capacity, mask.cuts())
    return layout_of(mask.causal, tiles, tiles)


def teacher_forcing_layout(mask: VideoMask, capacity: int) -> BlockLayout:
    """Queries and keys are [clean | noisy], twice as many tokens, with both halves at the same positions."""
    half = tile_tokens(mask.num_tokens, capacity, mask.cuts())
    tiles = half.followed_by(half)
    return layout_of(mask.teacher_forcing, tiles, tiles)


def rollout_layout(mask: VideoMask, chunk: int, capacity: int) -> BlockLayout:
    """Queries are the tokens of one chunk. Keys are all clean tokens before it, then the chunk's own.

    For a cache that keeps every frame in its place. Frames that the window has left behind are in tiles that no list
    contains."""
    end = mask.ends[chunk]
    first = (end - mask.chunk_frames[chunk]) * mask.frame_tokens
    own = tile_tokens(end * mask.frame_tokens - first, capacity)
    if first == 0:
        return layout_of(mask.causal, own, own)
    past = tile_tokens(first, capacity, [cut for cut in mask.cuts() if cut < first])
    return layout_of(lambda q, k: mask.causal(q + first, k), own, past.followed_by(own))


def slots_layout(query_tokens: int, visible: Sequence[tuple[int, int]], slots: int, capacity: int) -> BlockLayout:
    """Every query sees the rows `visible` [(first, last + 1), ...] of a cache of `slots` rows, and all current tokens.

    For a rolling cache: the visible rows may be anywhere, in ascending ranges. Stale rows between are never read."""
    rows = [(start, min(start + capacity, last)) for first, last in visible for start in range(first, last, capacity)]
    own = tile_tokens(query_tokens, capacity)
    keys = own
    if rows:
        starts, lengths = tuple(start for start, _ in rows), tuple(end - start for start, end in rows)
        keys = Tiles(starts, lengths, capacity, slots).followed_by(own)
    elif slots:
        raise ValueError(f"none of the {slots} rows of the cache is visible; leave it out, with slots=0")
    return static_layout(torch.ones(len(own), len(keys), dtype=torch.bool), own, keys)


def layout_of(mask: MaskFunction, q_tiles: Tiles, k_tiles: Tiles) -> BlockLayout:
    """The layout whose dense expansion is `mask`. The mask must be constant within each pair of tiles, because it is
    read only at the first row of each tile. Runs on the CPU."""
    queries, keys = torch.tensor(q_tiles.starts)[:, None], torch.tensor(k_tiles.starts)[None, :]
    return static_layout(mask(queries, keys), q_tiles, k_tiles)
