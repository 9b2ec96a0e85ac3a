"""The Triton kernels of both convolution ops: blocks so small that every loop and split runs several times, and what the
shipped configurations compile to.

The first part runs under Triton's interpreter (TRITON_INTERPRET=1, read when triton is imported), the second compiles
without a GPU and must not.

Seen failing once each: the forward without the check of the right border, dx without that of the last output, a split of
taps and channels, of d_down and of d_up that runs past its end, dx with the taps of a stride one apart, the gate from the
first 32 tiles only, a sum of the first 16 partials only, dt without the gate's share, the gate's gradient from the first 16
tiles of channels only, a gradient of the first 8 samples only, windows that count or read
the positions between strides.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

import inherit_kernels
from inherit_kernels.common.triton_launch import forced_configs, interpreting, kernel_tables, recording
from inherit_kernels.dispatch import problem_of
from inherit_kernels.ops.gated_lowrank_conv2d.cases import case as gated_case
from inherit_kernels.ops.lowrank_conv2d.cases import case as plain_case
from inherit_kernels.registry import OPS as OPERATORS
from inherit_kernels.testing import Case, check_accuracy, make_inputs, poisoned_memory

OPS = ("lowrank_conv2d", "gated_lowrank_conv2d")
interpreted = pytest.mark.skipif(not interpreting(), reason="kernels not run: they need TRITON_INTERPRET=1 or a GPU")
compiled = pytest.mark.skipif(interpreting(), reason="kernels not compiled: Triton's interpreter is on")


def configs(
    op: str, split_n: int = 1, split_k: int = 1, tiles: int = 2, programs: int = 8
) -> dict[str, dict[str, int]]:
    """The smallest blocks for every kernel of an op."""
    blocks = {
        "forward": {"BM": 16, "BN": 16},
        "forward_down": {"BM": 16, "BK": 16, "SPLIT_K": split_k},
        "backward_dt": {"BM": 16, "BN": 16, "BR": 16},
        "backward_dx": {"BM": 16, "BC": 16, "BK": 16},
        "backward_down": {"BM": 16, "BC": 16, "BR": 16, "PROGRAMS": programs},
        "backward_up": {"BM": 16, "BN": 16, "BR": 16, "PROGRAMS": programs},
    }
    options = {"num_warps": 4, "num_stages": 2}
    found = {name: block | options for name, block in blocks.items()}
    found["forward"] |= (
        {"BK": 16, "SPLIT_N": split_n, "SPLIT_K": split_k} if op == "lowrank_conv2d" else {"TILES": tiles}
    )
    return found


def check(op: str, case: Case, dtype: torch.dtype, layout: str, **splits: int) -> None:
    """Accuracy of output and gradients with the smallest blocks, on poisoned memory."""
    with forced_configs(configs(op, **splits)), poisoned_memory():
        check_accuracy(op, case, "triton", dtype, layout=layout)


def case_of(
    op: str, batch: tuple[int, ...], c: int, size: Any, n: int, r: int, kernel: Any, h: int = 3, **more
) -> Case:
    if op == "lowrank_conv2d":
        return plain_case("small_blocks", batch, c, size, n, r, kernel, **more)
    return gated_case("small_blocks", batch, c, size, n, r, h, kernel, **more)


@interpreted
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "dtype, layout, splits",
    (
        (torch.bfloat16, "channels_last", {}),
        (torch.float32, "contiguous", {"split_n": 2, "split_k": 3, "tiles": 1, "programs": 64}),
        # more shares than there is work
        pytest.param(
            *(torch.float16, "channels_last", {"split_n": 5, "split_k": 40, "tiles": 9, "programs": 1}),
            marks=pytest.mark.slow,
        ),
    ),
    ids=("unsplit", "split", "overlong"),
)
def test_every_loop_and_split_several_times(op, dtype, layout, splits):
    case = case_of(op, (2,), 18, (3, 5), 19, 17, (2, 2), padding=1, residual=True, activation="relu")
    check(op, case, dtype, layout, **splits)


@interpreted
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rank", (1, 65, pytest.param(512, marks=pytest.mark.slow)))
def test_ranks(op, rank):
    case = case_of(op, (2,), 3, (2, 2), 4, rank, (1, 1), h=2)
    check(op, case, torch.float16 if rank % 2 else torch.float32, "channels_last")


@interpreted
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "size, kernel, options",
    (
        ((7, 9), (5, 1), {"stride": (3, 2), "padding": (4, 0)}),
        ((9, 8), (3, 4), {"stride": (2, 4), "padding": (1, 3), "dilation": (2, 2)}),  # stride and dilation not coprime
        ((4, 3), (2, 3), {"stride": (1, 3), "padding": (3, 5), "dilation": (1, 2)}),  # windows wholly in the padding
        ((6, 5), (2, 2), {"stride": (3, 3)}),  # inputs that no window reaches
        ((1, 6), (1, 2), {"stride": (5, 1), "padding": (2, 0)}),
    ),
)
@pytest.mark.parametrize("channels", (17, pytest.param(3, marks=pytest.mark.slow)))
def test_geometries(op, size, kernel, options, channels):
    case = case_of(op, (2,), channels, size, 5, 4, kernel, residual=True, **options)
    check(op, case, torch.float32, "contiguous" if op == "lowrank_conv2d" else "channels_last", split_k=2)


@interpreted
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("channels", (1, 3, pytest.param(15, marks=pytest.mark.slow)))
def test_blocks_of_several_taps(op, channels):
    """Few channels: a step of 16 columns begins and ends within taps, and the last is not full."""
    case = case_of(op, (2,), channels, (8, 7), 5, 4, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    for layout in ("contiguous", "channels_last"):
        check(op, case, torch.bfloat16, layout, split_k=2)


@interpreted
@pytest.mark.parametrize("heads", (1, 5, pytest.param(40, marks=pytest.mark.slow)))
def test_heads(heads):
    case = gated_case("heads", (2,), 4, (3, 6), 18, 34, heads, (1, 1), activation="silu")
    check("gated_lowrank_conv2d", case, torch.float32, "channels_last", tiles=1)


@interpreted
def test_the_shares_of_a_long_image_add_up():
    """34 tiles: the sums that the gate reads come in blocks of 32, 24 partial gradients in blocks of 16, a few of no tile."""
    case = gated_case("long", (1,), 2, (34, 16), 3, 2, 2, (1, 1))
    check("gated_lowrank_conv2d", case, torch.float32, "channels_last", programs=24)


@interpreted
@pytest.mark.parametrize("batch, channels", ((9, 4), (1, 17 * 32)))
def test_the_shares_of_samples_and_channels_add_up(batch, channels):
    """Gradients come in blocks of 8 samples, the gate's in blocks of 16 tiles of 32 channels."""
    case = gated_case("wide", (batch,), 2, (1, 2), channels, 3, 2, (1, 1))
    with poisoned_memory():  # the shipped blocks: the smallest take 30 s
        check_accuracy("gated_lowrank_conv2d", case, "triton", torch.float32, layout="channels_last")


@interpreted
@pytest.mark.parametrize("op", OPS)
def test_any_strides(op):
    """Every argument and the cotangent as a view with strides of its own, the expanded ones with strides of zero."""
    case = case_of(op, (2,), 6, (3, 4), 7, 3, (3, 2), padding=1, residual=True)
    inputs = make_inputs(op, case, torch.float32)
    expected = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    views = {name: _scattered(value).requires_grad_() for name, value in inputs.items()}
    results = []
    for tensors, backend in ((expected, "reference"), (views, "triton")):
        with inherit_kernels.use_backend(backend):
            y = getattr(inherit_kernels, op)(*tensors.values(), **case.options)
        y.sum().backward()
        results.append([y.detach(), *(value.grad for value in tensors.values())])
    for actual, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def _scattered(value: torch.Tensor) -> torch.Tensor:
    """Equal to `value`, its dimensions in reverse order in memory, with NaN between the elements."""
    order = tuple(reversed(range(value.dim())))
    wide = value.new_full((*(2 * value.shape[i] + 1 for i in order),), float("nan"))
    view = wide[tuple(slice(1, None, 2) for _ in order)].permute(order)
    view.copy_(value)
    return view.detach()


# --- compilation -------------------------------------------------------------------------------------------------------


def shipped() -> list:
    """Every shipped configuration × architecture; a covering few are not marked slow."""
    found = []
    for op in OPS:
        for kernel, buckets in kernel_tables(op, "triton").items():
            if op == "gated_lowrank_conv2d" and kernel.startswith("backward"):
                continue  # the kernels and entries are those of lowrank_conv2d, as a test below asserts
            for bucket in buckets:
                for arch in (80, 90):
                    few = bucket["bits"] == 16 and bucket.get("BR", 64) == 64 and bucket.get("M", 0) in (0, 65536)
                    covering = few and (arch == 90 or kernel in ("forward", "backward_dx"))
                    name = f"{op}-{kernel}-{bucket['bits']}-{bucket.get('BR', 64)}-{bucket.get('M', 0)}-sm{arch}"
                    marks = () if covering else pytest.mark.slow
                    found.append(pytest.param(op, kernel, bucket, arch, id=name, marks=marks))
    return found


def record(op: str, case: Case, dtype: torch.dtype, configs: dict[str, dict[str, int]]) -> list:
    """The launches of every form of the forward and of a backward on meta tensors, channels-last."""
    implementation = import_module(f"inherit_kernels.ops.{op}.impl_triton")
    *tensors, residual = (
        torch.empty(case.shapes[name], dtype=dtype, device="meta") for name in inherit_kernels.registry.OPS[op].tensors
    )
    tensors = [tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor for tensor in tensors]
    residual = residual.to(memory_format=torch.channels_last)
    options = [(case.options.get(name, least),) * 2 for name, least in (("stride", 1), ("padding", 0), ("dilation", 1))]
    with recording() as launches, forced_configs(configs):
        problem = problem_of(OPERATORS[op], (*tensors, residual), (*options, "relu"), training=False)
        for backend in OPERATORS[op].triton_backends.values():
            if backend.supports(problem) is None:
                backend.forward(*tensors, residual, *options, "relu")
        y, t = implementation.forward_saving(*tensors, residual, *options, "relu")
        implementation.backward(y, t, *tensors, *options, None, (True,) * len(tensors))
    return launches


def launches_of(op: str, kernel: str, bucket: dict[str, Any]) -> list:
    """The launches that one configuration decides, each once."""
    dtype = torch.bfloat16 if bucket["bits"] == 16 else torch.float32
    case = case_of(op, (2,), 64, (28, 28), 128, bucket.get("BR", 64), (3, 3), residual=True, padding=1)
    names = {
        "forward": f"{op}_fwd_kernel",
        "forward_down": f"{op}_fwd_down_kernel",
        "backward_dt": "conv_bwd_dt_kernel",
        "backward_dx": "conv_bwd_dx_kernel",
        "backward_down": "conv_bwd_down_kernel",
        "backward_up": "conv_bwd_up_kernel",
    }
    wanted = {names[kernel]} | ({"conv_partials_kernel"} if bucket["config"].get("SPLIT_K", 1) > 1 else set())
    launches = record(op, case, dtype, {kernel: bucket["config"]})
    different = {str((launch.kernel.__name__, launch.keywords)): launch for launch in launches}.values()
    return [launch for launch in different if launch.kernel.__name__ in wanted]


@compiled
@pytest.mark.parametrize("op, kernel, bucket, arch", shipped())
def test_shipped_configurations_fit_the_hardware(op, kernel, bucket, arch, keep_resources):
    from inherit_kernels.testing.triton_compile import compile_launch

    config = bucket["config"]
    for launch in launches_of(op, kernel, bucket):
        found = compile_launch(launch, arch)
        keep_resources(found, bits=bucket["bits"], BR=bucket.get("BR"), M=bucket.get("M"))
        assert found.stack == 0 and not found.serialised and not found.undefined, found
        assert found.shared <= 163 * 1024, found
        assert found.loads16 > 0, found
        adds_only = kernel == "forward_down" and config["SPLIT_K"] > 1 and "partials" not in found.kernel
        if bucket["bits"] == 16 and arch == 90 and config.get("BM", 0) >= 64 and not adds_only:
            assert found.wgmma > 0, found


@compiled
@pytest.mark.parametrize("bits", (16, 32))
@pytest.mark.parametrize(
    "rank", (16, pytest.param(32, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow))
)
@pytest.mark.parametrize("op", OPS)
def test_a_first_layer_fits_the_hardware(op, bits, rank, keep_resources):
    from inherit_kernels.testing.triton_compile import compile_launch

    dtype = torch.bfloat16 if bits == 16 else torch.float32
    case = case_of(op, (32,), 3, (224, 224), 64, rank, (7, 7), residual=True, stride=2, padding=3)
    launches = {launch.kernel.__name__: launch for launch in record(op, case, dtype, {})}
    for name in [name for name in launches if "_fwd_" in name]:
        for arch in (80, 90):
            found = compile_launch(launches[name], arch)
            keep_resources(found, bits=bits, BR=rank, M="3 channels")
            assert not found.serialised and not found.undefined, found
            # 8 bytes in a kernel of 80 registers: the frame of a call, not a spill.
            assert found.stack == 0 or (found.stack == 8 and found.registers < 128), found
            assert found.shared <= 163 * 1024, found


@compiled
@pytest.mark.parametrize("op", OPS)
def test_sizes_of_one_compile(op):
    """Triton makes an argument of value one a constant while compiling, which the interpreter never does."""
    from inherit_kernels.testing.triton_compile import compile_launch

    case = case_of(op, (1,), 1, (1, 1), 1, 1, (1, 1), h=1, residual=True)
    launches = record(op, case, torch.float32, configs(op, split_k=2))
    assert {"conv_partials_kernel", "conv_bwd_dx_kernel"} <= {launch.kernel.__name__ for launch in launches}
    for launch in launches:
        assert compile_launch(launch, 90).registers > 0


UNTUNED = [(bits, rank, heads) for bits in (16, 32) for rank, heads in ((16, 1), (64, 3), (512, 8), (512, 40))]


@compiled
@pytest.mark.parametrize(
    "bits, rank, heads", [pytest.param(*u, marks=() if u == (32, 512, 40) else pytest.mark.slow) for u in UNTUNED]
)
def test_kernels_without_a_table_fit_the_hardware(bits, rank, heads, keep_resources):
    from inherit_kernels.testing.triton_compile import compile_launch

    dtype = torch.bfloat16 if bits == 16 else torch.float32
    case = gated_case("untuned", (32,), 64, (28, 28), 128, rank, heads, (3, 3), residual=True, padding=1)
    names = ("conv_sum_partials", *(f"gated_lowrank_conv2d_bwd_{n}" for n in ("merge", "gate", "sum")))
    launches = {launch.kernel.__name__: launch for launch in record("gated_lowrank_conv2d", case, dtype, {})}
    for name in names:
        for arch in (80, 90):
            found = compile_launch(launches[f"{name}_kernel"], arch)
            keep_resources(found, bits=bits, BR=rank, M=None)
            assert found.stack == 0 and not found.serialised and not found.undefined, found
            assert found.shared <= 48 * 1024, found


def test_both_ops_ship_the_same_backward():
    plain, gated = (kernel_tables(op, "triton") for op in OPS)
    assert {name: plain[name] for name in plain if name != "forward"} == {
        name: gated[name] for name in gated if name.startswith("backward")
    }


@pytest.mark.parametrize("op", OPS)
def test_tables_and_tuning_spaces_name_the_same_keys(op):
    tables = kernel_tables(op, "triton")
    backends = OPERATORS[op].triton_backends.values()
    owner = {kernel: backend for backend in backends for kernel in backend.KERNELS}
    assert tuple(tables) == tuple(owner)
    for kernel, buckets in tables.items():
        assert {(b["bits"], b["BR"]) for b in buckets} == {(bits, 16 << i) for bits in (16, 32) for i in range(6)}
        for bits in (16, 32):
            for rank in (16, 128, 512):
                space = owner[kernel].tuning_space(kernel, bits, rank)
                assert 8 <= len(space) <= 25
                assert all(config.keys() == buckets[0]["config"].keys() for config in space)
