"""Argument checks that name the argument, what it was and what was expected.

They run when an implementation has failed or cannot check for itself, never on the good path of a native call
(four checks in Python cost about 3 µs, a native call 2 µs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inherit_kernels.common.conv import as_pair

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
MOST_POSITIONS = 2**40  # of an output image
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(required: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    """Every argument is a floating tensor, and all share the dtype and the device of the first.

    Raises:
        TypeError: an argument is not a tensor, or not a dense one, or its dtype is unsupported or differs.
        ValueError: an argument lives on another device.
    """
    for name, value in required.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {_describe_type(value)}")
    given = dict(required)
    for name, choice in optional.items():
        if choice is None:
            continue
        if not isinstance(choice, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor or None, got {_describe_type(choice)}")
        given[name] = choice
    (first_name, first), *others = given.items()
    if first.dtype not in DTYPES:
        raise TypeError(f"{first_name}: dtype {first.dtype} is not supported; expected one of {_join(DTYPES)}")
    for name, value in given.items():
        if value.layout != torch.strided or value.is_nested:
            found = "a nested tensor" if value.is_nested else f"layout {value.layout}"
            raise TypeError(f"{name}: expected an ordinary dense tensor, got {found}; convert it, as by .to_dense()")
    for name, value in others:
        if value.dtype != first.dtype:
            raise TypeError(
                f"{name}: dtype {value.dtype} differs from {first_name}'s dtype {first.dtype}; "
                "convert one of them with .to(), or use autocast"
            )
        if value.device != first.device:
            raise ValueError(f"{name}: device {value.device} differs from {first_name}'s device {first.device}")


def check_shape(name: str, value: Tensor | None, expected: Sequence[int | str], because: str = "") -> None:
    """`value` has the expected shape; a string in `expected` is a free size of at least one.

    Raises:
        ValueError: another number of dimensions, or a size that differs.
    """
    if value is None:
        return
    fits = value.dim() == len(expected) and all(
        have >= 1 if isinstance(want, str) else have == want for have, want in zip(value.shape, expected, strict=True)
    )
    if not fits:
        shape = ", ".join(str(size) for size in expected)
        reason = f" ({because})" if because else ""
        raise ValueError(f"{name}: expected shape [{shape}]{reason}, got {list(value.shape)}")


def check_rank(name: str, value: Tensor, minimum: int, maximum: int | None = None) -> None:
    """`value` has between `minimum` and `maximum` dimensions.

    Raises:
        ValueError: it has fewer or more.
    """
    if value.dim() < minimum or (maximum is not None and value.dim() > maximum):
        wanted = f"at least {minimum}" if maximum is None else " or ".join(str(n) for n in range(minimum, maximum + 1))
        raise ValueError(f"{name}: expected {wanted} dimensions, got {value.dim()} (shape {list(value.shape)})")


def check_conv(x: Tensor, down: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    """x `[B, C, Hi, Wi]` and down `[R, C, kh, kw]` fit, the pairs are in their bounds, and the output has a size.

    Raises:
        ValueError: wrong ranks or channels, a kernel larger than the padded input, numbers out of their bounds, or more
            positions than any memory holds.
    """
    check_rank("x", x, 4, 4)
    check_rank("down", down, 4, 4)
    check_shape("down", down, ["R", x.shape[1], "kh", "kw"], f"[R, C, kh, kw], C from x's shape {list(x.shape)}")
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        as_pair(name, value, least)
    positions = 1
    for i, side in enumerate(("height", "width")):
        padded = x.shape[2 + i] + 2 * padding[i]
        reach = dilation[i] * (down.shape[2 + i] - 1) + 1
        if padded < reach:
            raise ValueError(
                f"x: its padded {side} {padded} is smaller than down's dilated kernel {reach}; "
                "expected at least the kernel's size"
            )
        positions *= (padded - reach) // stride[i] + 1
    if isinstance(positions, int) and positions > MOST_POSITIONS:  # of a traced size nothing is asked
        raise ValueError(
            f"padding: {tuple(padding)} makes an output of {positions} positions an image, more than any memory holds; "
            f"expected at most {MOST_POSITIONS}"
        )


def check_activation(activation: str | None) -> None:
    """`activation` is one of the supported names or None.

    Raises:
        ValueError: any other value.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {_join(ACTIVATIONS)}, got {activation!r}")


def _join(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


def _describe_type(value: object) -> str:
    return "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"
