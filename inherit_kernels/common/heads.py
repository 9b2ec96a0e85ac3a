"""Heads merged by algebra: exact identities that keep everything of size H × output out of memory."""

from __future__ import annotations

import torch
from torch import Tensor


def gate_of(features: Tensor, gate_weight: Tensor, gate_bias: Tensor | None) -> Tensor:
    """g = softmax(features·gate_weightᵀ + gate_bias) over the heads.

    Args:
        features: `[..., R]`.
        gate_weight: `[H, R]`.
        gate_bias: `[H]`.

    Returns:
        `[..., H]`; the softmax is computed in float32 at least, the result has the dtype of `features`.
    """
    return exact_gate_of(features, gate_weight, gate_bias).to(features.dtype)


def exact_gate_of(features: Tensor, gate_weight: Tensor, gate_bias: Tensor | None) -> Tensor:
    """`gate_of` in float32 at least, as a backward needs it: gates rounded to bfloat16 no longer sum to one, and the part
    common to all heads, which should cancel, was 10 times the gradient."""
    logits = torch.nn.functional.linear(features, gate_weight, gate_bias)
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def softmax_backward(g: Tensor, dg: Tensor) -> Tensor:
    """Gradient at the logits: g ⊙ (dg − Σ_h g_h dg_h), both `[..., H]`."""
    return g * (dg - (g * dg).sum(-1, keepdim=True))


def scale_by_gate(t: Tensor, g: Tensor) -> Tensor:
    """[g_1 t … g_H t] `[..., H·R]` from t `[..., R]` and g `[..., H]`."""
    return (g.unsqueeze(-1) * t.unsqueeze(-2)).flatten(-2)


def side_by_side(up: Tensor, bias: Tensor | None = None, multiple: int = 1) -> Tensor:
    """[up_1 … up_H biasᵀ 0] `[N, D]` from up `[H, N, R]` and bias `[H, N]`; D is H·R, and H for a bias, in `multiple`s."""
    heads, outputs, rank = up.shape
    biases = [] if bias is None else [bias.t()]
    more = -heads * (rank + len(biases)) % multiple
    if not biases and not more:
        return up.permute(1, 0, 2).flatten(1)
    return torch.cat([*up.unbind(0), *biases, up.new_zeros(outputs, more)], 1)


def scaled_rows(t: Tensor, g: Tensor, columns: int) -> Tensor:
    """What multiplies `side_by_side`: [g_1 t … g_H t], then g and zeros where there are more columns than H·R."""
    scaled = scale_by_gate(t, g)
    more = columns - scaled.shape[-1]
    return scaled if more == 0 else torch.cat([scaled, torch.nn.functional.pad(g, (0, more - g.shape[-1]))], -1)
