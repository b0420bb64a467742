"""Block-sparse attention over lists of tiles, with gradients; README.md has the derivation.

    layout = causal_layout(VideoMask(frame_tokens=1560, chunk_frames=(3,) * 7, window=9, sink=3), capacity=128)
    out = attention(query, key, value, layout.to(query.device)).out           # [B, L, H, D]

Nothing here imports triton before a kernel is needed.
"""

from fastgen.ops.block_sparse_attention.coarse import CoarseGate, coarse_attention
from fastgen.ops.block_sparse_attention.dispatch import attention
from fastgen.ops.block_sparse_attention.layout import BlockLayout, dense_layout, static_layout
from fastgen.ops.block_sparse_attention.linear_branch import LinearBranch, LinearState, linear_attention, linear_state
from fastgen.ops.block_sparse_attention.naive import Cache, naive_attention
from fastgen.ops.block_sparse_attention.patterns import Radial, SlidingTile, TileGrid
from fastgen.ops.block_sparse_attention.result import Result, merge
from fastgen.ops.block_sparse_attention.selection import Mass, Selection, TopK, kept_tiles
from fastgen.ops.block_sparse_attention.static_layouts import (
    VideoMask,
    causal_layout,
    rollout_layout,
    slots_layout,
    teacher_forcing_layout,
)
from fastgen.ops.block_sparse_attention.tiles import Tiles, tile_tokens

__all__ = [
    "BlockLayout",
    "Cache",
    "CoarseGate",
    "LinearBranch",
    "LinearState",
    "Mass",
    "Radial",
    "Result",
    "Selection",
    "SlidingTile",
    "TileGrid",
    "Tiles",
    "TopK",
    "VideoMask",
    "attention",
    "causal_layout",
    "coarse_attention",
    "dense_layout",
    "kept_tiles",
    "linear_attention",
    "linear_state",
    "merge",
    "naive_attention",
    "rollout_layout",
    "slots_layout",
    "static_layout",
    "teacher_forcing_layout",
    "tile_tokens",
]
