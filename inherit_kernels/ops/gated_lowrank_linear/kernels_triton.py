"""The Triton kernels of `gated_lowrank_linear`. Nothing of size H × output or H × rank × rows leaves a program."""

from __future__ import annotations

import triton
import triton.language as tl

from inherit_kernels.common.kernels_triton import add_product, sum_of_partials, widen
from inherit_kernels.common.triton_functions import activate, column, softmax_heads


@triton.jit
def gate_of(
    b_t,  # [BM, BR], zero from column R on
    p_gate_weight,
    p_gate_bias,
    H,
    R,
    stride_gh,
    stride_gr,
    stride_gb,
    HAS_GATE_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BH: tl.constexpr,
    BR: tl.constexpr,
):
    """softmax(t·gate_weightᵀ + gate_bias) `[BM, BH]` in float32, zero from column H on."""
    o_r, o_h = tl.arange(0, BR), tl.arange(0, BH)
    p_weight = p_gate_weight + o_r[:, None] * stride_gr + o_h[None, :] * stride_gh  # [BR, BH]
    b_weight = tl.load(p_weight, mask=(o_r < R)[:, None] & (o_h < H)[None, :], other=0.0)
    b_logits = tl.dot(b_t, b_weight, input_precision=PRECISION)
    if HAS_GATE_BIAS:
        b_logits += tl.load(p_gate_bias + o_h * stride_gb, mask=o_h < H, other=0.0).to(tl.float32)[None, :]
    return softmax_heads(b_logits, H, BH)


@triton.jit
def gated_lowrank_linear_fwd_kernel(
    p_x,  # [M, K]
    p_down,  # [R, K]
    p_up,  # [H, N, R]
    p_gate_weight,  # [H, R]
    p_gate_bias,  # [H]
    p_bias,  # [H, N]
    p_residual,  # [M, N]
    p_partials,  # [SPLIT_K, M, R] float32
    p_y,  # [M, N] contiguous
    p_t,  # [M, R] contiguous
    M,
    K,
    N,
    R,
    H,
    programs_n,
    stride_xm,
    stride_xk,
    stride_dr,
    stride_dk,
    stride_uh,
    stride_un,
    stride_ur,
    stride_gh,
    stride_gr,
    stride_gb,
    stride_bh,
    stride_bn,
    stride_rm,
    stride_rn,
    SPLIT_K: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STORE_T: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    """t = x·downᵀ (SPLIT_K = 0), or the sum of its partials; g from t; y = act(Σ_h g_h (up_h t + bias_h) + residual).

    One loop over tiles of N and heads: products are scaled by g_h in float32 after they are made, so t stays one operand
    and the next head's weights load meanwhile.
    Grid: row tiles × programs_n, the last fastest; each of the programs_n has its share of the tiles of N.
    """
    pid = tl.program_id(0).to(tl.int64)
    pid_n = pid % programs_n
    row = pid // programs_n * BM
    o_m, o_r, o_n = tl.arange(0, BM), tl.arange(0, BR), tl.arange(0, BN)
    m_m, m_r = (o_m < M - row)[:, None], o_r < R
    o_t = o_m[:, None] * R + o_r[None, :]
    dtype: tl.constexpr = p_y.dtype.element_ty

    if SPLIT_K > 0:
        b_t = sum_of_partials(p_partials + row * R + o_t, m_m & m_r[None, :], widen(M) * R, SPLIT_K)
    else:
        b_t = add_product(
            tl.zeros([BM, BR], tl.float32),
            p_x + row * stride_xm,
            p_down,
            o_m[:, None] * stride_xm,
            o_r[None, :] * stride_dr,
            m_m,
            m_r[None, :],
            K,
            stride_xk,
            stride_dk,
            BK,
            PRECISION,
        )
    b_t = tl.where(m_r[None, :], b_t, 0.0).to(dtype)  # an infinity in x times the padding is NaN
    if STORE_T:  # noqa: SIM102
        if pid_n == 0:
            tl.store(p_t + row * R + o_t, b_t, mask=m_m & m_r[None, :])
    b_g = gate_of(
        b_t, p_gate_weight, p_gate_bias, H, R, stride_gh, stride_gr, stride_gb, HAS_GATE_BIAS, PRECISION, BH, BR
    )

    share = tl.cdiv(tl.cdiv(N, BN), programs_n) * BN
    first = pid_n * share
    p_up += first * stride_un
    p_bias += first * stride_bn
    p_residual += row * stride_rm + first * stride_rn
    p_y += row * N + first
    o_up = o_r[:, None] * stride_ur + o_n[None, :] * stride_un  # [BR, BN]
    columns = tl.minimum(N - first, share).to(tl.int32)
    b_z = tl.zeros([BM, BN], tl.float32)
    for step in range(tl.cdiv(columns, BN) * H):
        head, n = widen(step % H), widen(step // H) * BN
        m_n = o_n < columns - n
        b_up = tl.load(p_up + head * stride_uh + n * stride_un + o_up, mask=m_r[:, None] & m_n[None, :], other=0.0)
        if HAS_BIAS:  # loaded before the product, which hides the latency
            p_column = p_bias + head * stride_bh + n * stride_bn
            b_bias = tl.load(p_column + o_n * stride_bn, mask=m_n, other=0.0).to(tl.float32)
        b_head = tl.dot(b_t, b_up, input_precision=PRECISION)
        if HAS_BIAS:
            b_head += b_bias[None, :]
        b_head *= column(b_g, head, BH)[:, None]
        b_z = tl.where(head == 0, b_head, b_z + b_head)
        if head == H - 1:
            m_y = m_m & m_n[None, :]
            b_y = b_z
            if HAS_RESIDUAL:
                o_residual = o_m[:, None] * stride_rm + o_n[None, :] * stride_rn
                b_y += tl.load(p_residual + n * stride_rn + o_residual, mask=m_y, other=0.0).to(tl.float32)
            tl.store(p_y + n + o_m[:, None] * N + o_n[None, :], activate(b_y, ACTIVATION).to(dtype), mask=m_y)


@triton.jit
def add_heads(
    b_dt,  # [BM, BR] float32
    b_dg,  # [BM, BH] float32
    b_g,  # [BM, BH]
    p_dz,  # the element [first row, first column]
    p_t,  # the element [first row, 0]
    p_up,  # the element [0, first column, 0]
    p_bias,  # the element [0, first column]
    o_t,  # [BM, BR]: the offsets in t
    m_m,  # [BM, 1]
    columns,
    with_bias,  # whether the bias counts here, where HAS_BIAS
    H,
    R,
    stride_zm,
    stride_zn,
    stride_uh,
    stride_un,
    stride_ur,
    stride_bh,
    stride_bn,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    """With u_h = dz·up_h over the columns given: dt += Σ_h g_h u_h and dg_h += u_h·t + dz·bias_h.

    The columns go in chunks of which every head reads dz again while it is in the cache.
    """
    o_r, o_h = tl.arange(0, BR)[None, :], tl.arange(0, BH)[None, :]
    m_r, m_h = o_r < R, o_h < H
    o_rows = tl.arange(0, BM)[:, None] * stride_zm
    for n in range(0, columns, CHUNK):
        depth = tl.minimum(columns - n, CHUNK)
        first = widen(n)
        p_rows = p_dz + first * stride_zn
        if HAS_BIAS:
            p_columns = p_bias + first * stride_bn
            o_columns = o_h * stride_bh
            bias_depth = depth * with_bias
            b_dg = add_product(
                b_dg, p_rows, p_columns, o_rows, o_columns, m_m, m_h, bias_depth, stride_zn, stride_bn, BK, PRECISION
            )
        for h in range(H):
            head = widen(h)
            p_head = p_up + first * stride_un + head * stride_uh
            o_head = o_r * stride_ur
            b_u = tl.zeros([BM, BR], tl.float32)
            b_u = add_product(b_u, p_rows, p_head, o_rows, o_head, m_m, m_r, depth, stride_zn, stride_un, BK, PRECISION)
            b_dt += column(b_g, head, BH)[:, None] * b_u
            b_t = tl.load(p_t + o_t, mask=m_m & m_r, other=0.0).to(tl.float32)
            b_products = tl.where(m_r, b_u * b_t, 0.0)  # an infinity in dz times the padding is NaN
            b_dg += tl.where(o_h == head, tl.sum(b_products, 1)[:, None], 0.0)
    return b_dt, b_dg


@triton.jit
def gated_lowrank_linear_bwd_partials_kernel(
    p_dz,  # [M, N]
    p_t,  # [M, R]
    p_up,  # [H, N, R]
    p_gate_weight,  # [H, R]
    p_gate_bias,  # [H]
    p_bias,  # [H, N]
    p_dt,  # [SPLIT_K, M, R] float32
    p_dg,  # [rank tiles × SPLIT_K, M, H] float32
    M,
    N,
    R,
    H,
    stride_zm,
    stride_zn,
    stride_tm,
    stride_tr,
    stride_uh,
    stride_un,
    stride_ur,
    stride_gh,
    stride_gr,
    stride_gb,
    stride_bh,
    stride_bn,
    SPLIT_K: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
    BR: tl.constexpr,
    BR_TILE: tl.constexpr,
    BH: tl.constexpr,
):
    """The sums of `add_heads` over N, split over SPLIT_K programs, for BR_TILE of the ranks.

    Grid: row tiles × rank tiles × SPLIT_K, the last fastest.
    """
    pid = tl.program_id(0).to(tl.int64)
    split = pid % SPLIT_K
    RANK_TILES: tl.constexpr = BR // BR_TILE
    tile_r = pid // SPLIT_K % RANK_TILES
    row, rank = pid // SPLIT_K // RANK_TILES * BM, tile_r * BR_TILE
    o_m, o_r, o_h = tl.arange(0, BM), tl.arange(0, BR), tl.arange(0, BH)
    m_m, m_h = (o_m < M - row)[:, None], (o_h < H)[None, :]
    p_t += row * stride_tm
    o_t = o_m[:, None] * stride_tm + o_r[None, :] * stride_tr
    b_t = tl.load(p_t + o_t, mask=m_m & (o_r < R)[None, :], other=0.0)
    b_g = gate_of(
        b_t, p_gate_weight, p_gate_bias, H, R, stride_gh, stride_gr, stride_gb, HAS_GATE_BIAS, PRECISION, BH, BR
    )
    share = tl.cdiv(tl.cdiv(N, BK), SPLIT_K) * BK
    first = split * share
    o_tile = tl.arange(0, BR_TILE)
    b_dt, b_dg = add_heads(
        tl.zeros([BM, BR_TILE], tl.float32),
        tl.zeros([BM, BH], tl.float32),
        b_g,
        p_dz + row * stride_zm + first * stride_zn,
        p_t + rank * stride_tr,
        p_up + first * stride_un + rank * stride_ur,
        p_bias + first * stride_bn,
        o_m[:, None] * stride_tm + o_tile[None, :] * stride_tr,
        m_m,
        tl.where(rank < R, tl.minimum(N - first, share), 0).to(tl.int32),
        (tile_r == 0).to(tl.int32),
        H,
        R - rank,
        stride_zm,
        stride_zn,
        stride_uh,
        stride_un,
        stride_ur,
        stride_bh,
        stride_bn,
        HAS_BIAS,
        PRECISION,
        BM,
        BK,
        CHUNK,
        BR_TILE,
        BH,
    )
    m_r = (o_tile < R - rank)[None, :]
    p_dt += (split * M + row) * R + rank
    p_dg += ((tile_r * SPLIT_K + split) * M + row) * H
    tl.store(p_dt + o_m[:, None] * R + o_tile[None, :], b_dt, mask=m_m & m_r)
    tl.store(p_dg + o_m[:, None] * H + o_h[None, :], b_dg, mask=m_m & m_h)


@triton.jit
def gated_lowrank_linear_bwd_dx_kernel(
    p_dz,  # [M, N]
    p_t,  # [M, R]
    p_down,  # [R, K]
    p_up,  # [H, N, R]
    p_gate_weight,  # [H, R]
    p_gate_bias,  # [H]
    p_bias,  # [H, N]
    p_partial_dt,  # [SPLIT_K, M, R] float32
    p_partial_dg,  # [RANK_TILES × SPLIT_K, M, H] float32
    p_dx,  # [M, K] contiguous
    p_dt,  # [M, R] contiguous
    p_d_logits,  # [M, H] float32
    p_g,  # [M, H] float32
    M,
    K,
    N,
    R,
    H,
    programs_n,
    stride_zm,
    stride_zn,
    stride_tm,
    stride_tr,
    stride_dr,
    stride_dk,
    stride_uh,
    stride_un,
    stride_ur,
    stride_gh,
    stride_gr,
    stride_gb,
    stride_bh,
    stride_bn,
    SPLIT_K: tl.constexpr,
    RANK_TILES: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE_ONLY: tl.constexpr,
    STORE_DX: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    """g again from t; dt and dg by `add_heads` (SPLIT_K = 0) or from the partials; d_logits; dx = dt·down.

    Grid: row tiles × programs_n, the last fastest; each of the programs_n has its share of dx's columns, and the first of
    them stores dt, d_logits and g.
    """
    pid = tl.program_id(0).to(tl.int64)
    pid_n = pid % programs_n
    row = pid // programs_n * BM
    o_m, o_r, o_h = tl.arange(0, BM), tl.arange(0, BR), tl.arange(0, BH)
    m_m, m_r, m_h = (o_m < M - row)[:, None], (o_r < R)[None, :], (o_h < H)[None, :]
    dtype: tl.constexpr = p_dz.dtype.element_ty
    p_t += row * stride_tm
    o_t = o_m[:, None] * stride_tm + o_r[None, :] * stride_tr
    b_t = tl.load(p_t + o_t, mask=m_m & m_r, other=0.0)
    b_g = gate_of(
        b_t, p_gate_weight, p_gate_bias, H, R, stride_gh, stride_gr, stride_gb, HAS_GATE_BIAS, PRECISION, BH, BR
    )
    p_g += row * H
    p_d_logits += row * H
    p_dt += row * R
    o_gates = o_m[:, None] * H + o_h[None, :]
    o_dt = o_m[:, None] * R + o_r[None, :]
    if pid_n == 0:
        tl.store(p_g + o_gates, b_g, mask=m_m & m_h)

    if not GATE_ONLY:
        if SPLIT_K > 0:
            b_dt = sum_of_partials(p_partial_dt + row * R + o_dt, m_m & m_r, widen(M) * R, SPLIT_K)
            b_dg = sum_of_partials(p_partial_dg + row * H + o_gates, m_m & m_h, widen(M) * H, SPLIT_K * RANK_TILES)
        else:
            b_dt, b_dg = add_heads(
                tl.zeros([BM, BR], tl.float32),
                tl.zeros([BM, BH], tl.float32),
                b_g,
                p_dz + row * stride_zm,
                p_t,
                p_up,
                p_bias,
                o_t,
                m_m,
                N,
                1,
                H,
                R,
                stride_zm,
                stride_zn,
                stride_uh,
                stride_un,
                stride_ur,
                stride_bh,
                stride_bn,
                HAS_BIAS,
                PRECISION,
                BM,
                BK,
                CHUNK,
                BR,
                BH,
            )
        b_dg = tl.where(m_h, b_dg, 0.0)
        b_d_logits = b_g * (b_dg - tl.sum(b_g * b_dg, 1)[:, None])
        p_weight = p_gate_weight + o_h[:, None] * stride_gh + o_r[None, :] * stride_gr  # [BH, BR]
        b_weight = tl.load(p_weight, mask=(o_h < H)[:, None] & m_r, other=0.0)
        b_dt = tl.dot(b_d_logits.to(dtype), b_weight, b_dt, input_precision=PRECISION)
        b_dt = tl.where(m_r, b_dt, 0.0).to(dtype)
        if pid_n == 0:
            tl.store(p_d_logits + o_gates, b_d_logits, mask=m_m & m_h)
            tl.store(p_dt + o_dt, b_dt, mask=m_m & m_r)

        if STORE_DX:
            share = tl.cdiv(tl.cdiv(K, BN), programs_n) * BN
            first = pid_n * share
            p_down += first * stride_dk
            p_dx += row * K + first
            o_n = tl.arange(0, BN)
            o_down = o_r[:, None] * stride_dr + o_n[None, :] * stride_dk  # [BR, BN]
            o_dx = o_m[:, None] * K + o_n[None, :]
            step_down = BN * widen(stride_dk)
            columns = tl.minimum(K - first, share).to(tl.int32)
            for n in range(0, columns, BN):
                m_n = (o_n < columns - n)[None, :]
                b_down = tl.load(p_down + o_down, mask=(o_r < R)[:, None] & m_n, other=0.0)
                b_dx = tl.dot(b_dt, b_down, input_precision=PRECISION)
                tl.store(p_dx + o_dx, b_dx.to(dtype), mask=m_m & m_n)
                p_down += step_down
                p_dx += BN
