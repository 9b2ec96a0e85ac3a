"""The forward of `gated_lowrank_conv2d` in two kernels; its backward is that of `common/triton_conv.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from inherit_kernels.common.triton_conv import conv_tile, sum_tiles, window_rows
from inherit_kernels.common.triton_functions import activate, column, softmax_heads


@triton.jit
def gated_lowrank_conv2d_fwd_down_kernel(
    p_x, p_down, p_partials, p_t, p_sums, M, P, Wo, R, C, Hi, Wi, s_h, s_w, pad_h, pad_w, dil_h, dil_w,
    s_xb, s_xc, s_xh, s_xw, s_dr, s_dk, s_tb, s_tr, s_tp, tiles,
    KH: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    SPLIT_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """t of BM positions of one sample, and its sums over them `[B, tiles, R]`, from which the gate follows."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    o_p = (pid - b * tiles).to(tl.int32) * BM + tl.arange(0, BM)
    m_row = o_p < P
    if SPLIT_K == 1:
        o_rows, o_y, o_x = window_rows(b, o_p, Wo, s_h, s_w, pad_h, pad_w, s_xb, s_xh, s_xw)
        b_t = conv_tile(
            p_x, o_rows, o_y, o_x, m_row, p_down, R, C, Hi, Wi, s_xc, s_xh, s_xw, s_dr, s_dk, dil_h, dil_w,
            0, KH * KW * tl.cdiv(C, BK), KW, BM, BR, BK, PRECISION,
        )  # fmt: skip
    else:
        b_t = sum_tiles(p_partials, b * P + o_p, m_row, M, R, SPLIT_K, BM, BR)
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    tl.store(p_sums + pid * R + o_r, tl.sum(b_t, 0), mask=m_r)
    p_ts = p_t + b * s_tb + o_p.to(tl.int64)[:, None] * s_tp + o_r.to(tl.int64)[None, :] * s_tr
    tl.store(p_ts, b_t.to(p_t.dtype.element_ty), mask=m_row[:, None] & m_r[None, :])


@triton.jit
def gate_of_sample(
    p_sums, p_gate_weight, p_gate_bias, b, tiles, P, R, H, s_gh, s_gr, s_gb,
    HAS_GATE_BIAS: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """g `[1, BH]` of sample b, zero beyond H, from the sums of t over its tiles; a few ranks BQ at a time."""
    o_h = tl.arange(0, BH)
    o_q = tl.arange(0, BQ)
    o_t = tl.arange(0, BT)
    m_h = o_h < H
    b_products = tl.zeros((BH, BQ), tl.float32)
    for r in range(0, R, BQ):
        m_r = o_q < R - r
        b_s = tl.zeros((BQ,), tl.float32)
        for tile in range(0, tiles, BT):
            p_ss = p_sums + (b * tiles + tile + o_t)[:, None] * R + r + o_q[None, :]
            b_sums = tl.load(p_ss, mask=(o_t < tiles - tile)[:, None] & m_r[None, :], other=0.0)  # [BT, BQ]
            b_s += tl.sum(b_sums, 0)
        p_gs = p_gate_weight + o_h[:, None] * s_gh + (r + o_q)[None, :] * s_gr
        b_weight = tl.load(p_gs, mask=m_h[:, None] & m_r[None, :], other=0.0)  # [BH, BQ]
        b_products += b_weight.to(tl.float32) * b_s[None, :]
    b_logits = tl.sum(b_products, 1) / P
    if HAS_GATE_BIAS:
        b_logits += tl.load(p_gate_bias + o_h * s_gb, mask=m_h, other=0.0).to(tl.float32)
    return softmax_heads(b_logits[None, :], H, BH)


@triton.jit
def gated_lowrank_conv2d_fwd_kernel(
    p_t, p_sums, p_up, p_gate_weight, p_gate_bias, p_bias, p_residual, p_y, P, R, N, H, sum_tiles,
    s_uh, s_un, s_ur, s_gh, s_gr, s_gb, s_bh, s_bn, s_rb, s_rn, s_rp, s_tb, s_tr, s_tp, s_yb, s_yn, s_yp,
    shares, n_tiles,
    ACTIVATION: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gate of one sample, its merged up projection for BN channels, and these channels of TILES·BM positions."""
    pid = tl.program_id(0).to(tl.int64)
    o_n = (pid % n_tiles) * BN + tl.arange(0, BN)
    b = pid // n_tiles // shares
    share = (pid // n_tiles - b * shares).to(tl.int32)
    m_n = o_n < N
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    b_g = gate_of_sample(
        p_sums, p_gate_weight, p_gate_bias, b, sum_tiles, P, R, H, s_gh, s_gr, s_gb, HAS_GATE_BIAS, BH, 32, 32
    )
    b_merged = tl.zeros((BN, BR), tl.float32)
    b_bias = tl.zeros((BN,), tl.float32)
    for head in range(H):
        b_gh = tl.sum(column(b_g, head, BH), 0)
        p_ups = p_up + tl.cast(head, tl.int64) * s_uh + o_n[:, None] * s_un + o_r.to(tl.int64)[None, :] * s_ur
        b_merged += b_gh * tl.load(p_ups, mask=m_n[:, None] & m_r[None, :], other=0.0).to(tl.float32)
        if HAS_BIAS:
            p_biases = p_bias + tl.cast(head, tl.int64) * s_bh + o_n * s_bn
            b_bias += b_gh * tl.load(p_biases, mask=m_n, other=0.0).to(tl.float32)
    b_up = tl.trans(b_merged.to(p_t.dtype.element_ty))  # [BR, BN], rounded once

    begin = share * (TILES * BM)
    for p in range(begin, tl.minimum(begin + TILES * BM, P), BM):
        o_p = p + tl.arange(0, BM)
        m_p = o_p < P
        o_p = o_p.to(tl.int64)
        p_ts = p_t + b * s_tb + o_p[:, None] * s_tp + o_r.to(tl.int64)[None, :] * s_tr
        b_t = tl.load(p_ts, mask=m_p[:, None] & m_r[None, :], other=0.0)  # [BM, BR]
        b_z = tl.dot(b_t, b_up, input_precision=PRECISION)
        if HAS_BIAS:
            b_z += b_bias[None, :]
        m_out = m_p[:, None] & m_n[None, :]
        if HAS_RESIDUAL:
            p_rs = p_residual + b * s_rb + o_p[:, None] * s_rp + o_n[None, :] * s_rn
            b_z += tl.load(p_rs, mask=m_out, other=0.0).to(tl.float32)
        p_ys = p_y + b * s_yb + o_p[:, None] * s_yp + o_n[None, :] * s_yn
        tl.store(p_ys, activate(b_z, ACTIVATION).to(p_y.dtype.element_ty), mask=m_out)
