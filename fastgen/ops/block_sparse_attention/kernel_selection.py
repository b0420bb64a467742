"""Kernels that select in few launches: means of tiles, the tiles that a row keeps, and block lists. selection.py and
layout.py compute the same in torch, and the results are equal, including ties.

In the last two kernels, a program holds one row of scores or of the map, padded to COLUMNS, a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def pool_kernel(
    p_tokens,
    p_tiles,
    p_means,
    num_heads,
    num_tiles,
    stride_b,
    stride_l,
    stride_h,
    HEAD_DIM: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """means [B, H, tiles, HEAD_DIM] float32 of tokens [B, L, H, HEAD_DIM]. Grid: (tiles, batch * heads)."""
    i_tile = tl.program_id(0)
    i_batch = (tl.program_id(1) // num_heads).to(tl.int64)
    i_head = (tl.program_id(1) % num_heads).to(tl.int64)
    tile = tl.load(p_tiles + i_tile)
    length = (tile & 255) + 1
    i_row = tl.arange(0, CAPACITY)
    i_dim = tl.arange(0, HEAD_DIM)
    p_rows = p_tokens + i_batch * stride_b + i_head * stride_h + ((tile >> 8) + i_row.to(tl.int64))[:, None] * stride_l
    b_rows = tl.load(p_rows + i_dim[None, :], mask=i_row[:, None] < length, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_rows, 0) / length
    tl.store(p_means + (tl.program_id(1).to(tl.int64) * num_tiles + i_tile) * HEAD_DIM + i_dim, b_mean)


@triton.jit
def sortable(b_score):
    """int32 keys that sort like the float32 scores; -0 counts as 0."""
    b_bits = (b_score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)


@triton.jit
def select_kernel(p_scores, p_forced, p_map, num_columns, amount, COLUMNS: tl.constexpr, BY_MASS: tl.constexpr):
    """map [rows, num_columns] uint8 from scores [rows, num_columns] float32 and forced [num_columns] uint8.

    amount, a float: how many tiles to keep or, if BY_MASS, the mass. The score at which the amount is reached is found
    by bisection over the 2^32 float32 values. Among equal scores, the first columns are kept. Grid: (rows,)."""
    i_column = tl.arange(0, COLUMNS)
    inside = i_column < num_columns
    p_row = tl.program_id(0).to(tl.int64) * num_columns + i_column
    b_score = tl.load(p_scores + p_row, mask=inside, other=float("-inf"))
    b_forced = tl.load(p_forced + i_column, mask=inside, other=0) > 0
    b_open = inside & ~b_forced & (b_score > float("-inf"))
    b_key = tl.where(b_open, sortable(b_score), -2147483648)

    b_share = b_open.to(tl.float32)
    wanted = tl.full([], 0.0, tl.float32) + amount
    if BY_MASS:
        b_exp = tl.where(inside, tl.exp(b_score - tl.max(b_score, 0)), 0.0)
        b_exp = b_exp / tl.sum(b_exp, 0)
        b_share = tl.where(b_open, b_exp, 0.0)
        wanted -= tl.sum(tl.where(b_forced, b_exp, 0.0), 0)
    # the smallest threshold above which there is less than `wanted`
    low = tl.full([], -2147483648, tl.int64)
    high = tl.full([], 2147483647, tl.int64)
    for _ in tl.range(32):
        middle = (low + high) >> 1
        above = tl.sum(tl.where(b_key > middle, b_share, 0.0), 0)
        low, high = tl.where(above < wanted, low, middle + 1), tl.where(above < wanted, middle, high)
    b_above = b_open & (b_key > high)
    b_equal = b_open & (b_key == high)
    before = tl.sum(tl.where(b_above, b_share, 0.0), 0)
    b_equal_share = tl.where(b_equal, b_share, 0.0)
    b_before = before + tl.cumsum(b_equal_share, 0) - b_equal_share
    b_kept = b_above | (b_equal & (b_before < wanted))
    if BY_MASS:  # keep at least one
        best = tl.max(b_key, 0)
        b_first = i_column == tl.min(tl.where(b_open & (b_key == best), i_column, COLUMNS), 0)
        b_kept = b_kept | (b_first & (tl.sum(b_forced.to(tl.int32), 0) == 0))
    tl.store(p_map + p_row, (b_kept | b_forced).to(tl.uint8), mask=inside)


@triton.jit
def lists_kernel(
    p_map,
    p_tiles,
    p_lists,
    p_counts,
    p_full,
    num_rows,
    num_columns,
    stride_head,
    stride_row,
    stride_column,
    COLUMNS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """entries [b * h, rows, columns], counts and full [b * h, rows], int32, of a map with free strides.

    Full tiles come first, then ragged ones. Nothing is written after the last entry. Grid: (rows, b * h)."""
    i_column = tl.arange(0, COLUMNS)
    inside = i_column < num_columns
    p_row = p_map + tl.program_id(1).to(tl.int64) * stride_head + tl.program_id(0).to(tl.int64) * stride_row
    b_kept = tl.load(p_row + i_column.to(tl.int64) * stride_column, mask=inside, other=0) > 0
    b_entry = tl.load(p_tiles + i_column, mask=inside, other=0)
    b_full = (b_kept & ((b_entry & 255) == CAPACITY - 1)).to(tl.int32)
    b_ragged = b_kept.to(tl.int32) - b_full
    full = tl.sum(b_full, 0)
    b_place = tl.where(b_full > 0, tl.cumsum(b_full, 0), full + tl.cumsum(b_ragged, 0)) - 1
    i_row = tl.program_id(1).to(tl.int64) * num_rows + tl.program_id(0)
    tl.store(p_lists + i_row * num_columns + b_place, b_entry, mask=b_kept)
    tl.store(p_counts + i_row, full + tl.sum(b_ragged, 0))
    tl.store(p_full + i_row, full)
