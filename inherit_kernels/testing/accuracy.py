"""The one accuracy rule of the project, everywhere the same.

For a result r in dtype d with float64 truth a, let p be the larger of the error of the plain torch expression in d and
the change of the truth under four random perturbations of the inputs by one ε of d. Required:

* ‖r − a‖ ≤ factor·p + 2ε‖a‖ in Frobenius norm, factor 2 for outputs and 3 for gradients;
* no element off by more than `ELEMENT` times its row's p (the largest in the row, at least the root mean square over
  the tensor) plus 4ε times the row's largest |a|, so that one wrong or unwritten element cannot hide among many right ones;
* both bounds plus `FLOOR`, for truths that cancel to an exact zero, such as gelu_tanh below −8 (inputs are of order one).

Without the perturbation term correct kernels fail by bad luck: the plain expression is now and then exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from inherit_kernels.dispatch import use_backend
from inherit_kernels.registry import OPS, OpSpec
from inherit_kernels.testing.cases import Case, generator_on, make_inputs

OUTPUT_FACTOR, GRADIENT_FACTOR = 2, 3
ELEMENT = 8
FLOOR = 1e-12
PERTURBATIONS = 4


def check_accuracy(
    op: str,
    case: Case,
    backend: str | None,
    dtype: torch.dtype,
    *,
    layout: str = "contiguous",
    device: str = "cpu",
    seed: int = 0,
    gradients: bool = True,
    function: Callable[..., Tensor] | None = None,
) -> dict[str, float]:
    """Hold an op to the rule on one case, output and every gradient; inputs must come out unchanged.

    Args:
        function: called in place of the public function, such as a compiled one.

    Returns:
        name -> ‖r − a‖ / allowed, for the output "y" and each gradient "d_<argument>".

    Raises:
        AssertionError: the rule is broken, an output has the wrong dtype, shape or strides, or an input changed.
    """
    import inherit_kernels

    spec = OPS[op]
    inputs = make_inputs(op, case, dtype, device=device, seed=seed, layout=layout)
    before = {name: value.clone() for name, value in inputs.items() if value is not None}
    leaves = {name: _leaf(value, gradients) for name, value in inputs.items()}
    with use_backend(backend):
        y = (function or getattr(inherit_kernels, op))(*leaves.values(), **case.options)
    _check_form(spec, case, inputs, y)
    cotangent = _cotangent(spec, case, inputs, y.shape, dtype, seed) if gradients else None
    if cotangent is not None:
        y.backward(cotangent)
    result = _collect(y, leaves if gradients else {})
    for name, value in before.items():
        now = inputs[name]
        if now is None or not torch.equal(value, now):
            raise AssertionError(f"{op} changed its input {name} in place")

    truth = _evaluate(spec, case, inputs, cotangent, torch.float64)
    plain = _evaluate(spec, case, inputs, cotangent, dtype)
    perturbed = [
        _evaluate(
            spec, case, _perturb(inputs, dtype, seed + i), _perturb({"": cotangent}, dtype, seed + i)[""], torch.float64
        )
        for i in range(1, PERTURBATIONS + 1)
    ]
    epsilon = torch.finfo(dtype).eps
    return {
        name: assert_within(
            f"{op}[{case}] {backend} {dtype} {layout} {name}",
            result[name],
            truth[name],
            plain[name],
            [other[name] for other in perturbed],
            OUTPUT_FACTOR if name == "y" else GRADIENT_FACTOR,
            epsilon,
        )
        for name in result
    }


def assert_within(
    what: str,
    result: Tensor,
    truth: Tensor,
    plain: Tensor,
    perturbed: Sequence[Tensor],
    factor: float,
    epsilon: float,
) -> float:
    """The rule itself on one tensor; returns ‖r − a‖ over what is allowed.

    Raises:
        AssertionError: with the figures, when the norm or one element exceeds what is allowed.
    """
    if result.shape != truth.shape:
        raise AssertionError(f"{what}: shape {list(result.shape)}, expected {list(truth.shape)}")
    result, plain = result.detach().double(), plain.detach().double()
    error = result - truth
    deviations = [plain - truth, *(other - truth for other in perturbed)]
    allowed = factor * max(float(d.norm()) for d in deviations) + 2 * epsilon * float(truth.norm()) + FLOOR
    if not float(error.norm()) <= allowed:
        raise AssertionError(
            f"{what}: error {float(error.norm()):.3g} exceeds {allowed:.3g} (of {float(truth.norm()):.3g})"
        )
    if truth.numel() > 0:
        row = torch.stack([d.abs() for d in deviations]).amax(0)
        typical = row.square().mean().sqrt()  # five samples of a short row may all be small by luck
        scale = ELEMENT * _row_max(row).clamp(min=typical) + 4 * epsilon * _row_max(truth.abs()) + FLOOR
        excess = error.abs() > scale.expand_as(error)
        if bool(excess.any()) or bool(error.isnan().any()):
            worst = int((error.abs() - scale).nan_to_num(torch.inf).argmax())
            raise AssertionError(
                f"{what}: element {worst} of {truth.numel()} is {result.flatten()[worst]:.6g}, "
                f"expected {truth.flatten()[worst]:.6g} within {scale.expand_as(error).flatten()[worst]:.3g}"
            )
    return float(error.norm()) / allowed


def _row_max(values: Tensor) -> Tensor:
    return values.amax(-1, keepdim=True) if values.dim() else values


def _leaf(value: Tensor | None, gradients: bool) -> Tensor | None:
    return value if value is None else value.detach().requires_grad_(gradients)


def _collect(y: Tensor, leaves: dict[str, Tensor | None]) -> dict[str, Tensor]:
    found = {"y": y.detach()}
    for name, leaf in leaves.items():
        if leaf is not None:
            if leaf.grad is None:
                raise AssertionError(f"no gradient reached {name}")
            if leaf.grad.dtype != leaf.dtype:
                raise AssertionError(f"the gradient of {name} has dtype {leaf.grad.dtype}, expected {leaf.dtype}")
            found[f"d_{name}"] = leaf.grad
    return found


def _evaluate(
    spec: OpSpec, case: Case, inputs: dict[str, Any], cotangent: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The definition in `dtype`: output, and gradients where a cotangent is given."""
    leaves = {
        k: None if v is None else v.to(dtype).detach().requires_grad_(cotangent is not None) for k, v in inputs.items()
    }
    y = _reference(spec, case, leaves)
    if cotangent is None:
        return _collect(y, {})
    y.backward(cotangent.to(dtype))
    return _collect(y, leaves)


def _reference(spec: OpSpec, case: Case, tensors: dict[str, Any], **changed: Any) -> Tensor:
    options = _full_options(spec, case, **changed)
    batched, chosen = spec.normalise(tuple(tensors.values()), tuple(options.values()))
    y = spec.reference(*batched, *chosen)
    return y if batched[0].dim() == tensors["x"].dim() else y.squeeze(0)


def _full_options(spec: OpSpec, case: Case, **changed: Any) -> dict[str, Any]:
    names = [part.split()[-1] for part in spec.options.split(", ")]
    return dict(zip(names, spec.default_options, strict=True)) | case.options | changed


def _cotangent(
    spec: OpSpec, case: Case, inputs: dict[str, Any], shape: torch.Size, dtype: torch.dtype, seed: int
) -> Tensor:
    """Random, rounded to the dtype, and zero where relu has its kink, where either one-sided derivative is right."""
    device = next(value.device for value in inputs.values() if value is not None)
    generator = generator_on(device, seed + 1000)
    cotangent = torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(dtype)
    if case.options.get("activation") == "relu" and cotangent.numel() > 0:
        wide = {name: None if value is None else value.double() for name, value in inputs.items()}
        z = _reference(spec, case, wide, activation=None)
        near = z.abs() < 16 * torch.finfo(dtype).eps * z.abs().max()
        cotangent = cotangent.masked_fill(near, 0.0)
    return cotangent


def _perturb(values: dict[str, Any], dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Every element times 1 ± ε of the dtype, in float64."""
    device = next((value.device for value in values.values() if value is not None), torch.device("cpu"))
    generator = generator_on(device, seed)
    epsilon = torch.finfo(dtype).eps

    def moved(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        signs = torch.randint(0, 2, value.shape, generator=generator, device=device) * 2 - 1
        return value.double() * (1 + epsilon * signs)

    return {name: moved(value) for name, value in values.items()}


def _check_form(spec: OpSpec, case: Case, inputs: dict[str, Any], y: Tensor) -> None:
    """Shape, dtype and strides are those that the fake promises."""
    tensors, options = spec.normalise(tuple(inputs.values()), tuple(_full_options(spec, case).values()))
    expected = spec.fake(*tensors, *options)[0]
    if tensors[0].dim() != inputs["x"].dim():
        expected = expected.squeeze(0)
    for name in ("shape", "dtype", "device"):
        if getattr(y, name) != getattr(expected, name):
            raise AssertionError(f"{spec.name}[{case}]: {name} {getattr(y, name)}, expected {getattr(expected, name)}")
    if y.stride() != expected.stride():
        raise AssertionError(f"{spec.name}[{case}]: strides {y.stride()}, expected {expected.stride()}")
