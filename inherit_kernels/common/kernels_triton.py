"""Triton kernels and tile products that several ops share; `common/triton_products.py` launches them.

Pointers p_* are scalars that move in 64 bits, to the tile and along loops; offsets inside a tile are 32 bit, which halves
the registers that addresses take and asks that no tile spans 2³¹ elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(value):
    """A size, stride or index as a 64-bit scalar, whatever the compiler has specialised it to."""
    return tl.full((), 0, tl.int64) + value


@triton.jit
def settled(b_sum, dtype: tl.constexpr):
    """The same sums, in registers of their own where wgmma made them.

    Without the copy ptxas lets every wgmma of a kernel that goes on with the sums wait for the one before (its warning
    C7514 with Triton 3.6; seen in the machine code). In float32 the copy would spill 40 bytes at rank 512.
    """
    if dtype.primitive_bitwidth == 16:
        b_sum += 0.0
    return b_sum


@triton.jit
def add_product(
    b_sum,  # [BM, BN] float32
    p_a,
    p_b,
    o_a,  # [BM, 1]: the offsets of the rows of a
    o_b,  # [1, BN]: the offsets of the columns of b
    m_a,  # [BM, 1]
    m_b,  # [1, BN]
    depth,
    stride_a,
    stride_b,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """b_sum + a·b over `depth`, the operands read in steps of BK."""
    o_k = tl.arange(0, BK)
    o_a = o_a + o_k[None, :] * stride_a  # [BM, BK]
    o_b = o_b + o_k[:, None] * stride_b  # [BK, BN]
    step_a = BK * widen(stride_a)
    step_b = BK * widen(stride_b)
    for k in range(0, depth, BK):
        m_k = o_k < depth - k
        b_a = tl.load(p_a + o_a, mask=m_a & m_k[None, :], other=0.0)
        b_b = tl.load(p_b + o_b, mask=m_k[:, None] & m_b, other=0.0)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
        p_a += step_a
        p_b += step_b
    return settled(b_sum, p_a.dtype.element_ty)


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
    row, rank = tile // tiles_r * BM, tile % tiles_r * BR_TILE
    o_m, o_r = tl.arange(0, BM), tl.arange(0, BR_TILE)
    m_m, m_r = (o_m < M - row)[:, None], (o_r < R - rank)[None, :]

    share = tl.cdiv(tl.cdiv(K, BK), SPLIT_K) * BK  # of the depth
    first = split * share
    b_sum = add_product(
        tl.zeros([BM, BR_TILE], tl.float32),
        p_a + row * stride_am + first * stride_ak,
        p_b + rank * stride_br + first * stride_bk,
        o_m[:, None] * stride_am,
        o_r[None, :] * stride_br,
        m_m,
        m_r,
        tl.minimum(K - first, share).to(tl.int32),
        stride_ak,
        stride_bk,
        BK,
        PRECISION,
    )
    p_partials += (split * M + row) * R + rank
    tl.store(p_partials + o_m[:, None] * R + o_r[None, :], b_sum, mask=m_m & m_r)


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
    of a. The column sums are added up in float32 by ordinary instructions. As a second product, whose operand took the
    shared memory of the first one's, ptxas 12.8 (triton 3.6) computed them from descriptors that nothing had written:
    `testing/machine_code.py`.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles_q = tl.cdiv(Q, BQ) if STORE_OUT else 1
    tile_q = pid % tiles_q
    head = pid // tiles_q % H
    rest = pid // tiles_q // H
    tiles_p = tl.cdiv(P, BP)
    tile_p = rest % tiles_p
    split = rest // tiles_p

    share = widen(tl.cdiv(tl.cdiv(M, BM), SPLIT_M)) * BM  # of the rows
    first = split * share
    depth = tl.minimum(M - first, share).to(tl.int32)
    o_p, o_q, o_m = tl.arange(0, BP), tl.arange(0, BQ), tl.arange(0, BM)
    m_p, m_q = o_p < P - tile_p * BP, o_q < Q - tile_q * BQ
    p_a += first * stride_am + tile_p * BP * stride_ap
    p_b += first * stride_bm + tile_q * BQ * stride_bq
    p_scale += first * H + head
    o_a = o_p[:, None] * stride_ap + o_m[None, :] * stride_am  # [BP, BM]
    o_b = o_m[:, None] * stride_bm + o_q[None, :] * stride_bq  # [BM, BQ]
    step_a, step_b, step_scale = BM * widen(stride_am), BM * widen(stride_bm), BM * widen(H)
    dtype: tl.constexpr = p_b.dtype.element_ty

    b_out = tl.zeros([BP, BQ], tl.float32)
    b_sums = tl.zeros([BP], tl.float32)
    for m in range(0, depth, BM):
        m_m = o_m < depth - m
        b_a = tl.load(p_a + o_a, mask=m_p[:, None] & m_m[None, :], other=0.0)
        if HAS_SCALE:
            b_scale = tl.load(p_scale + o_m * H, mask=m_m, other=0.0)
        if STORE_OUT:
            b_b = tl.load(p_b + o_b, mask=m_m[:, None] & m_q[None, :], other=0.0)
            if HAS_SCALE:
                b_b = (b_b.to(tl.float32) * b_scale[:, None]).to(dtype)
            b_out = tl.dot(b_a.to(dtype), b_b, b_out, input_precision=PRECISION)
        if STORE_SUMS:
            b_terms = b_a.to(tl.float32)
            if HAS_SCALE:
                b_terms *= b_scale[None, :]
            b_sums += tl.sum(b_terms, 1)
        p_a += step_a
        p_b += step_b
        p_scale += step_scale

    if STORE_OUT:
        p_out += split * stride_split + head * stride_oh + tile_p * BP * stride_op + tile_q * BQ * stride_oq
        o_out = o_p[:, None] * stride_op + o_q[None, :] * stride_oq
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_p[:, None] & m_q[None, :])
    if STORE_SUMS:  # noqa: SIM102
        if tile_q == 0:
            p_sums += split * stride_split + head * P + tile_p * BP
            tl.store(p_sums + o_p, b_sums.to(p_sums.dtype.element_ty), mask=m_p)


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
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    width = widen(SIZE) + SUMS
    b_sum = sum_of_partials(p_partials + o, o < width, width, SPLITS)
    tl.store(p_out + o, b_sum.to(p_out.dtype.element_ty), mask=o < SIZE)
    tl.store(p_sums + o - SIZE, b_sum.to(p_sums.dtype.element_ty), mask=(o >= SIZE) & (o < width))
