"""Calls every operator with sizes, numbers and tensors that no one should pass; a program, since a mistake may end it.

`python hostile_calls.py SEED COUNT` prints each call before it is made and ends with "done". `test_hostile.py` runs it.
"""

from __future__ import annotations

import math
import random
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

import inherit_kernels
from inherit_kernels import _native
from inherit_kernels.registry import OPS
from inherit_kernels.testing import cases_of, make_inputs
from inherit_kernels.testing.cases import arguments_of

MEMORY = 12 * 2**30  # of address space; what asks for more raises
NUMBERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 17, 2**15, 2**31 - 1, 2**31, 2**32, 2**33, 2**61, 2**62, 2**63 - 1)
EXTENTS = (0, 1, 2, 3, 2**20, 2**31 - 1, 2**31, 2**40, 2**62)
GEOMETRY = ("stride", "padding", "dilation")


def names() -> list[str]:
    """The operators of both namespaces."""
    _native.load()
    spaces = ("inherit_kernels::", "inherit_kernels_C::")
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith(spaces))


def valid_arguments(op: str) -> dict[str, Any]:
    """What a small right call of any operator of the family of `op` takes, by the names in the schemas."""
    wanted = "strided" if "conv" in op else "ragged"
    case = next(case for case in cases_of(op) if case.name == wanted)
    inputs = make_inputs(op, case, torch.float32)
    tensors, options = arguments_of(op, inputs, case)
    spec = OPS[op]
    y, t = spec.backends["unfused"].forward_saving(*tensors, *options)
    weights = list(tensors[1:-1])
    panels = spec.backends["native"].pack(*weights) if _native.load() else tensors[1:3]
    values = dict(zip(spec.tensors, tensors, strict=True))
    values |= {
        "dz": torch.randn_like(y),
        "t": t,
        "panels_down": panels[0],
        "panels_up": panels[1],
        "weight": tensors[1],
    }
    values |= {"rank": tensors[1].shape[0], "out_features": tensors[2].shape[-2], "out_channels": tensors[2].shape[-2]}
    values |= {"biased": values.get("bias") is not None, "needs": [True] * (len(spec.tensors) - 1), "backend": None}
    if "conv" in op:
        for name, pair in zip(GEOMETRY, options, strict=False):
            values |= {name: list(pair), f"{name}_h": pair[0], f"{name}_w": pair[1]}
        values |= {"kernel_h": tensors[1].shape[2], "kernel_w": tensors[1].shape[3]}
    return values


def hostile(value: Any, kind: str, pick: random.Random) -> Any:
    """Something else of the schema's type in place of a right value."""
    if kind.startswith("Tensor"):
        tensor = value if isinstance(value, torch.Tensor) else torch.randn(3)
        return pick.choice(spoiled(tensor, pick, optional="?" in kind))()
    if kind == "int":
        return pick.choice(NUMBERS)
    if kind == "int[]":
        return [pick.choice(NUMBERS) for _ in range(pick.choice((0, 1, 2, 2, 2, 2, 3)))]
    if kind == "bool":
        return pick.random() < 0.5
    if kind == "bool[]":
        return [pick.random() < 0.5 for _ in range(pick.choice((0, 1, 3, len(value), 9)))]
    return pick.choice((None, "native", "unfused", "reference", "relu", "gelu", "nothing", ""))


def spoiled(tensor: torch.Tensor, pick: random.Random, optional: bool) -> list[Callable[[], Any]]:
    """Ways to make another tensor: its dtype, device, dimensions, sizes and strides."""
    dims = tensor.dim()

    def expanded() -> torch.Tensor:
        sizes = [pick.choice(EXTENTS) if pick.random() < 0.4 else size for size in tensor.shape]
        while math.prod(max(size, 1) for size in sizes) >= 2**63:  # torch makes none of so many elements
            sizes[sizes.index(max(sizes))] = 1
        return torch.ones((), dtype=tensor.dtype).expand(sizes)

    def resized() -> torch.Tensor:
        return torch.randn([pick.choice((0, 1, 2, 5)) if pick.random() < 0.5 else size for size in tensor.shape])

    ways = [
        expanded,
        expanded,
        resized,
        lambda: tensor.to(pick.choice((torch.int64, torch.float16, torch.bool, torch.complex64, torch.bfloat16))),
        lambda: tensor.double(),
        lambda: tensor.to("meta"),
        lambda: tensor[None],
        lambda: tensor.flatten(),
        lambda: tensor.reshape(-1)[:0].reshape([0] * dims) if dims else tensor,
        lambda: tensor.transpose(0, -1) if dims else tensor,
        lambda: torch.ones(()),
        lambda: tensor.to_sparse(),
    ]
    return [*ways, lambda: None] if optional else ways


def a_call(name: str, values: dict[str, dict[str, Any]], pick: random.Random) -> tuple[str, Callable[[], Any]]:
    """One call of an operator, most of it right; and what it is."""
    operator = getattr(getattr(torch.ops, name.split("::")[0]), name.split("::")[1].split(".")[0]).default
    families = [op for op in OPS if name.split("::")[1].startswith(op)]
    known = values[families[0] if families else pick.choice(list(OPS))]
    schema = operator._schema.arguments
    arguments = {argument.name: known.get(argument.name) for argument in schema}
    if "activation" in arguments and name.startswith("inherit_kernels_C"):
        arguments["activation"] = 1
    if "pack_conv2d" in name:
        arguments = {name: values["lowrank_conv2d"][name] for name in arguments}
    for argument in schema:
        kind = (
            str(argument.type).replace("Optional[", "?").replace("List[int]", "int[]").replace("List[bool]", "bool[]")
        )
        kind = "Tensor?" if "Tensor" in kind and "?" in kind else kind
        if arguments[argument.name] is None and kind in ("int", "bool"):
            arguments[argument.name] = kind == "bool" or 0
    for argument in pick.sample(schema, min(len(schema), pick.choice((1, 1, 2, 3)))):
        kind = str(argument.type)
        kind = {"List[int]": "int[]", "List[bool]": "bool[]", "Optional[Tensor]": "Tensor?"}.get(kind, kind)
        arguments[argument.name] = hostile(arguments[argument.name], kind, pick)
    return f"{name}({described(arguments)})", lambda: operator(*arguments.values())


def a_public_call(values: dict[str, dict[str, Any]], pick: random.Random) -> tuple[str, Callable[[], Any]]:
    """One call of a public function, sometimes on packed weights or for a gradient."""
    op = pick.choice(list(OPS))
    arguments = {name: values[op][name] for name in OPS[op].tensors}
    options: dict[str, Any] = {name: values[op][name] for name in GEOMETRY if name in values[op]}
    for name in pick.sample(list(arguments), pick.choice((0, 1, 2))):
        arguments[name] = hostile(arguments[name], "Tensor?", pick)
    for name in options:
        if pick.random() < 0.5:
            options[name] = pick.choice((pick.choice((*NUMBERS, 2**63, 10**30)), hostile(None, "int[]", pick)))
    backend = pick.choice((None, "native", "unfused", "reference"))
    training, packed = pick.random() < 0.3, pick.random() < 0.3

    def call() -> Any:
        tensors = list(arguments.values())
        with inherit_kernels.use_backend(backend):
            if packed:
                weights = inherit_kernels.pack(op, *tensors[1:-1])
                return getattr(inherit_kernels, op)(tensors[0], weights, residual=tensors[-1], **options)
            if training:
                tensors = [
                    t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors
                ]
            y = getattr(inherit_kernels, op)(*tensors, **options)
            return y.sum().backward() if training else y

    return f"{op}({described(arguments | options)}) {backend=} {training=} {packed=}", call


def described(arguments: dict[str, Any]) -> str:
    """The arguments, tensors by dtype, sizes and strides."""
    parts = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            strides = list(value.stride()) if value.layout == torch.strided else value.layout
            value = f"{str(value.dtype)[6:]} {value.device} {list(value.shape)} {strides}"
        parts.append(f"{name}={value}")
    return ", ".join(parts)


def main(seed: int, count: int) -> None:
    torch.set_num_threads(1)
    values = {op: valid_arguments(op) for op in OPS}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pick, every, refused = random.Random(seed), names(), 0
    for i in range(count):
        public = i % 3 == 2
        text, call = a_public_call(values, pick) if public else a_call(every[i % len(every)], values, pick)
        print(text, flush=True)
        try:
            call()
        except (TypeError, ValueError) as error:
            refused += 1
            print(f"  {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
        except (RuntimeError, MemoryError, NotImplementedError) as error:
            sentence = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"  {type(error).__name__}: {sentence[:200]}", flush=True)
            if public and not any(word in str(error).lower() for word in ("memory", "alloc", "overflow")):
                raise SystemExit("a public function raised an error that names no argument") from error
    print(f"done: {refused} of {count} refused by name", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
