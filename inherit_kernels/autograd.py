"""How a call runs: eagerly, as one torch operator, or as plain torch; and its gradient.

* eager: the chosen implementation is called directly, behind an `autograd.Function` where a gradient is needed;
* compiling, exporting, under a dispatch mode or with a tensor subclass: one node `inherit_kernels::<op>`. Where a compiler
  traces it for a GPU and Triton is the choice for the sizes at hand, the node becomes its Triton kernels, which the
  compiler then sees and AOTInductor packages (as `torch.library.triton_op` does);
* under `torch.func` transforms and forward-mode differentiation: the unfused form, plain torch that every transform
  understands. (A Function in `setup_context` form would serve reverse mode only, and cost 2 µs a call.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad

from inherit_kernels.common.activation import activate_outside
from inherit_kernels.common.checks import check_shape, check_tensors
from inherit_kernels.common.conv import in_format, memory_format_of
from inherit_kernels.common.triton_launch import tracing
from inherit_kernels.dispatch import _forced, forced_backend, place_of, remember, select, select_traced
from inherit_kernels.registry import OPS, Backend, OpSpec, differentiate

LIBRARY = torch.library.Library("inherit_kernels", "DEF")

_is_compiling = torch.compiler.is_dynamo_compiling  # 50 ns less than is_compiling; other tracers are dispatch modes
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_any_autocast = torch._C._is_any_autocast_enabled
_grad_enabled = torch.is_grad_enabled
_forced_now = _forced.get
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def call(spec: OpSpec, args: tuple[Any, ...]) -> Tensor:
    """Run an op on a complete argument list, tensors then options; the public functions end here."""
    if _is_compiling():
        return _call_as_operator(spec, *spec.split(args))
    x = args[0]
    if (
        type(x) not in _PLAIN
        or _dispatch_modes()
        or _any_autocast()
        or _transforms_active()
        or forward_ad._current_level >= 0
    ):
        return _call_specially(spec, *spec.split(args))
    try:
        if _grad_enabled() and needs_gradient(args[: spec.tensor_count]):
            return _call_differentiably(spec, *spec.split(args))
        # The steady state: one look-up, then the implementation itself. Every name and frame here was measured.
        place = x.is_cpu or place_of(x, args[spec.tensor_count - 1])
        key = (x.dtype, place, x.shape, args[2].shape, args[spec.option_slice], _forced_now())
        try:
            forward = spec.forwards[key]
        except KeyError:
            forward = _remember_forward(spec, args, key)
        return forward(*args)
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError):
        raise_named(spec, args)  # the good path pays nothing for the named error
        raise


def _remember_forward(spec: OpSpec, args: tuple[Any, ...], key: tuple[Any, ...]) -> Callable[..., Tensor]:
    backend = select(spec, *spec.split(args), False, forced_backend())

    def check_then_forward(*args: Any) -> Tensor:
        check_once(spec, args)
        return backend.forward(*args)

    forward = backend.forward if backend.checks_arguments else check_then_forward
    return remember(spec.forwards, key, forward)


def check_once(spec: OpSpec, args: tuple[Any, ...]) -> None:
    """`spec.check`, remembered for the same shapes, dtypes, devices and options: 2 µs in place of 5 to 13."""
    tensors = [(a.shape, a.dtype, a.is_cpu or a.device) if a is not None else None for a in args[: spec.tensor_count]]
    signature = (*tensors, *args[spec.option_slice])
    if signature not in spec.checked:
        spec.check(*args)
        remember(spec.checked, signature, True)


def raise_named(spec: OpSpec, args: tuple[Any, ...]) -> None:
    """After a failure: raise the error that names the argument, if one was wrong."""
    try:
        spec.check(*args)
    except (TypeError, ValueError) as error:
        raise error from None


def is_plain_inference(tensors: tuple[Any, ...]) -> bool:
    """Whether nothing but the values is asked for: no tracing, transform, autocast, subclass or gradient."""
    return not (
        _is_compiling()
        or type(tensors[0]) not in _PLAIN
        or _dispatch_modes()
        or _any_autocast()
        or _transforms_active()
        or forward_ad._current_level >= 0
        or (_grad_enabled() and needs_gradient(tensors))
    )


def needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether any of the tensors requires a gradient."""
    for tensor in tensors:  # noqa: SIM110  any() over a generator costs 0.3 µs more
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _call_specially(spec: OpSpec, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    if torch.is_autocast_enabled(_device_type(tensors)):
        return _call_under_autocast(spec, tensors, options)
    spec.check(*tensors, *options)
    if _transforms_active() or forward_ad._current_level >= 0:
        return spec.backends["unfused"].forward(*tensors, *options)
    if _dispatch_modes() or type(tensors[0]) not in _PLAIN:
        return _call_as_operator(spec, tensors, options)
    with torch._C._DisableAutocast():  # autocast is on, but for another kind of device
        return call(spec, (*tensors, *options))


def _device_type(tensors: Sequence[Any]) -> str:
    return tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"


def _call_under_autocast(spec: OpSpec, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    """Every floating argument in the autocast dtype; a residual of another dtype is added outside the op."""
    device_type = _device_type(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    *operands, residual = tensors
    operands = [_cast(operand, dtype) for operand in operands]
    with torch.autocast(device_type, enabled=False):
        if residual is None or residual.dtype == operands[0].dtype:
            return call(spec, (*operands, residual, *options))
        z = call(spec, (*operands, None, *options[:-1], None))
        if residual.shape != z.shape:
            expected = f"expected shape {list(z.shape)} (that of the output)"
            raise ValueError(f"residual: {expected}, got {list(residual.shape)}")
        return activate_outside(z + residual, options[-1])


def _cast(operand: Any, dtype: torch.dtype) -> Any:
    castable = isinstance(operand, Tensor) and operand.is_floating_point() and operand.dtype != torch.float64
    return operand.to(dtype) if castable else operand


def _call_differentiably(spec: OpSpec, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    """Only None and relu are differentiated inside; torch differentiates the others, saving z as eager torch does."""
    inside, outside = _split_activation(options)
    backend = select(spec, tensors, inside, True, forced_backend())
    if not backend.checks_arguments:
        check_once(spec, (*tensors, *options))
    return activate_outside(_Differentiable.apply(spec, backend, inside, *tensors), outside)


def _split_activation(options: tuple[Any, ...]) -> tuple[tuple[Any, ...], str | None]:
    return (options, None) if options[-1] in (None, "relu") else ((*options[:-1], None), options[-1])


class _Differentiable(torch.autograd.Function):
    """Saves the inputs but the residual, the rank-sized t, and y for relu; nothing of size H × output."""

    @staticmethod
    def forward(ctx: Any, spec: OpSpec, backend: Backend, options: tuple[Any, ...], *tensors: Any) -> Tensor:
        y, t = backend.forward_saving(*tensors, *options)
        # torch's linear of three dimensions with a bias gives a view, and no view that a Function returns can be written into.
        if y._is_view():
            y = y.data
        ctx.spec, ctx.backend, ctx.options = spec, backend, options
        ctx.save_for_backward(*tensors[:-1], t, y if options[-1] == "relu" else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        *tensors, t, y = ctx.saved_tensors
        *needs, residual_needed = ctx.needs_input_grad[3:]
        dz = dy if y is None else torch.ops.aten.threshold_backward(dy, y.detach(), 0)
        if not any(needs):
            gradients: Sequence[Tensor | None] = [None] * len(needs)
        elif torch.is_grad_enabled():  # double backward: the reference is differentiable to any order
            gradients = differentiate(ctx.spec.reference, dz, tensors, ctx.options, needs, create_graph=True)
        else:
            gradients = ctx.backend.backward(dz, t, *tensors, *ctx.options, needs)
        return None, None, None, *gradients, dz if residual_needed else None


# --- one torch operator ------------------------------------------------------------------------------------------------


class _Operator:
    """The backend that calls the operators `<op>_saving` and `<op>_backward`, for use inside a traced graph."""

    checks_arguments = True

    def __init__(self, spec: OpSpec, backend: str | None):
        self.spec, self.backend = spec, backend

    def forward_saving(self, *args: Any) -> tuple[Tensor, Tensor]:
        return getattr(torch.ops.inherit_kernels, f"{self.spec.name}_saving").default(*args, self.backend)

    def backward(self, dz: Tensor, t: Tensor, *args: Any) -> Sequence[Tensor | None]:
        needs = args[-1]
        operator = getattr(torch.ops.inherit_kernels, f"{self.spec.name}_backward").default
        found = iter(operator(dz, t, *args, self.backend))
        return [next(found) if need else None for need in needs]


def _call_as_operator(spec: OpSpec, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type):
        return _call_under_autocast(spec, tensors, options)
    inside, outside = options, None
    if _grad_enabled() and needs_gradient(tensors):
        inside, outside = _split_activation(options)
    operator = getattr(torch.ops.inherit_kernels, spec.name).default
    return activate_outside(operator(*tensors, *inside, forced_backend()), outside)


def _laid_out_like(tensor: Tensor, gradient: Tensor) -> Tensor:
    """Inductor asserts the strides that a fake promised: an image's memory format, else contiguous."""
    return in_format(gradient, memory_format_of(tensor)) if tensor.dim() == 4 else gradient.contiguous()


def _arguments(kind: str, args: Sequence[Any]) -> tuple[list[Any], str | None]:
    """The complete argument list of a call of one of an op's three operators, and the backend forced."""
    if kind != "_backward":
        return list(args[:-1]), args[-1]
    _, _, *arguments, needs, forced = args
    arguments.insert(len(needs), None)  # a backward gets no residual
    return arguments, forced


def _check_needs(spec: OpSpec, arguments: Sequence[Any], needs: Sequence[bool]) -> None:
    """`needs` of a backward called as an operator names every tensor but the residual, and asks for none that is not there."""
    names = spec.tensors[:-1]
    if len(needs) != len(names):
        raise ValueError(f"needs: expected one value for each of {', '.join(names)}; got {len(needs)}")
    for name, value, need in zip(names, arguments, needs, strict=False):
        if need and value is None:
            raise ValueError(f"needs: asks for the gradient of {name}, which is None")


def _check_upstream(spec: OpSpec, dz: Tensor, t: Tensor, arguments: Sequence[Any]) -> None:
    """dz and t of a backward called as an operator fit its other arguments; remembered as in `check_once`."""
    described = [(a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in (dz, t, *arguments)]
    signature = ("backward", *[tuple(part) if isinstance(part, list) else part for part in described])
    if signature in spec.checked:
        return
    check_tensors({spec.tensors[0]: arguments[0], "dz": dz, "t": t}, {})
    outputs = spec.fake(*[a.to("meta") if isinstance(a, Tensor) else a for a in arguments])
    for name, given, made, of in zip(("dz", "t"), (dz, t), outputs, ("y", "t"), strict=True):
        check_shape(name, given, list(made.shape), f"that of the forward's {of}")
    remember(spec.checked, signature, True)


def _run(kind: str, backend: Backend, args: Sequence[Any]) -> Any:
    """One of the three operators on a backend."""
    if kind == "":
        return backend.forward(*args[:-1])
    if kind == "_saving":
        return backend.forward_saving(*args[:-1])
    gradients = zip(args[2:], backend.backward(*args[:-1]), strict=False)
    return [_laid_out_like(tensor, gradient) for tensor, gradient in gradients if gradient is not None]


def _traced_for_compiler(spec: OpSpec, kind: str) -> Callable[..., Any]:
    """What a compiler traces in place of an operator: its Triton kernels if they are the choice, else the operator."""

    def rule(mode: Any, operator: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        arguments, forced = _arguments(kind, args)
        backend = select_traced(spec, *spec.split(arguments), kind != "", forced)
        if backend is None or custom_triton_ops_decomposition_disabled():  # an exported program keeps the operator
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        with mode, tracing():
            return _run(kind, backend, args)

    return rule


def register_op(spec: OpSpec) -> OpSpec:
    """Define `inherit_kernels::<op>`, `<op>_saving` and `<op>_backward`, and put the op into `OPS`."""
    arguments = ", ".join([f"Tensor {n}" for n in spec.required] + [f"Tensor? {n}" for n in spec.optional])
    without_residual = arguments.rsplit(", ", 1)[0]
    LIBRARY.define(f"{spec.name}({arguments}, {spec.options}, str? backend) -> Tensor")
    LIBRARY.define(f"{spec.name}_saving({arguments}, {spec.options}, str? backend) -> (Tensor, Tensor)")
    LIBRARY.define(
        f"{spec.name}_backward(Tensor dz, Tensor t, {without_residual}, {spec.options}, bool[] needs, "
        "str? backend) -> Tensor[]"
    )
    _implement(spec)
    OPS[spec.name] = spec
    return spec


def _implement(spec: OpSpec) -> None:
    """Kernels, fakes and the gradient of the three operators of an op."""
    operator = getattr(torch.ops.inherit_kernels, spec.name).default

    def kernel_of(kind: str) -> Callable[..., Any]:
        def kernel(*args: Any) -> Any:
            arguments, forced = _arguments(kind, args)
            if kind == "_backward":
                _check_needs(spec, arguments, args[-2])
            spec.check(*arguments)
            if kind == "_backward":
                _check_upstream(spec, args[0], args[1], arguments)
            return _run(kind, select(spec, *spec.split(arguments), kind != "", forced), args)

        return kernel

    def fake_forward(*args: Any) -> Tensor:
        spec.check(*args[:-1])
        return spec.fake(*args[:-1])[0]

    def fake_saving(*args: Any) -> tuple[Tensor, Tensor]:
        spec.check(*args[:-1])
        return spec.fake(*args[:-1])

    def fake_backward(dz: Tensor, t: Tensor, *args: Any) -> list[Tensor]:
        *arguments, needs, _ = args
        wanted = [tensor for tensor, need in zip(arguments, needs, strict=False) if need]
        return [_laid_out_like(tensor, torch.empty_like(tensor)) for tensor in wanted]

    def differentiable(keyset: torch._C.DispatchKeySet, *args: Any) -> Tensor:
        *arguments, forced = args
        tensors, options = spec.split(arguments)
        if _grad_enabled() and needs_gradient(tensors):
            inside, outside = _split_activation(options)
            y = _Differentiable.apply(spec, _Operator(spec, forced), inside, *tensors)
            return activate_outside(y, outside)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, forced)

    for kind, fake in (("", fake_forward), ("_saving", fake_saving), ("_backward", fake_backward)):
        name = f"inherit_kernels::{spec.name}{kind}"
        LIBRARY.impl(spec.name + kind, kernel_of(kind), "CompositeExplicitAutograd")
        torch.library.register_fake(name, fake, lib=LIBRARY)
        rule = _traced_for_compiler(spec, kind)
        torch.library.register_torch_dispatch(name, FunctionalTensorMode, rule, lib=LIBRARY)
    LIBRARY.impl(spec.name, differentiable, "Autograd", with_keyset=True)
