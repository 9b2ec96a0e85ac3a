"""transformers' experts in 3-D tensors (Mixtral, Qwen-MoE, …): two linear layers for each expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .copies import linear_of


class Expert(nn.Module):
    """`down(act(gate) · up)` with `gate, up` the halves of `gate_up(x)`."""

    def __init__(self, gate_up: nn.Linear, down: nn.Linear, act: Any) -> None:
        super().__init__()
        self.gate_up, self.down, self.act = gate_up, down, act

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        result: Tensor = self.down(self.act(gate) * up)
        return result


class Experts(nn.Module):
    """A weighted sum of the chosen experts' outputs for every token.

    Shapes: x `[P, D]`, `index` `[P, k]` (an index beyond the last expert is none), `weights` `[P, k]`, y `[P, D]`.
    """

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        self.experts, self.num_experts = nn.ModuleList(experts), len(experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        chosen = F.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            place, token = torch.where(chosen[number])
            if len(token):
                part = expert(hidden_states[token]) * top_k_weights[token, place, None]
                result.index_add_(0, token, part.to(result.dtype))
        return result


def opens(module: nn.Module) -> bool:
    own = module._parameters
    held = all(own.get(name) is not None and own[name].dim() == 3 for name in ("gate_up_proj", "down_proj"))  # type: ignore[union-attr]
    return held and type(module).__module__.startswith("transformers.") and hasattr(module, "is_transposed")


def why_not(module: Any) -> str | None:
    gate = getattr(type(module), "_apply_gate", None)
    if getattr(gate, "__name__", "") != "_default_apply_gate" or not module.is_concatenated or not module.has_gate:
        return "experts with a gate of their own kind"
    if module.has_post_expert_norm or module._is_expert_parallel:
        return "experts with a norm of their own, or spread over devices"
    return None


def opened(module: Any) -> Experts:
    first, second = module.gate_up_proj, module.down_proj
    biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)

    def linear(weights: Any, bias: Any, number: int) -> nn.Linear:
        weight = weights[number].mT if module.is_transposed else weights[number]
        return linear_of(weight, None if bias is None else bias[number], weights)

    pairs = [(linear(first, biases[0], n), linear(second, biases[1], n)) for n in range(len(first))]
    return Experts([Expert(*pair, module.act_fn) for pair in pairs])
