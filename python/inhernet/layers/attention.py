"""`nn.MultiheadAttention`: four linear layers instead of a packed projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .copies import linear_of, own_weight


class Attention(nn.Module):
    """Multi-head attention, called as `nn.MultiheadAttention` is, over `q_proj`, `k_proj`, `v_proj`, `out_proj`.

    Shapes: query `[B, T, E]` with `batch_first`, else `[T, B, E]`, or unbatched `[T, E]`; key and value with S positions;
    output like query, attention weights `[B, T, S]` (`[B, H, T, S]` with `average_attn_weights=False`).
    """

    # What nn.TransformerEncoder and its layers look at before they take their fast paths, which would read packed weights.
    _qkv_same_embed_dim = False
    in_proj_weight = in_proj_bias = None

    def __init__(self, layers: dict[str, nn.Linear], heads: int, dropout: float, batch_first: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (layers[name] for name in ("q_proj", "k_proj", "v_proj"))
        self.out_proj = layers["out_proj"]
        self.embed_dim, self.num_heads = layers["q_proj"].out_features, heads
        self.head_dim = self.embed_dim // heads
        self.dropout, self.batch_first = dropout, batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint that belongs to attn_mask, which is None; give the mask too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q = self._heads(self.q_proj(query))
        k, v = self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            mixed = F.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, T, E]` → `[B, H, T, E / H]`."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores, `[B or 1, H or 1, T or 1, S]`."""
        parts = []
        if attention is not None:
            attention = _additive(attention, q)
            by_head = attention.dim() == 3
            parts.append(attention.unflatten(0, (-1, self.num_heads)) if by_head else attention[None, None])
        if padding is not None:
            parts.append(_additive(padding, q)[:, None, None])
        return sum(parts[1:], parts[0]) if parts else None


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    """A mask of booleans (True: not attended to) as zeros and −∞; a floating one as it is."""
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros(mask.shape, dtype=q.dtype, device=mask.device).masked_fill_(mask, float("-inf"))


def opens(module: nn.Module) -> bool:
    return type(module) is nn.MultiheadAttention


def why_not(module: Any) -> str | None:
    if module.bias_k is not None or module.add_zero_attn:
        return "attention with a learned or zero key of its own"
    own = module._parameters
    held = own.get("in_proj_weight") is not None or own.get("q_proj_weight") is not None
    return None if held and own_weight(module.out_proj) else "its projections are made by other code"


def opened(module: Any) -> Attention:
    names = ("q_proj", "k_proj", "v_proj")
    packed = module.in_proj_weight
    weights = packed.chunk(3) if packed is not None else [getattr(module, f"{name}_weight") for name in names]
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    like = packed if packed is not None else module.q_proj_weight
    layers = {name: linear_of(w, b, like) for name, w, b in zip(names, weights, biases, strict=True)}
    out = module.out_proj
    layers["out_proj"] = linear_of(out.weight, out.bias, out.weight)
    return Attention(layers, module.num_heads, module.dropout, module.batch_first)
