"""The backward kernels; README.md has the derivation. There are no atomics: every gradient is written once, in a fixed
order.

dq_kernel and dkv_kernel recompute p = exp2(scale_log2 * dot(q, k) - lse) from the raw operands, as the forward does,
and ds = p * (dot(dout, v) - delta), where delta = rowsum(out * dout) - dlse.
"""

import triton
import triton.language as tl

from fastgen.ops.block_sparse_attention.kernel import load_described, load_rows, pick_source


@triton.jit
def delta_kernel(
    p_out,
    p_dout,
    p_dlse,
    p_delta,
    num_rows,
    num_heads,
    num_queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """delta [B, H, Lq] float32.  out, dout [B, Lq, H, HEAD_DIM] contiguous.  dlse [B, H, Lq], for the natural lse.

    Grid: (B * Lq * H / BLOCK_M,)."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # counts over (batch, query, head)
    length = num_rows - tl.program_id(0).to(tl.int64) * BLOCK_M
    i_block = tl.program_id(0).to(tl.int64) * BLOCK_M * HEAD_DIM
    b_out = load_rows(p_out + i_block, HEAD_DIM, length, BLOCK_M, HEAD_DIM, True, UPCAST)
    b_dout = load_rows(p_dout + i_block, HEAD_DIM, length, BLOCK_M, HEAD_DIM, True, UPCAST)
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    i_token = i_row // num_heads
    i_query = ((i_token // num_queries) * num_heads + i_row % num_heads) * num_queries + i_token % num_queries
    if HAS_DLSE:
        b_delta -= tl.load(p_dlse + i_query, mask=i_row < num_rows, other=0.0)
    tl.store(p_delta + i_query, b_delta, mask=i_row < num_rows)


@triton.jit
def gather_dq(
    b_dq,
    b_q,
    b_dout,
    b_lse,
    b_delta,
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
    """Adds ds k, over entries i_first to i_last - 1 of a list, to b_dq [BLOCK_M, HEAD_DIM]."""
    PARTS: tl.constexpr = KEY_TILE // BLOCK_N
    for i in tl.range(i_first * PARTS, i_last * PARTS):
        entry = tl.load(p_list + i // PARTS)
        skipped = (i % PARTS) * BLOCK_N
        row = (entry >> 8) + skipped
        length = (entry & 255) + 1 - skipped
        if TMA and not RAGGED:
            b_k = load_described(d_k, i_k + row, i_k_column, UPCAST)
            b_v = load_described(d_v, i_v + row, i_v_column, UPCAST)
        else:
            p_key, stride_key = pick_source(row, p_kc, p_k, stride_kcl, stride_kl, num_cached, TWO_SOURCES)
            b_k = load_rows(p_key, stride_key, length, BLOCK_N, HEAD_DIM, RAGGED, UPCAST)
            p_value, stride_value = pick_source(row, p_vc, p_v, stride_vcl, stride_vl, num_cached, TWO_SOURCES)
            b_v = load_rows(p_value, stride_value, length, BLOCK_N, HEAD_DIM, RAGGED, UPCAST)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
        if RAGGED:
            b_s = tl.where(tl.arange(0, BLOCK_N)[None, :] < length, b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit
def dq_kernel(
    p_q,
    p_k,
    p_v,
    p_kc,
    p_vc,
    d_k,
    d_v,
    p_dout,
    p_lse,
    p_delta,
    p_dq,
    p_tiles,
    p_lists,
    p_count,
    p_full,
    scale_log2,
    scale,
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
    """dq [B, Lq, H, HEAD_DIM], contiguous like dout. Grid: (query tiles * QUERY_TILE // BLOCK_M, batch * heads)."""
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

    i_stat = (i_batch * num_heads + i_head) * num_queries + row + i_row
    b_lse = tl.load(p_lse + i_stat, mask=i_row < length, other=float("inf"))
    b_delta = tl.load(p_delta + i_stat, mask=i_row < length, other=0.0)
    p_query = p_q + i_batch * stride_qb + i_head * stride_qh + row.to(tl.int64) * stride_ql
    b_q = load_rows(p_query, stride_ql, length, BLOCK_M, HEAD_DIM, True, UPCAST)
    i_out = ((i_batch * num_queries + row) * num_heads + i_head) * HEAD_DIM
    b_dout = load_rows(p_dout + i_out, num_heads * HEAD_DIM, length, BLOCK_M, HEAD_DIM, True, UPCAST)
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

    b_dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    b_dq = gather_dq(
        b_dq,
        b_q,
        b_dout,
        b_lse,
        b_delta,
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
    b_dq = gather_dq(
        b_dq,
        b_q,
        b_dout,
        b_lse,
        b_delta,
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
    i_dq = ((i_batch * num_queries + row + i_row) * num_heads + i_head) * HEAD_DIM
    p_block = p_dq + i_dq[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(p_block, (b_dq * scale).to(p_dq.dtype.element_ty), mask=i_row[:, None] < length)


@triton.jit
def gather_dkv(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_q,
    p_dout,
    p_lse,
    p_delta,
    stride_ql,
    stride_dl,
    d_q,
    d_dout,
    i_q,
    i_q_column,
    i_dout,
    i_dout_column,
    p_list,
    i_first,
    i_last,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Adds ds^T q and p^T dout, over entries i_first to i_last - 1 of a list, to b_dk and b_dv [BLOCK_N, HEAD_DIM].

    Query rows beyond the end of a ragged tile have lse +inf, so p = 0. Key rows beyond the end affect only themselves.
    """
    PARTS: tl.constexpr = QUERY_TILE // BLOCK_M
    i_row = tl.arange(0, BLOCK_M)
    for i in tl.range(i_first * PARTS, i_last * PARTS):
        entry = tl.load(p_list + i // PARTS)
        skipped = (i % PARTS) * BLOCK_M
        first = (entry >> 8) + skipped
        row = first.to(tl.int64)
        length = (entry & 255) + 1 - skipped
        if RAGGED:
            b_lse = tl.load(p_lse + row + i_row, mask=i_row < length, other=float("inf"))
            b_delta = tl.load(p_delta + row + i_row, mask=i_row < length, other=0.0)
        else:
            b_lse = tl.load(p_lse + row + i_row)
            b_delta = tl.load(p_delta + row + i_row)
        if TMA and not RAGGED:
            b_q = load_described(d_q, i_q + first, i_q_column, UPCAST)
        else:
            b_q = load_rows(p_q + row * stride_ql, stride_ql, length, BLOCK_M, HEAD_DIM, RAGGED, UPCAST)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2  # [BLOCK_N, BLOCK_M]
        b_p = tl.exp2(b_s - b_lse[None, :])
        if TMA and not RAGGED:
            b_dout = load_described(d_dout, i_dout + first, i_dout_column, UPCAST)
        else:
            b_dout = load_rows(p_dout + row * stride_dl, stride_dl, length, BLOCK_M, HEAD_DIM, RAGGED, UPCAST)
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def dkv_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    d_q,
    d_dout,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    p_tiles,
    p_lists,
    p_count,
    p_full,
    scale_log2,
    scale,
    num_heads,
    num_queries,
    num_keys,
    first_row,
    i_first_tile,
    step_qb,
    step_qh,
    step_qc,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
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
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dk, dv [B, num_keys, H, HEAD_DIM] contiguous, of one source. Its row 0 is row `first_row` among all keys.

    Grid: (key tiles * KEY_TILE // BLOCK_N, batch * heads), over the key tiles from i_first_tile on."""
    PARTS: tl.constexpr = KEY_TILE // BLOCK_N
    i_tile = i_first_tile + tl.program_id(0) // PARTS
    i_batch = (tl.program_id(1) // num_heads).to(tl.int64)
    i_head = (tl.program_id(1) % num_heads).to(tl.int64)
    tile = tl.load(p_tiles + i_tile)
    skipped = (tl.program_id(0) % PARTS) * BLOCK_N
    row = (tile >> 8) + skipped - first_row
    length = (tile & 255) + 1 - skipped
    if length <= 0:
        return
    i_row = tl.arange(0, BLOCK_N)

    p_key = p_k + i_batch * stride_kb + i_head * stride_kh + row.to(tl.int64) * stride_kl
    p_value = p_v + i_batch * stride_vb + i_head * stride_vh + row.to(tl.int64) * stride_vl
    b_k = load_rows(p_key, stride_kl, length, BLOCK_N, HEAD_DIM, True, UPCAST)
    b_v = load_rows(p_value, stride_vl, length, BLOCK_N, HEAD_DIM, True, UPCAST)
    p_list = p_lists + i_batch * stride_listb + i_head * stride_listh + i_tile.to(tl.int64) * stride_listn
    i_count = i_batch * stride_countb + i_head * stride_counth + i_tile
    count = tl.load(p_count + i_count)
    full = tl.load(p_full + i_count)
    p_q += i_batch * stride_qb + i_head * stride_qh
    p_dout += (i_batch * num_queries * num_heads + i_head) * HEAD_DIM
    p_lse += (i_batch * num_heads + i_head) * num_queries
    p_delta += (i_batch * num_heads + i_head) * num_queries
    stride_dl = num_heads * HEAD_DIM
    i_q, i_q_column = (i_batch * step_qb + i_head * step_qh).to(tl.int32), (i_head * step_qc).to(tl.int32)
    i_dout, i_dout_column = (i_batch * num_queries).to(tl.int32), (i_head * HEAD_DIM).to(tl.int32)

    b_dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    b_dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    b_dk, b_dv = gather_dkv(
        b_dk,
        b_dv,
        b_k,
        b_v,
        p_q,
        p_dout,
        p_lse,
        p_delta,
        stride_ql,
        stride_dl,
        d_q,
        d_dout,
        i_q,
        i_q_column,
        i_dout,
        i_dout_column,
        p_list,
        0,
        full,
        scale_log2,
        HEAD_DIM,
        BLOCK_M,
        QUERY_TILE,
        False,
        TMA,
        UPCAST,
    )
    b_dk, b_dv = gather_dkv(
        b_dk,
        b_dv,
        b_k,
        b_v,
        p_q,
        p_dout,
        p_lse,
        p_delta,
        stride_ql,
        stride_dl,
        d_q,
        d_dout,
        i_q,
        i_q_column,
        i_dout,
        i_dout_column,
        p_list,
        full,
        count,
        scale_log2,
        HEAD_DIM,
        BLOCK_M,
        QUERY_TILE,
        True,
        TMA,
        UPCAST,
    )
    i_dk = ((i_batch * num_keys + row + i_row) * num_heads + i_head) * HEAD_DIM
    i_block = i_dk[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(p_dk + i_block, (b_dk * scale).to(p_dk.dtype.element_ty), mask=i_row[:, None] < length)
    tl.store(p_dv + i_block, b_dv.to(p_dv.dtype.element_ty), mask=i_row[:, None] < length)
