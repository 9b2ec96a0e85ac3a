"""Triton kernels and tile products that several ops share; `common/triton_products.py` launches them.

Offsets that strides multiply are 64 bit throughout: o_* are `tl.int64`, masks m_* come from them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block(start, SIZE: tl.constexpr):
    """start … start + SIZE - 1 in 64 bits."""
    return start + tl.arange(0, SIZE).to(tl.int64)


@triton.jit
def widen(value):
    """A size, stride or index as a 64-bit scalar, whatever the compiler has specialised it to."""
    return tl.full((), 0, tl.int64) + value


@triton.jit
def add_product(
    b_sum,  # [BM, BN] float32
    p_a,  # [BM, 1]: the rows of a
    p_b,  # [1, BN]: the columns of b
    m_a,  # [BM, 1]
    m_b,  # [1, BN]
    depth,
    stride_a,
    stride_b,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """b_sum + a·b over `depth`, the operands read in steps of BK."""
    o_k = block(0, BK)
    step_a = BK * widen(stride_a)
    step_b = BK * widen(stride_b)
    p_a += o_k[None, :] * stride_a  # [BM, BK]
    p_b += o_k[:, None] * stride_b  # [BK, BN]
    for k in range(0, depth, BK):
        m_k = tl.arange(0, BK) < depth - k
        b_a = tl.load(p_a, mask=m_a & m_k[None, :], other=0.0)
        b_b = tl.load(p_b, mask=m_k[:, None] & m_b, other=0.0)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
        p_a += step_a
        p_b += step_b
    return b_sum


@triton.jit
def sum_of_partials(p_partials, mask, step, SPLITS: tl.constexpr):
    """Σ over the splits, in order, of float32 tiles `step` elements apart. Unrolled: the loads are in flight together."""
    b_sum = tl.load(p_partials, mask=mask, other=0.0)
    for _ in tl.static_range(1, SPLITS):
        p_partials += step
        b_sum += tl.load(p_partials, mask=mask, other=0.0)
    return b_sum


@triton.jit
def partial_product_kernel(
    p_a,  # [M, K]
    p_b,  # [R, K]
    p_partials,  # [SPLIT_K, M, R] float32
    M,
    K,
    R,
    stride_am,
    stride_ak,
    stride_br,
    stride_bk,
    SPLIT_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BR_TILE: tl.constexpr,
    BK: tl.constexpr,
):
    """a·bᵀ, its depth split over SPLIT_K programs. Grid: row tiles × (rank tiles × SPLIT_K), the last fastest."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_r = tl.cdiv(R, BR_TILE)
    split = pid % SPLIT_K
    tile = pid // SPLIT_K
    o_m = block(tile // tiles_r * BM, BM)
    o_r = block(tile % tiles_r * BR_TILE, BR_TILE)
    m_m, m_r = (o_m < M)[:, None], (o_r < R)[None, :]

    share = tl.cdiv(tl.cdiv(K, BK), SPLIT_K) * BK  # of the depth
    first = split * share
    depth = tl.minimum(K - first, share).to(tl.int32)
    b_sum = add_product(
        tl.zeros([BM, BR_TILE], tl.float32),
        p_a + o_m[:, None] * stride_am + first * stride_ak,
        p_b + o_r[None, :] * stride_br + first * stride_bk,
        m_m,
        m_r,
        depth,
        stride_ak,
        stride_bk,
        BK,
        PRECISION,
    )
    p_out = p_partials + split * M * R + o_m[:, None] * R + o_r[None, :]
    tl.store(p_out, b_sum, mask=m_m & m_r)


@triton.jit
def weight_gradient_kernel(
    p_a,  # [M, P]
    p_b,  # [M, Q]
    p_scale,  # [M, H] float32
    p_out,  # [SPLIT_M, H, P, Q] by strides
    p_sums,  # [SPLIT_M, H, P]
    M,
    P,
    Q,
    H,
    stride_am,
    stride_ap,
    stride_bm,
    stride_bq,
    stride_split,
    stride_oh,
    stride_op,
    stride_oq,
    SPLIT_M: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STORE_OUT: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    BM: tl.constexpr,
):
    """out[h, p, q] = Σ_m scale[m, h] a[m, p] b[m, q], and the column sums Σ_m scale[m, h] a[m, p].

    Grid: SPLIT_M × tiles of P × heads × tiles of Q, the last fastest, so that programs side by side read the same rows
    of a. The column sums are one more product, with the scale (or ones) as the only column of a 16-wide operand.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles_q = tl.cdiv(Q, BQ) if STORE_OUT else 1
    tile_q = pid % tiles_q
    head = pid // tiles_q % H
    rest = pid // tiles_q // H
    tiles_p = tl.cdiv(P, BP)
    tile_p = rest % tiles_p
    split = rest // tiles_p

    share = tl.cdiv(tl.cdiv(M, BM), SPLIT_M).to(tl.int64) * BM  # of the rows
    first = split * share
    depth = tl.minimum(M - first, share).to(tl.int32)
    o_p, o_q, o_m = block(tile_p * BP, BP), block(tile_q * BQ, BQ), block(0, BM)
    m_p, m_q = o_p < P, o_q < Q
    p_a += first * stride_am + o_p[:, None] * stride_ap + o_m[None, :] * stride_am  # [BP, BM]
    p_b += first * stride_bm + o_m[:, None] * stride_bm + o_q[None, :] * stride_bq  # [BM, BQ]
    p_scale += (first + o_m) * H + head  # [BM]
    step_a = BM * widen(stride_am)
    step_b = BM * widen(stride_bm)
    step_scale = BM * widen(H)
    dtype: tl.constexpr = p_b.dtype.element_ty
    m_first = (tl.arange(0, 16) == 0)[None, :]

    b_out = tl.zeros([BP, BQ], tl.float32)
    b_sums = tl.zeros([BP, 16], tl.float32)
    for m in range(0, depth, BM):
        m_m = tl.arange(0, BM) < depth - m
        b_a = tl.load(p_a, mask=m_p[:, None] & m_m[None, :], other=0.0).to(dtype)
        b_scale = tl.full([BM], 1.0, tl.float32)
        if HAS_SCALE:
            b_scale = tl.load(p_scale, mask=m_m, other=0.0)
        if STORE_OUT:
            b_b = tl.load(p_b, mask=m_m[:, None] & m_q[None, :], other=0.0)
            if HAS_SCALE:
                b_b = (b_b.to(tl.float32) * b_scale[:, None]).to(dtype)
            b_out = tl.dot(b_a, b_b, b_out, input_precision=PRECISION)
        if STORE_SUMS:
            b_column = tl.where(m_first, b_scale[:, None], 0.0).to(dtype)  # [BM, 16]
            b_sums = tl.dot(b_a, b_column, b_sums, input_precision=PRECISION)
        p_a += step_a
        p_b += step_b
        p_scale += step_scale

    if STORE_OUT:
        p_tile = p_out + split * stride_split + head * stride_oh + o_p[:, None] * stride_op + o_q[None, :] * stride_oq
        tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m_p[:, None] & m_q[None, :])
    if STORE_SUMS:
        if tile_q == 0:
            p_column = p_sums + split * stride_split + head * P + o_p[:, None] + tl.zeros([1, 16], tl.int64)
            tl.store(p_column, b_sums.to(p_sums.dtype.element_ty), mask=m_p[:, None] & m_first)


@triton.jit
def sum_partials_kernel(
    p_partials,  # [SPLITS, SIZE + SUMS] float32
    p_out,  # [SIZE]
    p_sums,  # [SUMS]
    SIZE,
    SUMS,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second pass of `weight_gradient_kernel`: sums the partials in order and rounds once."""
    o = block(tl.program_id(0).to(tl.int64) * BLOCK, BLOCK)
    width = widen(SIZE) + SUMS
    b_sum = sum_of_partials(p_partials + o, o < width, width, SPLITS)
    tl.store(p_out + o, b_sum.to(p_out.dtype.element_ty), mask=o < SIZE)
    tl.store(p_sums + o - SIZE, b_sum.to(p_sums.dtype.element_ty), mask=(o >= SIZE) & (o < width))
