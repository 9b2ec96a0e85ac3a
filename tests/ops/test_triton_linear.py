"""The Triton kernels of the linear ops: numbers under the interpreter, resources by compiling ahead of time.

Numbers need TRITON_INTERPRET=1 from the start of the process, compiling needs it absent: each half is skipped in the
other's process. `-m slow` compiles every shipped configuration; the table of resources is printed at the end of the run.

Seen failing, each by one edit of a kernel: the depth tail of a product not masked, the last partial left out of a sum,
each head overwriting the one before it.
"""

from __future__ import annotations

import os

import pytest
import torch

import inherit_kernels
from inherit_kernels.common.triton_launch import (
    SHIPPED,
    config_for,
    forced_configs,
    kernel_tables,
    recording,
)
from inherit_kernels.common.triton_products import SUM_BLOCK, weight_gradient
from inherit_kernels.ops.gated_lowrank_linear import impl_triton as gated
from inherit_kernels.ops.gated_lowrank_linear.cases import case as gated_case
from inherit_kernels.ops.lowrank_linear import impl_triton as plain
from inherit_kernels.ops.lowrank_linear.cases import case as plain_case
from inherit_kernels.testing import check_accuracy, make_inputs, poisoned_memory
from inherit_kernels.testing.triton_compile import SHARED_LIMIT, compile_launch

pytest.importorskip("triton", reason="no Triton kernel was tested: triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="numbers not proven: they need TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="resources not proven: the interpreter compiles nothing")
MODULES = {"lowrank_linear": plain, "gated_lowrank_linear": gated}
CASES = {"lowrank_linear": plain_case, "gated_lowrank_linear": gated_case}
BOTH = list(MODULES)
DTYPES = {32: torch.float32, 16: torch.bfloat16}
RANKS = (16, 32, 64, 128, 256, 512)


def case(op, rows, k, n, r, h=3, **options):
    return CASES[op]("", rows, k, n, r, *((h,) if op == "gated_lowrank_linear" else ()), **options)


# --- numbers -----------------------------------------------------------------------------------------------------------

FUSED = {"BM": 16, "BN": 16, "BK": 16, "SPLIT_N": 1, "CHUNK": 32, "num_warps": 4, "num_stages": 2}
FORMS = {
    "fused": FUSED,
    "recomputed": FUSED | {"SPLIT_N": 3},
    "more_programs_than_tiles": FUSED | {"SPLIT_N": 5, "BN": 32},
    "split": FUSED | {"SPLIT_K": 3, "BR_TILE": 16, "SPLIT_N": 0},
    "split_deeper_than_k": FUSED | {"SPLIT_K": 8, "BR_TILE": 16, "SPLIT_N": 2},
}
GRADIENT = {"BP": 16, "BQ": 16, "BM": 16, "num_warps": 4, "num_stages": 2}


def tiny(form: str, programs: int) -> dict:
    """Blocks so small that every loop runs several times."""
    gradient = GRADIENT | {"PROGRAMS": programs}
    return {"forward": FORMS[form], "backward_dx": FORMS[form], "weight_gradient": gradient, "gate_gradient": gradient}


@interpreted
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", BOTH)
def test_every_loop_several_times(op, form, dtype):
    programs = 1 if form == "fused" else 1000  # one pass, or as many partials as blocks of rows
    ragged = case(op, (20,), 33, 35, 17, 2, residual=True, activation="relu")
    with forced_configs(tiny(form, programs)), poisoned_memory():
        check_accuracy(op, ragged, "triton", dtype, layout="strided" if form == "split" else "contiguous")


@interpreted
@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh", "silu"))
@pytest.mark.parametrize("op", BOTH)
def test_activations_end_the_kernel(op, activation):
    with poisoned_memory():
        check_accuracy(
            op,
            case(op, (5,), 20, 65, 8, residual=True, activation=activation),
            "triton",
            torch.float16,
            gradients=False,
        )


@interpreted
@pytest.mark.parametrize(
    "rank", (1, 17, 100, 255, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (511, 512)))
)
@pytest.mark.parametrize("op", BOTH)
def test_ranks(op, rank):
    dtype = torch.float32 if rank % 2 else torch.bfloat16
    with poisoned_memory():
        check_accuracy(op, case(op, (3,), 40, 35, rank), "triton", dtype)


@interpreted
@pytest.mark.parametrize("heads", (1, 2, pytest.param(17, marks=pytest.mark.slow)))
def test_heads(heads):
    with forced_configs(tiny("fused", 1)), poisoned_memory():
        check_accuracy(
            "gated_lowrank_linear", case("gated_lowrank_linear", (18,), 20, 35, 5, heads), "triton", torch.float32
        )


@interpreted
@pytest.mark.parametrize("op", [pytest.param(BOTH[0], marks=pytest.mark.slow), BOTH[1]])
def test_any_strides_give_the_same_bits(op):
    inputs = make_inputs(op, case(op, (20,), 33, 35, 7, residual=True), torch.bfloat16)
    turned = {
        name: value if value is None else value.transpose(0, -1).contiguous().transpose(0, -1)
        for name, value in inputs.items()
    }
    for value in (inputs, turned):
        value["residual"] = inputs["residual"][:1].expand(20, -1)  # stride 0
    results = []
    for tensors in (inputs, turned):
        leaves = [value if value is None else value.detach().requires_grad_() for value in tensors.values()]
        with inherit_kernels.use_backend("triton"):
            y = getattr(inherit_kernels, op)(*leaves)
        y.backward(torch.ones_like(y))
        results.append([y, *[leaf.grad for leaf in leaves if leaf is not None]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted
@pytest.mark.parametrize("op", BOTH)
def test_residual_may_be_x_itself(op):
    inputs = make_inputs(op, case(op, (5,), 12, 12, 4), torch.float32)
    inputs["residual"] = inputs["x"]
    with inherit_kernels.use_backend("triton"):
        y = getattr(inherit_kernels, op)(*inputs.values())
    expected = MODULES[op].forward(*(inputs | {"residual": None}).values(), None) + inputs["x"]
    torch.testing.assert_close(y, expected)


@interpreted
@pytest.mark.parametrize("value", (float("inf"), float("nan")))
def test_padding_multiplies_no_infinity(value):
    """A rank of 3 is padded to 16 and 2 heads to 16: infinity times that padding would be NaN in every gradient."""
    rank, heads = 3, 2
    up, gate_weight, x, down = (
        torch.rand(heads, 5, rank),
        torch.rand(heads, rank),
        torch.rand(4, 6),
        torch.rand(rank, 6),
    )
    bias, t, dz = torch.rand(heads, 5), torch.rand(4, rank), torch.rand(4, 5)
    dz[0, 0] = value
    needs = [True] * 6
    found = gated.backward(dz, t, x, down, up, gate_weight, None, bias, None, [*needs[:4], False, True])
    for gradient in (found[0][1:], found[2][:, 1:], found[5][:, 1:]):
        assert gradient.isfinite().all()
    dx, d_down, d_up, d_bias = plain.backward(dz, t, x, down, up[0], bias[0], None, needs[:4])
    assert dx[1:].isfinite().all() and d_up[1:].isfinite().all() and d_bias[1:].isfinite().all()
    if value == float("inf"):
        assert torch.equal(dx[0], dx[0].new_full((6,), value)) and d_bias[0] == value
    assert not d_down.isfinite().any()


@interpreted
@pytest.mark.parametrize("programs", (pytest.param(1, marks=pytest.mark.slow), 40))
@pytest.mark.parametrize("op", BOTH)
def test_a_gradient_asked_for_alone_is_the_same(op, programs):
    module, dtype = MODULES[op], torch.bfloat16
    *tensors, _ = make_inputs(op, case(op, (40,), 18, 20, 17, 2), dtype).values()
    t = module.forward_saving(*tensors, None, None)[1]
    dz = torch.randn(40, 20).to(dtype)
    with forced_configs(tiny("split", programs)):
        everything = module.backward(dz, t, *tensors, None, [True] * len(tensors))
        for index, expected in enumerate(everything):
            alone = module.backward(dz, t, *tensors, None, [i == index for i in range(len(tensors))])
            assert torch.equal(alone[index], expected)
            assert all(gradient is None for i, gradient in enumerate(alone) if i != index)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("op", BOTH)
def test_forward_is_forward_saving_without_t(op):
    *tensors, _ = make_inputs(op, case(op, (20,), 24, 40, 20), torch.float16).values()
    assert torch.equal(
        MODULES[op].forward(*tensors, None, "silu"), MODULES[op].forward_saving(*tensors, None, "silu")[0]
    )


@interpreted
def test_partials_wider_than_one_block_of_the_sum():
    a, b = torch.randn(100, 70), torch.randn(100, 2 * SUM_BLOCK // 70 + 3)
    config = GRADIENT | {"PROGRAMS": 10**6}
    with poisoned_memory():
        out, sums = weight_gradient(config, a, b, transposed=True, need_sums=True)
    torch.testing.assert_close(out[0], b.t() @ a)
    torch.testing.assert_close(sums[0], a.sum(0))


# --- launches ----------------------------------------------------------------------------------------------------------


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(op: str, m: int, k: int, n: int, r: int, h: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x and the weights with every bias."""
    x, down = meta(m, k, dtype=dtype), meta(r, k, dtype=dtype)
    if op == "lowrank_linear":
        return [x, down, meta(n, r, dtype=dtype), meta(n, dtype=dtype)]
    gate = meta(h, r, dtype=dtype), meta(h, dtype=dtype)
    return [x, down, meta(h, n, r, dtype=dtype), *gate, meta(h, n, dtype=dtype)]


def record_forward(op, *sizes, dtype=torch.bfloat16, activation="gelu"):
    tensors = arguments(op, *sizes, dtype)
    with recording() as launches:
        MODULES[op].forward_saving(*tensors, meta(sizes[0], sizes[2], dtype=dtype), activation)
    return launches


def record_backward(op, *sizes, dtype=torch.bfloat16):
    m, _, n, r, *_ = sizes
    tensors = arguments(op, *sizes, dtype)
    with recording() as launches:
        MODULES[op].backward(meta(m, n, dtype=dtype), meta(m, r, dtype=dtype), *tensors, None, [True] * len(tensors))
    return launches


def names(launches) -> list[str]:
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]


@pytest.mark.parametrize("op", BOTH)
def test_number_of_launches(op):
    many, few = (65536, 1024, 1024, 64, 3), (8, 1024, 1024, 64, 3)
    assert names(record_forward(op, *many)) == [f"{op}_fwd"]
    assert names(record_forward(op, *few)) == ["partial_product", f"{op}_fwd"]
    gradient = ["weight_gradient", "sum_partials"]
    if op == "lowrank_linear":
        assert names(record_backward(op, *many)) == [f"{op}_fwd", *gradient * 2]
        assert names(record_backward(op, *few)) == ["partial_product", f"{op}_fwd", *["weight_gradient"] * 2]
    else:
        assert names(record_backward(op, *many)) == [f"{op}_bwd_dx", *gradient * 3]
        expected = [f"{op}_bwd_partials", f"{op}_bwd_dx", *["weight_gradient"] * 3]
        assert names(record_backward(op, *few)) == expected


@pytest.mark.parametrize("op", BOTH)
def test_no_rows_no_launch(op):
    assert record_forward(op, 0, 24, 40, 8, 3) == []
    assert record_backward(op, 0, 24, 40, 8, 3) == []


@pytest.mark.parametrize("op", BOTH)
def test_every_rank_has_a_configuration_and_candidates(op):
    for kernel in MODULES[op].KERNELS:
        for bits, dtype in DTYPES.items():
            for rank in RANKS:
                keys = {"BR": rank, "M": 100}
                shipped = config_for(op, kernel, dtype, torch.device("meta"), keys)
                space = MODULES[op].tuning_space(kernel, bits, rank)
                assert 9 <= len(space) <= 30
                for config in space:
                    optional = {"SPLIT_K", "BR_TILE"}
                    assert config.keys() | optional == shipped.keys() | optional, (kernel, config)
                    with forced_configs({kernel: config}):
                        (record_forward if kernel == "forward" else record_backward)(
                            op, 100, 64, 64, rank, 3, dtype=dtype
                        )


# --- resources ---------------------------------------------------------------------------------------------------------


def launches_of(op: str, kernel: str, entry: dict) -> list:
    """The launches that a configuration decides, of a large aligned call with every optional argument."""
    sizes, dtype = (entry.get("M", 16384), 4096, 4096, entry["BR"], 3), DTYPES[entry["bits"]]
    with forced_configs({kernel: entry["config"]}):
        launches = (
            record_forward(op, *sizes, dtype=dtype) if kernel == "forward" else record_backward(op, *sizes, dtype=dtype)
        )
    own = {
        "forward": ("partial_product", f"{op}_fwd"),
        "backward_dx": ("partial_product", f"{op}_fwd", f"{op}_bwd_partials", f"{op}_bwd_dx"),
        "weight_gradient": ("weight_gradient",),
        "gate_gradient": ("weight_gradient",),
    }[kernel]
    chosen = [launch for launch, name in zip(launches, names(launches), strict=True) if name in own]
    if kernel == "weight_gradient":  # the last of three is the gate's
        return chosen[:2]
    return chosen[2:] if kernel == "gate_gradient" else chosen


def check_resources(op: str, kernel: str, entry: dict, arch: int, keep_resources) -> None:
    config = entry["config"]
    for launch in launches_of(op, kernel, entry):
        found = compile_launch(launch, arch)
        keep_resources(found, bits=entry["bits"], BR=entry["BR"], M=entry.get("M"))
        assert found.stack == 0
        assert not found.serialised
        assert not found.undefined
        assert found.shared <= SHARED_LIMIT[80]  # the same table serves both
        assert found.loads16 > 0
        if entry["bits"] == 16:
            rows = config["BP"] if kernel.endswith("gradient") else config["BM"]
            assert (found.wgmma if arch == 90 and rows >= 64 else found.mma + found.wgmma) > 0


def entries(op: str):
    return [(kernel, entry) for kernel in MODULES[op].KERNELS for entry in kernel_tables(op, SHIPPED)[kernel]]


@compiled
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize(
    "op, kernel, bits, rank, rows",
    [
        ("lowrank_linear", "forward", 16, 256, 16384),
        ("lowrank_linear", "forward", 16, 64, 16),
        ("gated_lowrank_linear", "forward", 16, 128, 16384),
        ("gated_lowrank_linear", "backward_dx", 16, 64, 16384),
        ("gated_lowrank_linear", "weight_gradient", 16, 64, None),
    ],
)
def test_resources(op, kernel, bits, rank, rows, arch, keep_resources):
    (entry,) = [
        entry
        for name, entry in entries(op)
        if (name, entry["bits"], entry["BR"], entry.get("M")) == (kernel, bits, rank, rows)
    ]
    check_resources(op, kernel, entry, arch, keep_resources)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("op, index", [(op, index) for op in BOTH for index in range(len(entries(op)))])
def test_resources_of_every_configuration(op, index, arch, keep_resources):
    check_resources(op, *entries(op)[index], arch, keep_resources)
