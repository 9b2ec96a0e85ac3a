"""The words of CUDA kernels on the CPU: what each does, under many schedules, and that the tool catches planted faults.

The faults are kernels of tests/emulation/micro_kernels.cu that are wrong, and copies of right ones with one statement removed.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulation import build
from emulation.build import Array, from_bits, to_bits

if build.missing():
    pytest.skip(build.missing(), allow_module_level=True)

SOURCES = ("tests/emulation/micro_kernels.cu", "tests/emulation/bind_micro_kernels.cpp")
SEEDS = range(12)


def run(module, name, values, out_shape, seed=0, overlap=True, count=0):
    """One micro-kernel on `values`; its output, which was NaN before."""
    module.configure(seed, overlap)
    given, out = Array.of(module, values), Array(module, out_shape, np.float32)
    scratch, flags = Array(module, (1024,), np.float32), Array.of(module, np.zeros(4, np.int32))
    module.run(name, given.address, out.address, scratch.address, flags.address, count)
    assert np.array_equal(given.read(), values), "the input changed"
    return out.read()


def expect(module, name, values, expected, **options):
    for seed in SEEDS:
        np.testing.assert_allclose(run(module, name, values, expected.shape, seed, **options), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def words():
    return build.load("micro", SOURCES)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_barriers_and_shared_memory(words):
    values = numbers(3, 64)
    expect(words, "reverse", values, values[:, ::-1])


def test_warp_words(words):
    values = numbers(2, 32)
    lanes = np.arange(32)
    rows = [values.sum(1, keepdims=True), values[:, 5:6], values[:, lanes ^ 1]]
    expected = np.stack([np.broadcast_to(row, (2, 32)).reshape(64) for row in rows])
    for seed in SEEDS:
        np.testing.assert_allclose(run(words, "warp", values, (3, 64), seed), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, dtype", [("mma_bf16", "bfloat16"), ("mma_half16", "float16")])
def test_matrix_words(words, name, dtype):
    bits = to_bits(numbers(24, 16), dtype)
    exact = from_bits(bits, dtype)
    expected = (exact[:16] @ exact[16:].T + 1).astype(np.float32)
    for seed in SEEDS:
        np.testing.assert_allclose(run(words, name, bits, (16, 8), seed), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [512, 300, 0])
def test_background_copies(words, count):
    values = numbers(512)[:count]  # the source ends at a guard page: nothing beyond may be read
    padded = np.concatenate([values, np.zeros(512 - count, np.float32)])
    expect(words, "copy", values, padded[np.arange(512) ^ 4], count=count)


def test_streaming_loads(words):
    values = numbers(256)
    expect(words, "stream", values, values)


def test_flags_between_blocks(words):
    values = numbers(6)
    for seed in SEEDS:
        np.testing.assert_allclose(run(words, "flag", values, (2,), seed), [values.sum()] * 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("overlap", [True, False])
def test_overlapped_grids(words, overlap):
    values = numbers(256)
    expect(words, "grids", values, values + 2 * values[::-1], overlap=overlap)


def test_conversions_round_to_nearest_even():
    module = build.load("micro", SOURCES)
    edges = np.float32(
        [0, -0.0, 1, 65504, 65519, 65520, 1e30, np.inf, -np.inf, 6e-8, 2.9e-8, 3.1e-8, 6.1e-5, 1 + 2**-11]
    )
    values = np.concatenate([edges, numbers(4000), numbers(4000) * 1e-6, numbers(4000) * 1e4])
    for name, dtype in (("float16", 0), ("bfloat16", 1)):
        np.testing.assert_array_equal(
            module.round_trip(values.tobytes(), dtype), from_bits(to_bits(values, name), name)
        )


FAULTS = {
    "outside": r"memory access outside the shared memory of block .* \(at byte 256 of 256\)\n  in block .*, thread \(63,",
    "deadlock": r"deadlock.*\n.*33 in __syncthreads.*\n.*31 in __syncwarp",
    "polling": r"deadlock: only polling loops run",
    "divergent": r"divergent warp: this lane is in shuffle .*\n  in block \(0, 0, 0\), thread",
    "in_flight": r"ended with copies in flight\n  in block",
    "misaligned": r"load16: the address is not 16-byte aligned",
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_become_exceptions(words, name):
    messages = []
    for seed in SEEDS:
        try:
            run(words, name, numbers(256), (256,), seed)
        except RuntimeError as fault:
            messages.append(str(fault))
    assert len(messages) == len(SEEDS)
    assert all(re.search(FAULTS[name], message) for message in messages), messages
    values = numbers(3, 64)
    np.testing.assert_array_equal(run(words, "reverse", values, (3, 64)), values[:, ::-1])  # and the tool goes on


# kernel, what is removed, values, what comes out when all is right
REMOVED = {
    "barrier": ("reverse", "  __syncthreads();\n", numbers(3, 64), numbers(3, 64)[:, ::-1]),
    "wait for copies": ("copy", "  wait_copies<1>();\n", numbers(512), numbers(512)[np.arange(512) ^ 4]),
    "wait for the grid before": (
        "grids",
        "  wait_previous_grid();\n",
        numbers(256),
        numbers(256) + 2 * numbers(256)[::-1],
    ),
}


def without(statement):
    path = SOURCES[0]
    text = (build.ROOT / path).read_text()
    assert statement in text
    return path, text.replace(statement, "", 1)


@pytest.mark.parametrize("name", REMOVED)
def test_a_missing_synchronisation_is_caught(name):
    kernel, statement, values, expected = REMOVED[name]
    module = build.load("micro", SOURCES, replace=without(statement))
    caught = 0
    for seed in SEEDS:
        try:
            caught += not np.allclose(run(module, kernel, values, expected.shape, seed, count=values.size), expected)
        except RuntimeError:
            caught += 1
    assert caught >= 3, f"{caught} of {len(SEEDS)} schedules noticed it"


SANITIZED = """
from test_emulation import numbers, run
for name in {kernels!r}:
    for seed in range(3):
        run(module, name, numbers(512), (512,), seed, count=512)
"""


def sanitized(kernels, statement=""):
    module = build.build("micro", SOURCES, sanitize=True, replace=without(statement) if statement else None)
    return build.run_sanitized(module, SANITIZED.format(kernels=kernels))


def test_the_sanitizer_finds_no_race_in_right_kernels():
    done = sanitized(["reverse", "warp", "mma_bf16", "copy", "flag", "grids"])
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kernel, statement", [("reverse", "  __syncthreads();\n"), ("mma_bf16", "  __syncwarp();\n")])
def test_the_sanitizer_names_a_race(kernel, statement):
    done = sanitized([kernel], statement)
    assert done.returncode == build.RACE_EXIT, done.stderr[-3000:]
    assert f"micro_{kernel.split('_')[0]}_kernel" in done.stderr
