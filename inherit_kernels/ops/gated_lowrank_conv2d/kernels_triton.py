"""The kernels of `gated_lowrank_conv2d`: the forward in two; what its backward needs beside `common/triton_conv.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from inherit_kernels.common.triton_conv import conv_steps, conv_tile, sum_tiles, window_rows
from inherit_kernels.common.triton_functions import activate, column, softmax_heads


@triton.jit
def gated_lowrank_conv2d_fwd_down_kernel(
    p_x, p_down, p_partials, p_t, p_sums, M, P, Wo, R, C, Hi, Wi, s_h, s_w, pad_h, pad_w, dil_h, dil_w,
    s_xb, s_xc, s_xh, s_xw, s_dr, s_dk, s_tb, s_tr, s_tp, tiles,
    KH: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    SPLIT_K: tl.constexpr, FEW: tl.constexpr, PRECISION: tl.constexpr,
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
            0, conv_steps(C, KH, KW, BK, FEW), KH, KW, BM, BR, BK, FEW, PRECISION,
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
def merged_up(
    p_up, p_bias, b_g, o_n, R, N, H, s_uh, s_un, s_ur, s_bh, s_bn,
    HAS_BIAS: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Σ_h g_h up_h `[BN, BR]` and Σ_h g_h bias_h `[BN]` in float32 for the channels o_n."""
    o_r = tl.arange(0, BR)
    m_n = o_n < N
    mask = m_n[:, None] & (o_r < R)[None, :]
    b_up = tl.zeros((BN, BR), tl.float32)
    b_bias = tl.zeros((BN,), tl.float32)
    for head in range(H):
        b_gh = tl.sum(column(b_g, head, BH), 0)
        p_ups = p_up + tl.cast(head, tl.int64) * s_uh + o_n[:, None] * s_un + o_r.to(tl.int64)[None, :] * s_ur
        b_up += b_gh * tl.load(p_ups, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            p_biases = p_bias + tl.cast(head, tl.int64) * s_bh + o_n * s_bn
            b_bias += b_gh * tl.load(p_biases, mask=m_n, other=0.0).to(tl.float32)
    return b_up, b_bias


@triton.jit
def store_outputs(
    b_z, p_residual, p_y, b, o_p, o_n, P, N, s_rb, s_rn, s_rp, s_yb, s_yn, s_yp,
    ACTIVATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y = act(z + residual) at the positions o_p and channels o_n of sample b."""
    mask = (o_p < P)[:, None] & (o_n < N)[None, :]
    o_p = o_p.to(tl.int64)
    if HAS_RESIDUAL:
        p_rs = p_residual + b * s_rb + o_p[:, None] * s_rp + o_n[None, :] * s_rn
        b_z += tl.load(p_rs, mask=mask, other=0.0).to(tl.float32)
    p_ys = p_y + b * s_yb + o_p[:, None] * s_yp + o_n[None, :] * s_yn
    tl.store(p_ys, activate(b_z, ACTIVATION).to(p_y.dtype.element_ty), mask=mask)


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
    o_r = tl.arange(0, BR)
    b_g = gate_of_sample(
        p_sums, p_gate_weight, p_gate_bias, b, sum_tiles, P, R, H, s_gh, s_gr, s_gb, HAS_GATE_BIAS, BH, 32, 32
    )
    b_merged, b_bias = merged_up(
        p_up, p_bias, b_g, o_n, R, N, H, s_uh, s_un, s_ur, s_bh, s_bn, HAS_BIAS, BN, BR, BH
    )  # fmt: skip
    b_up = tl.trans(b_merged.to(p_t.dtype.element_ty))  # [BR, BN], rounded once

    begin = share * (TILES * BM)
    for p in range(begin, tl.minimum(begin + TILES * BM, P), BM):
        o_p = p + tl.arange(0, BM)
        p_ts = p_t + b * s_tb + o_p.to(tl.int64)[:, None] * s_tp + o_r.to(tl.int64)[None, :] * s_tr
        b_t = tl.load(p_ts, mask=(o_p < P)[:, None] & (o_r < R)[None, :], other=0.0)  # [BM, BR]
        b_z = tl.dot(b_t, b_up, input_precision=PRECISION) + b_bias[None, :]
        store_outputs(
            b_z, p_residual, p_y, b, o_p, o_n, P, N, s_rb, s_rn, s_rp, s_yb, s_yn, s_yp, ACTIVATION, HAS_RESIDUAL
        )


# --- backward: the gate's share ----------------------------------------------------------------------------------------


@triton.jit
def gated_lowrank_conv2d_bwd_merge_kernel(
    p_products, p_dz_sums, p_t_sums, p_up, p_gate_weight, p_gate_bias, p_bias, p_merged, p_gate, p_dg,
    P, R, N, H, s_uh, s_un, s_ur, s_gh, s_gr, s_gb, s_bh, s_bn, n_tiles,
    HAS_GATE_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """For BN channels of one sample: the merged up projection `[B, N, R]` and parts `[B, n_tiles, H]` of the gate's gradient.

    dg_h = Σ products ⊙ (up_h − merged) + dz_sums·(bias_h − merged), with products `[B, N, R]` and dz_sums `[B, N]` the sums
    over positions of dz·t and dz. The softmax would cancel what heads have in common: better before it is rounded. Also
    stores the gate `[B, H]`, which follows from the sums of t `[B, R]`.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // n_tiles
    o_n = (pid - b * n_tiles) * BN + tl.arange(0, BN)
    o_h = tl.arange(0, BH)
    m_n = o_n < N
    b_g = gate_of_sample(
        p_t_sums, p_gate_weight, p_gate_bias, b, 1, P, R, H, s_gh, s_gr, s_gb, HAS_GATE_BIAS, BH, 1, 32
    )
    b_dg = tl.zeros((BH,), tl.float32)
    for r in range(0, R, BR):
        o_r = r + tl.arange(0, BR)
        mask = m_n[:, None] & (o_r < R)[None, :]
        o_products = (b * N + o_n)[:, None] * R + o_r[None, :]
        b_products = tl.load(p_products + o_products, mask=mask, other=0.0)  # [BN, BR]
        b_merged = tl.zeros((BN, BR), tl.float32)
        for head in range(H):
            p_ups = p_up + tl.cast(head, tl.int64) * s_uh + o_n[:, None] * s_un + o_r.to(tl.int64)[None, :] * s_ur
            b_up = tl.load(p_ups, mask=mask, other=0.0).to(tl.float32)
            b_merged += tl.sum(column(b_g, head, BH), 0) * b_up
        for head in range(H):
            p_ups = p_up + tl.cast(head, tl.int64) * s_uh + o_n[:, None] * s_un + o_r.to(tl.int64)[None, :] * s_ur
            b_up = tl.load(p_ups, mask=mask, other=0.0).to(tl.float32)
            b_dg += tl.where(o_h == head, tl.sum(b_products * (b_up - b_merged)), 0.0)
        tl.store(p_merged + o_products, b_merged.to(p_merged.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        b_dz_sum = tl.load(p_dz_sums + b * N + o_n, mask=m_n, other=0.0)
        p_biases = p_bias + o_h.to(tl.int64)[:, None] * s_bh + o_n[None, :] * s_bn
        b_bias = tl.load(p_biases, mask=(o_h < H)[:, None] & m_n[None, :], other=0.0).to(tl.float32)  # [BH, BN]
        b_dg += tl.sum((b_bias - tl.sum(tl.trans(b_g) * b_bias, 0)[None, :]) * b_dz_sum[None, :], 1)
    tl.store(p_dg + pid * H + o_h, b_dg, mask=o_h < H)
    if pid == b * n_tiles:
        tl.store(p_gate + b * H + o_h, tl.sum(b_g, 0), mask=o_h < H)


@triton.jit
def gated_lowrank_conv2d_bwd_gate_kernel(
    p_dg, p_gate, p_gate_weight, p_d_logits, p_ds, P, R, H, s_gh, s_gr, n_tiles,
    BT: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Through softmax and mean of one sample: the gradients at the logits `[B, H]` and, a position, at t `[B, R]`."""
    b = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BH)
    o_t = tl.arange(0, BT)
    m_h = o_h < H
    b_dg = tl.zeros((BH,), tl.float32)
    for tile in range(0, n_tiles, BT):
        p_parts = p_dg + (b * n_tiles + tile + o_t)[:, None] * H + o_h[None, :]
        b_dg += tl.sum(tl.load(p_parts, mask=(o_t < n_tiles - tile)[:, None] & m_h[None, :], other=0.0), 0)
    b_g = tl.load(p_gate + b * H + o_h, mask=m_h, other=0.0)
    b_d_logits = b_g * (b_dg - tl.sum(b_g * b_dg, 0))
    tl.store(p_d_logits + b * H + o_h, b_d_logits, mask=m_h)
    for r in range(0, R, BR):
        o_r = r + tl.arange(0, BR)
        m_r = o_r < R
        p_weights = p_gate_weight + o_h.to(tl.int64)[:, None] * s_gh + o_r[None, :] * s_gr
        b_weight = tl.load(p_weights, mask=m_h[:, None] & m_r[None, :], other=0.0).to(tl.float32)  # [BH, BR]
        tl.store(p_ds + b * R + o_r, tl.sum(b_weight * b_d_logits[:, None], 0) / P, mask=m_r)


@triton.jit
def gated_lowrank_conv2d_bwd_sum_kernel(
    p_scale, p_values, p_out, p_scale_sums, B, Q, H, divisor, q_tiles,
    HAS_SCALE_SUMS: tl.constexpr, BB: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """out[h] `[Q]` = Σ_b scale[b, h] values[b] / divisor; and Σ_b scale[b, h]: the gradients that all samples share."""
    pid = tl.program_id(0).to(tl.int64)
    head = pid // q_tiles
    q_tile = pid - head * q_tiles
    o_q = q_tile * BQ + tl.arange(0, BQ)
    o_b = tl.arange(0, BB)
    m_q = o_q < Q
    b_sum = tl.zeros((BQ,), tl.float32)
    b_scale_sum = tl.zeros((), tl.float32)
    for b in range(0, B, BB):
        m_b = o_b < B - b
        o_rows = (b + o_b).to(tl.int64)
        b_scale = tl.load(p_scale + o_rows * H + head, mask=m_b, other=0.0)
        mask = m_b[:, None] & m_q[None, :]
        b_values = tl.load(p_values + o_rows[:, None] * Q + o_q[None, :], mask=mask, other=0.0)  # [BB, BQ]
        b_sum += tl.sum(b_scale[:, None] * b_values, 0)
        b_scale_sum += tl.sum(b_scale, 0)
    tl.store(p_out + head * Q + o_q, (b_sum / divisor).to(p_out.dtype.element_ty), mask=m_q)
    if HAS_SCALE_SUMS:  # noqa: SIM102 - decided while compiling, unlike the next
        if q_tile == 0:
            tl.store(p_scale_sums + head, b_scale_sum.to(p_scale_sums.dtype.element_ty))
