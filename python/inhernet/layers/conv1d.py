"""`nn.Conv1d` as a 2-D convolution over images of height 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .copies import own_weight, view_of


class Conv1d(nn.Module):
    """A 1-D convolution that is computed by `conv`, an `nn.Conv2d` with kernels `1 × k`.

    Shapes: x `[B, C, L]` or `[C, L]`, y `[B, N, L']` or `[N, L']`. It has the attributes that networks read of a 1-D
    convolution to know how long its output is (Whisper, wav2vec2).
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = (
            (pair[1],) for pair in (conv.kernel_size, conv.stride, conv.dilation)
        )
        self.padding = conv.padding if isinstance(conv.padding, str) else (conv.padding[1],)

    @property
    def weight(self) -> Tensor:
        """Shaped as a 1-D convolution's, for code that looks at its dtype or device."""
        return self.conv.weight.squeeze(2)

    @property
    def bias(self) -> Any:
        return self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x.unsqueeze(-2)).squeeze(-2)
        return result


def opens(module: nn.Module) -> bool:
    return type(module) is nn.Conv1d


def why_not(module: Any) -> str | None:
    if not own_weight(module):
        return "its weight is made anew at every call"
    return None if module.padding_mode == "zeros" else f"padding_mode={module.padding_mode!r}"


def opened(module: Any) -> Conv1d:
    padding = module.padding if isinstance(module.padding, str) else (0, module.padding[0])
    conv = nn.Conv2d(
        module.in_channels, module.out_channels, (1, module.kernel_size[0]), (1, module.stride[0]), padding,
        (1, module.dilation[0]), module.groups, module.bias is not None, device="meta", dtype=module.weight.dtype,
    )  # fmt: skip
    conv.weight = view_of(module.weight.unsqueeze(2), module.weight)
    if module.bias is not None:
        conv.bias = view_of(module.bias, module.bias)
    return Conv1d(conv)
