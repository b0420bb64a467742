"""The forward kernel; README.md has the derivation.

Prefixes of names: `p_` pointers, `b_` values on the chip, `i_` indices, `d_` tensor descriptors (unused pointers
without TMA), `step_` the rows or columns of a descriptor between two batches or heads.

A program owns BLOCK_M query rows of one tile and walks the list of key tiles: first the full ones, without a mask,
then the ragged ones. An entry of a list is start * 256 + length - 1, in rows of [cache | current]. Nothing else has to
be loaded before the addresses of a tile are known. The head dimension is contiguous; every other stride is free.
"""

import triton
import triton.language as tl


@triton.jit
def pick_source(row, p_cached, p_current, stride_cached, stride_current, num_cached, TWO_SOURCES: tl.constexpr):
    """The pointer to `row` of [cache | current], and the stride of its source."""
    if TWO_SOURCES:
        in_cache = row < num_cached
        stride = tl.where(in_cache, stride_cached, stride_current)
        local = tl.where(in_cache, row, row - num_cached)
        return tl.where(in_cache, p_cached, p_current) + local.to(tl.int64) * stride, stride
    return p_current + row.to(tl.int64) * stride_current, stride_current


@triton.jit
def load_rows(
    p_rows, stride, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, UPCAST: tl.constexpr
):
    """The block [ROWS, HEAD_DIM] from p_rows on. If RAGGED, rows from `length` on are 0 and are not read."""
    i_row = tl.arange(0, ROWS)
    p_block = p_rows + i_row.to(tl.int64)[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    if RAGGED:
        block = tl.load(p_block, mask=i_row[:, None] < length, other=0.0)
    else:
        block = tl.load(p_block)
    if UPCAST:
        block = block.to(tl.float32)
    return block


@triton.jit
def load_described(d_rows, i_row, i_column, UPCAST: tl.constexpr):
    """The block of a tensor descriptor from this row and column on, loaded by the copy engine (TMA)."""
    block = d_rows.load([i_row, i_column])
    if UPCAST:
        block = block.to(tl.float32)
    return block


@triton.jit
def attend(
    b_acc,
    b_sum,
    b_max,
    b_q,
    p_k,
    p_v,
    p_kc,
    p_vc,
    stride_kl,
    stride_vl,
    stride_kcl,
    stride_vcl,
    d_k,
    d_v,
    i_k,
    i_k_column,
    i_v,
    i_v_column,
    p_list,
    i_first,
    i_last,
    num_cached,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_TILE: tl.constexpr,
    RAGGED: tl.constexpr,
    TWO_SOURCES: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The online softmax over entries i_first to i_last - 1 of a list.

    b_acc [BLOCK_M, HEAD_DIM], b_sum, b_max [BLOCK_M]."""
    PARTS: tl.constexpr = KEY_TILE // BLOCK_N
    for i in tl.range(i_first * PARTS, i_last * PARTS):
        entry = tl.load(p_list + i // PARTS)
        skipped = (i % PARTS) * BLOCK_N
        row = (entry >> 8) + skipped
        length = (entry & 255) + 1 - skipped
        if TMA and not RAGGED:
            b_k = load_described(d_k, i_k + row, i_k_column, UPCAST)
        else:
            p_key, stride_key = pick_source(row, p_kc, p_k, stride_kcl, stride_kl, num_cached, TWO_SOURCES)
            b_k = load_rows(p_key, stride_key, length, BLOCK_N, HEAD_DIM, RAGGED, UPCAST)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if RAGGED:
            b_s = tl.where(tl.arange(0, BLOCK_N)[None, :] < length, b_s, float("-inf"))
        # the scale comes after the product, in float32 and in one multiply-add, as in the backward
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max) if RAGGED else b_new_max
        b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
        b_shrink = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_acc = b_acc * b_shrink[:, None]
        if TMA and not RAGGED:
            b_v = load_described(d_v, i_v + row, i_v_column, UPCAST)
        else:
            p_value, stride_value = pick_source(row, p_vc, p_v, stride_vcl, stride_vl, num_cached, TWO_SOURCES)
            b_v = load_rows(p_value, stride_value, length, BLOCK_N, HEAD_DIM, RAGGED, UPCAST)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_max = b_new_max
    return b_acc, b_sum, b_max


@triton.jit
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_kc,
    p_vc,
    d_k,
    d_v,
    p_out,
    p_lse,
    p_tiles,
    p_lists,
    p_count,
    p_full,
    scale_log2,
    num_heads,
    num_queries,
    num_cached,
    step_kb,
    step_kh,
    step_kc,
    step_vb,
    step_vh,
    step_vc,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_kcb,
    stride_kcl,
    stride_kch,
    stride_vcb,
    stride_vcl,
    stride_vch,
    stride_listb,
    stride_listh,
    stride_listn,
    stride_countb,
    stride_counth,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    TWO_SOURCES: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out [B, Lq, H, HEAD_DIM], contiguous.  lse [B, H, Lq] float32, to base 2.  p_tiles: the query tiles.

    Grid: (query tiles * QUERY_TILE // BLOCK_M, batch * heads). Rows in no tile are not written."""
    PARTS: tl.constexpr = QUERY_TILE // BLOCK_M
    i_tile = tl.program_id(0) // PARTS
    i_batch = (tl.program_id(1) // num_heads).to(tl.int64)
    i_head = (tl.program_id(1) % num_heads).to(tl.int64)
    tile = tl.load(p_tiles + i_tile)
    skipped = (tl.program_id(0) % PARTS) * BLOCK_M
    row = (tile >> 8) + skipped
    length = (tile & 255) + 1 - skipped
    if length <= 0:
        return
    i_row = tl.arange(0, BLOCK_M)

    p_query = p_q + i_batch * stride_qb + i_head * stride_qh + row.to(tl.int64) * stride_ql
    b_q = load_rows(p_query, stride_ql, length, BLOCK_M, HEAD_DIM, True, UPCAST)
    p_list = p_lists + i_batch * stride_listb + i_head * stride_listh + i_tile.to(tl.int64) * stride_listn
    i_count = i_batch * stride_countb + i_head * stride_counth + i_tile
    count = tl.load(p_count + i_count)
    full = tl.load(p_full + i_count)
    p_k += i_batch * stride_kb + i_head * stride_kh
    p_v += i_batch * stride_vb + i_head * stride_vh
    p_kc += i_batch * stride_kcb + i_head * stride_kch
    p_vc += i_batch * stride_vcb + i_head * stride_vch
    i_k, i_k_column = (i_batch * step_kb + i_head * step_kh).to(tl.int32), (i_head * step_kc).to(tl.int32)
    i_v, i_v_column = (i_batch * step_vb + i_head * step_vh).to(tl.int32), (i_head * step_vc).to(tl.int32)

    b_acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_acc, b_sum, b_max = attend(
        b_acc,
        b_sum,
        b_max,
        b_q,
        p_k,
        p_v,
        p_kc,
        p_vc,
        stride_kl,
        stride_vl,
        stride_kcl,
        stride_vcl,
        d_k,
        d_v,
        i_k,
        i_k_column,
        i_v,
        i_v_column,
        p_list,
        0,
        full,
        num_cached,
        scale_log2,
        HEAD_DIM,
        BLOCK_N,
        KEY_TILE,
        False,
        TWO_SOURCES,
        TMA,
        UPCAST,
    )
    b_acc, b_sum, b_max = attend(
        b_acc,
        b_sum,
        b_max,
        b_q,
        p_k,
        p_v,
        p_kc,
        p_vc,
        stride_kl,
        stride_vl,
        stride_kcl,
        stride_vcl,
        d_k,
        d_v,
        i_k,
        i_k_column,
        i_v,
        i_v_column,
        p_list,
        full,
        count,
        num_cached,
        scale_log2,
        HEAD_DIM,
        BLOCK_N,
        KEY_TILE,
        True,
        TWO_SOURCES,
        TMA,
        UPCAST,
    )

    b_seen = b_sum > 0
    b_sum = tl.where(b_seen, b_sum, 1.0)
    b_out = b_acc / b_sum[:, None]
    b_lse = tl.where(b_seen, b_max + tl.log2(b_sum), float("-inf"))
    i_out = ((i_batch * num_queries + row + i_row) * num_heads + i_head) * HEAD_DIM
    p_block = p_out + i_out[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(p_block, b_out.to(p_out.dtype.element_ty), mask=i_row[:, None] < length)
    tl.store(p_lse + (i_batch * num_heads + i_head) * num_queries + row + i_row, b_lse, mask=i_row < length)
