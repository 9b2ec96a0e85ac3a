"""Device code of the convolution ops: implicit matrix products over taps and channels, forward and backward.

Letters as in the ops' definitions; a *tap* is one position of the kernel window, numbered row by row. `down` is a matrix
`[R, taps·C]` whose columns run through the channels tap by tap. Images are addressed by sample, position and channel;
only x, which windows slide over, by its four strides. Imports triton: only kernel modules import this.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inherit_kernels.common.kernels_triton import settled


@triton.jit
def window_rows(o_b, o_p, Wo, s_h, s_w, pad_h, pad_w, s_xb, s_xh, s_xw):
    """For outputs (sample, position): offset in x of the first tap, and its row and column, all `[BM]`."""
    o_row = o_p // Wo
    o_y = o_row * s_h - pad_h
    o_x = (o_p - o_row * Wo) * s_w - pad_w
    o_rows = tl.cast(o_b, tl.int64) * s_xb + o_y.to(tl.int64) * s_xh + o_x.to(tl.int64) * s_xw
    return o_rows, o_y.to(tl.int32), o_x.to(tl.int32)


@triton.jit
def conv_steps(C, KH: tl.constexpr, KW: tl.constexpr, BK: tl.constexpr, FEW: tl.constexpr):
    """How many steps `conv_tile` takes in all."""
    if FEW:
        return tl.cdiv(KH * KW * C, BK)
    else:  # noqa: RET505 - Triton would compile what follows too
        return KH * KW * tl.cdiv(C, BK)


@triton.jit
def conv_tile(
    p_x, o_rows, o_y, o_x, m_row, p_down, R, C, Hi, Wi, s_xc, s_xh, s_xw, s_dr, s_dk, dil_h, dil_w, begin, end,
    KH: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, FEW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """t `[BM, BR]` in float32 over the steps begin to end; a step is a block of BK channels at one tap.

    FEW, for channels of which a block would hold few: a step is BK columns of `down`, whatever their taps. A first layer
    of 3 channels and 7×7 taps takes 5 steps of 32 so, not 49. Columns beyond R and rows outside `m_row` are zero, also
    where x or down holds infinities.
    """
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    blocks = tl.cast(tl.cdiv(C, BK), tl.int32)
    begin = tl.cast(begin, tl.int32)
    tap = begin // blocks
    block = begin - tap * blocks
    b_t = tl.zeros((BM, BR), tl.float32)
    for step in range(begin, end):
        if FEW:
            o_k = (step * BK + tl.arange(0, BK)).to(tl.int32)
            o_tap = o_k // C
            m_k = o_tap < KH * KW
            y = ((o_tap // KW) * dil_h)[None, :]
            x = ((o_tap % KW) * dil_w)[None, :]
            o_y2, o_x2 = o_y[:, None] + y, o_x[:, None] + x
            m_x = m_row[:, None] & (o_y2 >= 0) & (o_y2 < Hi) & (o_x2 >= 0) & (o_x2 < Wi) & m_k[None, :]
            o_column = y.to(tl.int64) * s_xh + x.to(tl.int64) * s_xw + (o_k - o_tap * C).to(tl.int64)[None, :] * s_xc
            p_xs = p_x + o_rows[:, None] + o_column
        else:
            o_c = block * BK + tl.arange(0, BK)
            m_k = o_c < C
            y = (tap // KW) * dil_h
            x = (tap % KW) * dil_w
            m_in = m_row & (o_y + y >= 0) & (o_y + y < Hi) & (o_x + x >= 0) & (o_x + x < Wi)
            o_tap = y.to(tl.int64) * s_xh + x.to(tl.int64) * s_xw
            p_xs = p_x + (o_rows + o_tap)[:, None] + o_c.to(tl.int64)[None, :] * s_xc
            m_x = m_in[:, None] & m_k[None, :]
            o_k = tap * C + o_c
        b_x = tl.load(p_xs, mask=m_x, other=0.0)  # [BM, BK]
        o_k = o_k.to(tl.int64)
        p_downs = p_down + o_r.to(tl.int64)[:, None] * s_dr + o_k[None, :] * s_dk
        b_down = tl.load(p_downs, mask=m_r[:, None] & m_k[None, :], other=0.0)  # [BR, BK]
        b_t = tl.dot(b_x, tl.trans(b_down), b_t, input_precision=PRECISION)
        if not FEW:
            block += 1
            tap = tl.where(block == blocks, tap + 1, tap)
            block = tl.where(block == blocks, 0, block)
    return tl.where(m_row[:, None] & m_r[None, :], settled(b_t, p_x.dtype.element_ty), 0.0)


@triton.jit
def sum_tiles(p_partials, o_m, m_row, M, R, SPLIT_K: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr):
    """t `[BM, BR]` as the sum in order of the float32 partials `[SPLIT_K, M, R]`."""
    o_r = tl.arange(0, BR)
    mask = m_row[:, None] & (o_r < R)[None, :]
    b_t = tl.zeros((BM, BR), tl.float32)
    for split in tl.range(0, SPLIT_K, loop_unroll_factor=4):  # a loop waits for each load
        o_rows = (o_m + tl.cast(split, tl.int64) * M) * R
        b_t += tl.load(p_partials + o_rows[:, None] + o_r[None, :], mask=mask, other=0.0)
    return b_t


@triton.jit
def conv_partials_kernel(
    p_x, p_down, p_partials, M, P, Wo, R, C, Hi, Wi, s_h, s_w, pad_h, pad_w, dil_h, dil_w,
    s_xb, s_xc, s_xh, s_xw, s_dr, s_dk,
    KH: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    SPLIT_K: tl.constexpr, FEW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partials of t `[SPLIT_K, M, R]`, each over its share of the taps and channels: for few output positions."""
    pid = tl.program_id(0).to(tl.int64)
    split = (pid % SPLIT_K).to(tl.int32)
    o_m = (pid // SPLIT_K) * BM + tl.arange(0, BM)
    m_row = o_m < M
    o_b = o_m // P
    o_rows, o_y, o_x = window_rows(o_b, o_m - o_b * P, Wo, s_h, s_w, pad_h, pad_w, s_xb, s_xh, s_xw)
    steps = conv_steps(C, KH, KW, BK, FEW)
    share = tl.cdiv(steps, SPLIT_K)
    begin = tl.minimum(split * share, steps)
    end = tl.minimum(begin + share, steps)
    b_t = conv_tile(
        p_x, o_rows, o_y, o_x, m_row, p_down, R, C, Hi, Wi, s_xc, s_xh, s_xw, s_dr, s_dk, dil_h, dil_w,
        begin, end, KH, KW, BM, BR, BK, FEW, PRECISION,
    )  # fmt: skip
    o_r = tl.arange(0, BR)
    p_ts = p_partials + ((o_m + split.to(tl.int64) * M) * R)[:, None] + o_r[None, :]
    tl.store(p_ts, b_t, mask=m_row[:, None] & (o_r < R)[None, :])


@triton.jit
def conv_bwd_dt_kernel(
    p_dz, p_up, p_ds, p_dt, P, N, R, s_zb, s_zp, s_zn, s_ub, s_un, s_ur, tiles, rank_tiles,
    HAS_DS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dt `[B, P, R]` = dz·up, plus ds `[B, R]` at every position; up is one a sample, or shared (s_ub = 0)."""
    pid = tl.program_id(0).to(tl.int64)
    o_r = (pid % rank_tiles).to(tl.int32) * BR + tl.arange(0, BR)
    tile = pid // rank_tiles
    b = tile // tiles
    o_p = (tile - b * tiles) * BM + tl.arange(0, BM)
    m_p = o_p < P
    m_r = o_r < R
    o_n = tl.arange(0, BN)
    p_zs = p_dz + b * s_zb + o_p[:, None] * s_zp + o_n.to(tl.int64)[None, :] * s_zn
    p_us = p_up + b * s_ub + o_n.to(tl.int64)[:, None] * s_un + o_r.to(tl.int64)[None, :] * s_ur
    b_dt = tl.zeros((BM, BR), tl.float32)
    for n in range(0, N, BN):
        m_n = o_n < N - n
        b_dz = tl.load(p_zs, mask=m_p[:, None] & m_n[None, :], other=0.0)  # [BM, BN]
        b_up = tl.load(p_us, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]
        b_dt = tl.dot(b_dz, b_up, b_dt, input_precision=PRECISION)
        p_zs += tl.full((), BN, tl.int64) * s_zn
        p_us += tl.full((), BN, tl.int64) * s_un
    if HAS_DS:
        b_dt += tl.load(p_ds + b * R + o_r, mask=m_r, other=0.0).to(tl.float32)[None, :]
    p_ts = p_dt + (b * P + o_p)[:, None] * R + o_r[None, :]
    tl.store(p_ts, b_dt.to(p_dt.dtype.element_ty), mask=m_p[:, None] & m_r[None, :])


@triton.jit
def first_tap(phase, pad, dilation, PERIOD: tl.constexpr, STRIDE: tl.constexpr, TAPS: tl.constexpr):
    """First of every PERIOD taps that reach the inputs of a phase (position modulo stride), and how many there are."""
    first = tl.full((), TAPS, tl.int32)
    for tap in tl.static_range(PERIOD):
        first = tl.where((phase + pad - tap * dilation) % STRIDE == 0, tap, first)
    first = tl.minimum(first, TAPS)
    return first, (TAPS - first + PERIOD - 1) // PERIOD


@triton.jit
def conv_bwd_dx_kernel(
    p_dt, p_down, p_dx, B, R, C, Hi, Wi, Ho, Wo, pad_h, pad_w, dil_h, dil_w, s_dr, s_dk, s_xb, s_xc, s_xh, s_xw, c_tiles,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx: the transposed convolution of dt `[B, Ho·Wo, R]` as an implicit matrix product over taps and ranks.

    Rows are the input positions of one phase (y mod SH, x mod SW), for which the same taps, every PH-th and PW-th, meet
    an output: a stride skips the others instead of multiplying zeros.
    """
    pid = tl.program_id(0).to(tl.int64)
    o_c = (pid % c_tiles).to(tl.int32) * BC + tl.arange(0, BC)
    m_c = o_c < C
    phase = ((pid // c_tiles) % (SH * SW)).to(tl.int32)
    phase_y = phase // SW
    phase_x = phase % SW
    rows = tl.cast(tl.cdiv(Hi, SH), tl.int64)
    columns = tl.cast(tl.cdiv(Wi, SW), tl.int64)
    o_m = (pid // c_tiles // (SH * SW)) * BM + tl.arange(0, BM)
    o_b = o_m // (rows * columns)
    o_p = o_m - o_b * rows * columns
    o_y = (o_p // columns).to(tl.int32) * SH + phase_y
    o_x = (o_p % columns).to(tl.int32) * SW + phase_x
    m_row = (o_b < B) & (o_y < Hi) & (o_x < Wi)
    tap_y, count_y = first_tap(phase_y, pad_h, dil_h, PH, SH, KH)
    tap_x, count_x = first_tap(phase_x, pad_w, dil_w, PW, SW, KW)
    blocks = tl.cast(tl.cdiv(R, BK), tl.int32)
    block = tl.full((), 0, tl.int32)
    i = tap_y
    j = tap_x
    p_samples = p_dt + o_b * Ho * Wo * R
    b_dx = tl.zeros((BM, BC), tl.float32)
    for _ in range(count_y * count_x * blocks):
        o_r = block * BK + tl.arange(0, BK)
        m_r = o_r < R
        y = o_y + pad_h - i * dil_h
        x = o_x + pad_w - j * dil_w
        y_out = y // SH  # exact where y is not negative
        x_out = x // SW
        m_in = m_row & (y >= 0) & (y_out < Ho) & (x >= 0) & (x_out < Wo)
        p_ts = p_samples + (y_out.to(tl.int64) * Wo + x_out) * R
        b_dt = tl.load(p_ts[:, None] + o_r[None, :], mask=m_in[:, None] & m_r[None, :], other=0.0)  # [BM, BK]
        o_k = ((i * KW + j) * C + o_c).to(tl.int64)
        p_downs = p_down + o_r.to(tl.int64)[:, None] * s_dr + o_k[None, :] * s_dk
        b_down = tl.load(p_downs, mask=m_r[:, None] & m_c[None, :], other=0.0)  # [BK, BC]
        b_dx = tl.dot(b_dt, b_down, b_dx, input_precision=PRECISION)
        block += 1
        done = block == blocks
        block = tl.where(done, 0, block)
        j = tl.where(done, j + PW, j)
        i = tl.where(j >= KW, i + PH, i)
        j = tl.where(j >= KW, tap_x, j)
    o_rows = o_b * s_xb + o_y.to(tl.int64) * s_xh + o_x.to(tl.int64) * s_xw
    p_xs = p_dx + o_rows[:, None] + o_c.to(tl.int64)[None, :] * s_xc
    tl.store(p_xs, b_dx.to(p_dx.dtype.element_ty), mask=m_row[:, None] & m_c[None, :])


@triton.jit
def conv_bwd_down_kernel(
    p_x, p_dt, p_partials, B, P, Wo, R, C, Hi, Wi, s_h, s_w, pad_h, pad_w, dil_h, dil_w, s_xb, s_xc, s_xh, s_xw,
    tiles, share, c_tiles, rank_tiles,
    KH: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partials `[splits, R, taps, C]` of d_down = Σ over positions of dt·x; a split takes `share` tiles of BM positions."""
    pid = tl.program_id(0)
    o_r = (pid % rank_tiles) * BR + tl.arange(0, BR)
    o_c = (pid // rank_tiles % c_tiles) * BC + tl.arange(0, BC)
    tap = pid // rank_tiles // c_tiles
    m_r = o_r < R
    m_c = o_c < C
    y = (tap // KW) * dil_h
    x = (tap % KW) * dil_w
    p_tap = p_x + y.to(tl.int64) * s_xh + x.to(tl.int64) * s_xw
    split = tl.program_id(1)
    begin = split * share
    end = tl.minimum(begin + share, B * tiles)
    b_sum = tl.zeros((BC, BR), tl.float32)
    for tile in range(begin, end):
        b = tile // tiles
        o_p = (tile - b * tiles) * BM + tl.arange(0, BM)
        m_p = o_p < P
        o_rows, o_y, o_x = window_rows(b, o_p, Wo, s_h, s_w, pad_h, pad_w, s_xb, s_xh, s_xw)
        m_in = m_p & (o_y + y >= 0) & (o_y + y < Hi) & (o_x + x >= 0) & (o_x + x < Wi)
        p_xs = p_tap + o_rows[:, None] + o_c.to(tl.int64)[None, :] * s_xc
        b_x = tl.load(p_xs, mask=m_in[:, None] & m_c[None, :], other=0.0)  # [BM, BC]
        p_ts = p_dt + (tl.cast(b, tl.int64) * P + o_p)[:, None] * R + o_r[None, :]
        b_dt = tl.load(p_ts, mask=m_p[:, None] & m_r[None, :], other=0.0)  # [BM, BR]
        b_sum = tl.dot(tl.trans(b_x), b_dt, b_sum, input_precision=PRECISION)
    o_row = (split.to(tl.int64) * R + o_r) * (KH * KW) + tap
    p_sums = p_partials + o_row[None, :] * C + o_c[:, None]
    tl.store(p_sums, b_sum, mask=m_c[:, None] & m_r[None, :])


@triton.jit
def conv_bwd_up_kernel(
    p_dz, p_t, p_products, p_dz_sums, p_t_sums, P, N, R, s_zb, s_zp, s_zn, s_tb, s_tp, s_tr,
    tiles, share, group_tiles, splits, n_tiles, rank_tiles,
    HAS_SUMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products `[groups·splits, N, R]` = Σ over positions of dz·t, and the sums of dz `[…, N]` and t `[…, R]`, in float32.

    A sample has `tiles` tiles of BM positions, a group `group_tiles` of them in a row, a split `share` of a group's.
    """
    pid = tl.program_id(0)
    rank_tile = pid % rank_tiles
    n_tile = pid // rank_tiles % n_tiles
    o_r = rank_tile * BR + tl.arange(0, BR)
    o_n = n_tile * BN + tl.arange(0, BN)
    part = pid // rank_tiles // n_tiles
    group = part // splits
    m_n = o_n < N
    m_r = o_r < R
    begin = group * group_tiles + (part - group * splits) * share
    end = tl.minimum(begin + share, (group + 1) * group_tiles)
    b_products = tl.zeros((BN, BR), tl.float32)
    b_dz_sum = tl.zeros((BN,), tl.float32)
    b_t_sum = tl.zeros((BR,), tl.float32)
    for tile in range(begin, end):
        b = tl.cast(tile // tiles, tl.int64)
        o_p = (tile - b * tiles) * BM + tl.arange(0, BM)
        m_p = o_p < P
        p_zs = p_dz + b * s_zb + o_p[:, None] * s_zp + o_n.to(tl.int64)[None, :] * s_zn
        b_dz = tl.load(p_zs, mask=m_p[:, None] & m_n[None, :], other=0.0)  # [BM, BN]
        p_ts = p_t + b * s_tb + o_p[:, None] * s_tp + o_r.to(tl.int64)[None, :] * s_tr
        b_t = tl.load(p_ts, mask=m_p[:, None] & m_r[None, :], other=0.0)  # [BM, BR]
        b_products = tl.dot(tl.trans(b_dz), b_t, b_products, input_precision=PRECISION)
        if HAS_SUMS:
            b_dz_sum += tl.sum(b_dz.to(tl.float32), 0)
            b_t_sum += tl.sum(b_t.to(tl.float32), 0)
    o_rows = part.to(tl.int64) * N + o_n
    p_sums = p_products + o_rows[:, None] * R + o_r[None, :]
    tl.store(p_sums, b_products, mask=m_n[:, None] & m_r[None, :])
    if HAS_SUMS:
        if rank_tile == 0:
            tl.store(p_dz_sums + o_rows, b_dz_sum, mask=m_n)
        if n_tile == 0:
            tl.store(p_t_sums + part.to(tl.int64) * R + o_r, b_t_sum, mask=m_r)


@triton.jit
def conv_sum_partials_kernel(
    p_partials, p_out, splits, count, T, C, s_r, s_t, s_c, BS: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    """out[r, tap, c], by its strides, = the sum over splits of partials `[splits, R, T, C]`; `count` = R·T·C."""
    o_e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    m_e = o_e < count
    o_s = tl.arange(0, BS)
    b_sum = tl.zeros((BE,), tl.float32)
    for split in range(0, splits, BS):
        m_s = o_s < splits - split
        p_sums = p_partials + tl.cast(split + o_s, tl.int64)[:, None] * count + o_e[None, :]
        b_sum += tl.sum(tl.load(p_sums, mask=m_s[:, None] & m_e[None, :], other=0.0), 0)
    o_rt = o_e // C
    o_r = o_rt // T
    p_outs = p_out + o_r * s_r + (o_rt - o_r * T) * s_t + (o_e - o_rt * C) * s_c
    tl.store(p_outs, b_sum.to(p_out.dtype.element_ty), mask=m_e)
