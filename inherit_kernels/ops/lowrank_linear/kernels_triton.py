"""The Triton kernel of `lowrank_linear`; with its operands exchanged it is the backward's dx too."""

from __future__ import annotations

import triton
import triton.language as tl

from inherit_kernels.common.kernels_triton import add_product, sum_of_partials, widen
from inherit_kernels.common.triton_functions import activate


@triton.jit
def lowrank_linear_fwd_kernel(
    p_x,  # [M, K]
    p_down,  # [R, K]
    p_up,  # [N, R]
    p_bias,  # [N]
    p_residual,  # [M, N]
    p_partials,  # [SPLIT_K, M, R] float32
    p_y,  # [M, N] contiguous
    p_t,  # [M, R] contiguous
    M,
    K,
    N,
    R,
    programs_n,
    stride_xm,
    stride_xk,
    stride_dr,
    stride_dk,
    stride_un,
    stride_ur,
    stride_b,
    stride_rm,
    stride_rn,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STORE_Y: tl.constexpr,
    STORE_T: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """t = x·downᵀ (SPLIT_K = 0), or the sum of its partials; y = act(t·upᵀ + bias + residual), t rounded once between.

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

    if STORE_Y:
        share = tl.cdiv(tl.cdiv(N, BN), programs_n) * BN
        first = pid_n * share
        p_up += first * stride_un
        p_bias += first * stride_b
        p_residual += row * stride_rm + first * stride_rn
        p_y += row * N + first
        o_up = o_r[:, None] * stride_ur + o_n[None, :] * stride_un  # [BR, BN]
        o_residual = o_m[:, None] * stride_rm + o_n[None, :] * stride_rn
        o_y = o_m[:, None] * N + o_n[None, :]
        step_up, step_bias, step_residual = BN * widen(stride_un), BN * widen(stride_b), BN * widen(stride_rn)
        columns = tl.minimum(N - first, share).to(tl.int32)
        for n in range(0, columns, BN):
            m_n = o_n < columns - n
            b_up = tl.load(p_up + o_up, mask=m_r[:, None] & m_n[None, :], other=0.0)
            if HAS_BIAS:  # loaded before the product, which hides the latency
                b_bias = tl.load(p_bias + o_n * stride_b, mask=m_n, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                b_residual = tl.load(p_residual + o_residual, mask=m_m & m_n[None, :], other=0.0).to(tl.float32)
            b_z = tl.dot(b_t, b_up, input_precision=PRECISION)
            if HAS_BIAS:
                b_z += b_bias[None, :]
            if HAS_RESIDUAL:
                b_z += b_residual
            tl.store(p_y + o_y, activate(b_z, ACTIVATION).to(dtype), mask=m_m & m_n[None, :])
            p_up += step_up
            p_bias += step_bias
            p_residual += step_residual
            p_y += BN
