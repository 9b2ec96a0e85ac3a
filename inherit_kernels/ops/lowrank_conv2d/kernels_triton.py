"""The forward of `lowrank_conv2d` in one kernel; its backward is that of `common/triton_conv.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from inherit_kernels.common.triton_conv import conv_steps, conv_tile, sum_tiles, window_rows
from inherit_kernels.common.triton_functions import activate


@triton.jit
def lowrank_conv2d_fwd_kernel(
    p_x, p_down, p_up, p_bias, p_residual, p_partials, p_t, p_y,
    M, P, Wo, R, C, N, Hi, Wi, s_h, s_w, pad_h, pad_w, dil_h, dil_w,
    s_xb, s_xc, s_xh, s_xw, s_dr, s_dk, s_un, s_ur, s_bn, s_rb, s_rn, s_rp, s_tb, s_tr, s_tp, s_yb, s_yn, s_yp,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, STORE_T: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT_N: tl.constexpr, SPLIT_K: tl.constexpr, FEW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """t stays on chip: BM outputs (sample, position) by the whole rank, then times `up` in tiles of BN channels.

    SPLIT_N programs share a tile of outputs and compute t each; with SPLIT_K > 1 they read its partials instead.
    """
    pid = tl.program_id(0).to(tl.int64)
    split = (pid % SPLIT_N).to(tl.int32)
    o_m = (pid // SPLIT_N) * BM + tl.arange(0, BM)
    m_row = o_m < M
    o_b = o_m // P
    o_p = o_m - o_b * P
    if SPLIT_K == 1:
        o_rows, o_y, o_x = window_rows(o_b, o_p, Wo, s_h, s_w, pad_h, pad_w, s_xb, s_xh, s_xw)
        b_t = conv_tile(
            p_x, o_rows, o_y, o_x, m_row, p_down, R, C, Hi, Wi, s_xc, s_xh, s_xw, s_dr, s_dk, dil_h, dil_w,
            0, conv_steps(C, KH, KW, BK, FEW), KH, KW, BM, BR, BK, FEW, PRECISION,
        )  # fmt: skip
    else:
        b_t = sum_tiles(p_partials, o_m, m_row, M, R, SPLIT_K, BM, BR)
    b_t = b_t.to(p_x.dtype.element_ty)
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    if STORE_T:  # noqa: SIM102 - decided while compiling, unlike the next
        if split == 0:
            p_ts = p_t + (o_b * s_tb + o_p * s_tp)[:, None] + o_r.to(tl.int64)[None, :] * s_tr
            tl.store(p_ts, b_t, mask=m_row[:, None] & m_r[None, :])

    share = tl.cdiv(tl.cdiv(N, BN), SPLIT_N) * BN
    begin = split * share
    for n in range(begin, tl.minimum(begin + share, N), BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < N
        o_n = o_n.to(tl.int64)
        p_ups = p_up + o_n[:, None] * s_un + o_r[None, :] * s_ur
        b_up = tl.load(p_ups, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]
        b_z = tl.dot(b_t, tl.trans(b_up), input_precision=PRECISION)
        if HAS_BIAS:
            b_z += tl.load(p_bias + o_n * s_bn, mask=m_n, other=0.0).to(tl.float32)[None, :]
        m_out = m_row[:, None] & m_n[None, :]
        if HAS_RESIDUAL:
            p_rs = p_residual + (o_b * s_rb + o_p * s_rp)[:, None] + o_n[None, :] * s_rn
            b_z += tl.load(p_rs, mask=m_out, other=0.0).to(tl.float32)
        p_ys = p_y + (o_b * s_yb + o_p * s_yp)[:, None] + o_n[None, :] * s_yn
        tl.store(p_ys, activate(b_z, ACTIVATION).to(p_y.dtype.element_ty), mask=m_out)
