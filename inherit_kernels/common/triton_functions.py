"""Device functions that the Triton kernels of several ops share. Imports triton: only kernel modules import this."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) in float32; the codes of `common.activation.ACTIVATION_CODES`. NaN stays NaN."""
    if ACTIVATION == 1:
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == 2:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == 3:
        # 0.5·(1 + tanh(u)) = sigmoid(2u)
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == 4:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def softmax_heads(logits, H, BH: tl.constexpr):
    """softmax over the first H of BH columns of logits `[BM, BH]`; the others become 0."""
    m_head = tl.arange(0, BH) < H
    logits = tl.where(m_head[None, :], logits, float("-inf"))
    exponentials = tl.exp(logits - tl.max(logits, 1)[:, None])
    return exponentials / tl.sum(exponentials, 1)[:, None]


@triton.jit
def column(tile, index, WIDTH: tl.constexpr):
    """Column `index` of a tile `[BM, WIDTH]`, as `[BM]`."""
    chosen = tl.arange(0, WIDTH) == index
    return tl.sum(tl.where(chosen[None, :], tile, 0.0), 1)
