"""Geometry of the convolution ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

Pair = tuple[int, int]
MOST = 2**31 - 1  # of a stride, padding or dilation: what kernels compute with in 64 bits


def as_pair(name: str, value: int | Sequence[int], minimum: int) -> Pair:
    """`value` as a pair of ints, each at least `minimum` and at most 2³¹ - 1.

    Raises:
        TypeError: neither an int nor two ints.
        ValueError: one of them is out of these bounds.
    """
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else ()
    if len(pair) != 2 or not all(isinstance(item, int) and not isinstance(item, bool) for item in pair):
        raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
    if min(pair) < minimum:
        raise ValueError(f"{name}: expected values of at least {minimum}, got {value!r}")
    if max(pair) > MOST:
        raise ValueError(f"{name}: expected values of at most {MOST}, got {value!r}")
    return pair


def output_size(size: Sequence[int], kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """(Ho, Wo) of a convolution: ⌊(size + 2·padding − dilation·(kernel − 1) − 1) / stride⌋ + 1."""
    height, width = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    return height, width


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last when the strides of `x` `[B, C, Hi, Wi]` prefer it, contiguous_format otherwise.

    The weight never decides, unlike in `torch.nn.functional.conv2d`.
    """
    if x.is_contiguous() and x.shape[1] > 1 and x.numel() > 0:  # the common case without the 4 µs of the full rule
        return torch.contiguous_format
    return suggest_memory_format(x)


def in_format(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`tensor` `[B, C, H, W]` with exactly the strides of `torch.empty(shape, memory_format=…)`, copied where they differ.

    `Tensor.contiguous` would keep other strides where a size is 0 or 1.
    """
    _, c, h, w = tensor.shape
    strides = (h * w * c, 1, w * c, c) if memory_format == torch.channels_last else (c * h * w, h * w, w, 1)
    return tensor if tensor.stride() == strides else tensor.clone(memory_format=memory_format)


def as_rows(tensor: Tensor) -> Tensor:
    """`[B, H·W, C]` from `[B, C, H, W]`; a view of a channels-last tensor."""
    return tensor.permute(0, 2, 3, 1).flatten(1, 2)


def from_rows(rows: Tensor, size: Sequence[int]) -> Tensor:
    """`[B, C, H, W]` with channels-last strides from `[B, H·W, C]` and (H, W)."""
    return rows.unflatten(1, tuple(size)).permute(0, 3, 1, 2)


def normalise_conv(
    tensors: tuple[Any, ...], options: tuple[Any, ...]
) -> tuple[tuple[Any, ...], tuple[Pair, Pair, Pair, str | None]]:
    """Batched tensors and pairs: x and the residual get a batch of one where x `[C, Hi, Wi]` has none.

    Raises:
        TypeError, ValueError: stride, padding or dilation is not an int or pair, or too small.
    """
    stride, padding, dilation, activation = options
    pairs = as_pair("stride", stride, 1), as_pair("padding", padding, 0), as_pair("dilation", dilation, 1)
    x, *weights, residual = tensors
    if isinstance(x, Tensor) and x.dim() == 3:
        if isinstance(residual, Tensor):
            if residual.dim() != 3:
                raise ValueError(f"residual: expected 3 dimensions as x has, got {residual.dim()}")
            residual = residual.unsqueeze(0)
        tensors = (x.unsqueeze(0), *weights, residual)
    return tensors, (*pairs, activation)


def conv_sizes(x: Tensor, down: Tensor, outputs: int, stride: Pair, padding: Pair, dilation: Pair) -> dict[str, int]:
    """B images, C channels in, T taps, P output positions, N channels out, R rank."""
    height, width = output_size(x.shape[2:], down.shape[2:], stride, padding, dilation)
    return {
        "B": x.shape[0],
        "C": x.shape[1],
        "T": down.shape[2] * down.shape[3],
        "P": height * width,
        "N": outputs,
        "R": down.shape[0],
    }


def conv_fake(
    x: Tensor, down: Tensor, outputs: int, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor]:
    """Empty y `[B, N, Ho, Wo]` and t `[B, R, Ho, Wo]` in the memory format of x."""
    size = output_size(x.shape[2:], down.shape[2:], stride, padding, dilation)
    memory_format = memory_format_of(x)

    def empty(channels: int) -> Tensor:
        return torch.empty((x.shape[0], channels, *size), dtype=x.dtype, device=x.device, memory_format=memory_format)

    return empty(outputs), empty(down.shape[0])


def first_stage(x: Tensor, down: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """t = conv2d(x, down) in the memory format of x."""
    memory_format = memory_format_of(x)
    x, stride, padding = _safe_geometry(x, down, stride, padding, dilation)
    if _oversteps(x, down, stride):
        x, stride = _picked(x, stride), (1, 1)
    return in_format(F.conv2d(x, down, None, stride, padding, dilation), memory_format)


def first_stage_backward(
    dt: Tensor, x: Tensor, down: Tensor, options: Sequence[Pair], need_x: bool, need_down: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx and d_down from dt."""
    if not (need_x or need_down):
        return None, None
    stride, padding, dilation = options
    used, stride, left = _safe_geometry(x, down, stride, padding, dilation)
    apart = need_down and _oversteps(used, down, stride)
    dx, d_down, _ = torch.ops.aten.convolution_backward(
        dt, used, down, None, stride, left, dilation, False, (0, 0), 1, (need_x, need_down and not apart, False)
    )
    if apart:
        _, d_down, _ = torch.ops.aten.convolution_backward(
            dt, _picked(used, stride), down, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (False, True, False)
        )
    if need_x and used is not x:  # back from the padded and cropped image; no window may reach as far as the map
        (py, px), (height, width) = padding, x.shape[2:]
        right, below = max(0, px + width - used.shape[3]), max(0, py + height - used.shape[2])
        padded = F.pad(dx, (0, right, 0, below))
        dx = in_format(padded[:, :, py : py + height, px : px + width], memory_format_of(x))
    return dx, d_down


def _safe_geometry(x: Tensor, down: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> tuple[Tensor, Pair, Pair]:
    """The same convolution without two rare geometries, by padding beforehand and cropping what no window reaches.

    torch 2.13's CPU convolution (channels-last, AVX-512) reads out of bounds, to garbage or a crash, where a window lies
    wholly in the padding, and where a stride above one leaves one output column: within 500 random geometries without
    this, never in 18,000 with it.
    """
    reach = [dilation[i] * (down.shape[2 + i] - 1) + 1 for i in range(2)]
    outputs = output_size(x.shape[2:], down.shape[2:], stride, padding, dilation)
    if not any(padding[i] >= reach[i] or (outputs[i] == 1 and stride[i] > 1) for i in range(2)):
        return x, stride, padding
    height, width = ((outputs[i] - 1) * stride[i] + reach[i] for i in range(2))
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    strides = (1 if outputs[0] == 1 else stride[0], 1 if outputs[1] == 1 else stride[1])
    return padded[:, :, :height, :width].contiguous(memory_format=memory_format_of(x)), strides, (0, 0)


def _oversteps(x: Tensor, down: Tensor, stride: Pair) -> bool:
    """Whether torch's weight gradient of this convolution may write past its own memory (oneDNN issue 6035, open).

    1×1 with a stride, float32, channels-last, fewer channels than a block (8 with AVX2, 16 with AVX-512): seen up to 1,132
    bytes beyond 328 in torch 2.13, after which any number of the process may change, or the process ends. `x` is what
    `_safe_geometry` returns, so that nothing is padded.
    """
    return tuple(down.shape[2:]) == (1, 1) and max(stride) > 1 and x.shape[1] < 16 and x.dtype == torch.float32


def _picked(x: Tensor, stride: Pair) -> Tensor:
    """The positions that a strided 1×1 convolution sees."""
    return x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=memory_format_of(x))
