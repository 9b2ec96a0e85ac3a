"""Everything that a GPU lent for minutes should be asked, in one command; prepared where there is none.

`prepare` fills Triton's cache with what will be timed, in the order of its worth, and packs it with the CUDA library (built by
benchmarks/gpu.sh). `run` unpacks, then goes through `stages`, each a process of its own with a share of the time that is
left; after each it writes `page.txt`, what a person reads, and `results.tar.gz`, everything.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = Path("/tmp/inherit_kernels_lease/triton")  # Triton keeps absolute paths: the same here and there
ARCHIVE = ROOT / "build" / "lease" / "lease.tar.xz"
WORK = ROOT / "build" / "lease" / "work"  # what the stages write; `results.tar.gz` holds it
MOST_BYTES = 45 << 20
ARCH = 90
FAILED_BEFORE = "test_heads or test_ranks or one_compilation or one_graph or aotinductor or padding"


@dataclass(frozen=True)
class Stage:
    """One process: its name, its share of the time left when it starts, and its command; `beside` runs with it."""

    name: str
    share: float
    command: tuple[str, ...]
    beside: tuple[str, ...] = ()


def stages(rehearse: bool, out: Path) -> list[Stage]:
    """In the order of their worth; a rehearsal runs the same code on a CPU."""

    def module(name: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", name, *arguments)

    tiny = ("--rehearse",) if rehearse else ()
    tests = ("-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "-q", "--tb=short", "-rfE")
    tests += ("-m", "gpu", "tests/gpu", *(("--gpu-rehearsal",) if rehearse else ()))
    if not rehearse and find_spec("xdist"):
        tests += ("-n", str(min(14, os.cpu_count() or 1)), "--max-worker-restart", "100")
    calls = ("native", "blas", "triton") if not rehearse else ("unfused",)
    on = ("--device", "cpu", "--dtype", "float32") if rehearse else ()
    return [
        *(Stage(f"first calls, {name}", 0.08, module("benchmarks.gpu.sanitize", name, *on)) for name in calls),
        Stage("tests that failed before", 0.12, module("pytest", *tests, "-k", FAILED_BEFORE)),
        Stage(
            "networks",
            0.35,
            module("benchmarks.gpu.networks", "--out", f"{out}/networks.csv", "--seconds", "{seconds}", *tiny),
        ),
        Stage("tests", 0.4, module("pytest", *tests), () if rehearse else ("bash", "benchmarks/gpu.sh", "sanitize")),
        *(
            []
            if rehearse
            else [Stage("tune", 0.4, module("inherit_kernels.tune", "--device", "cuda", "--minutes", "{minutes}"))]
        ),
        Stage(
            "sweep", 0.95, module("benchmarks.gpu.run", "--results", f"{out}/sweep", "--minutes", "{minutes}", *tiny)
        ),
    ]


# --- prepare -----------------------------------------------------------------------------------------------------------


def jobs() -> Iterator[tuple[Any, ...]]:
    """(op, case, dtype, training, backend, forced configurations) of what a lease launches, the most important first."""
    import torch

    from benchmarks.gpu import cases
    from inherit_kernels.tune_kernels import points_of

    for item in cases.core():
        training = item.mode != "forward"
        yield item.point.op, item.point.case, getattr(torch, item.dtype), training, "triton", {}
    points = {
        op: [p for p in points_of(op) if p.dtype == torch.bfloat16] for op in ("lowrank_linear", "lowrank_conv2d")
    }
    for kinds in (("backward_dx", "weight_gradient", "backward_dt", "backward_down", "backward_up"), ("forward",)):
        for found in points.values():
            for point in found:
                if point.kernel in kinds and point.case.shapes["down"][0] in (64, 128, 32, 16):
                    for config in point.candidates:
                        yield point.op, point.case, point.dtype, point.training, point.backend, {point.kernel: config}


def compile_job(job: tuple[Any, ...]) -> tuple[int, int]:
    """Compile the launches of a job into Triton's cache; (compiled, failed)."""
    from inherit_kernels.common import triton_launch
    from inherit_kernels.testing.triton_compile import compiled, record
    from inherit_kernels.tune_tables import LAYOUTS

    op, case, dtype, training, backend, forced = job
    triton_launch._slug = lambda device: triton_launch.REFERENCE_GPU  # as on the device that is meant
    try:
        with triton_launch.forced_configs(forced):
            launches = record(op, case, dtype, training, LAYOUTS["cuda"], backend)
        for launch in launches:
            compiled(launch, ARCH)
    except Exception:  # what cannot be compiled will not be timed either
        return 0, 1
    return len(launches), 0


def prepare(seconds: float, processes: int, limit: int | None) -> None:
    """Fill the cache for `seconds`, then pack it with the library."""
    from inhernet.console import say

    CACHE.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    end, done, failed, handed = time.monotonic() + seconds, 0, 0, 0
    wanted = list(jobs())[:limit]
    with get_context("spawn").Pool(processes) as pool:
        waiting: list[Any] = []
        for job in wanted:
            while len(waiting) >= 2 * processes:
                good, bad = waiting.pop(0).get()
                done, failed = done + good, failed + bad
            if time.monotonic() > end:
                break
            waiting.append(pool.apply_async(compile_job, (job,)))
            handed += 1
        for result in waiting:
            good, bad = result.get()
            done, failed = done + good, failed + bad
    say(f"{handed} of {len(wanted)} jobs: {done} launches compiled or known, {failed} jobs that do not compile")
    pack()
    size = ARCHIVE.stat().st_size
    say(f"{ARCHIVE.relative_to(ROOT)}: {size / 2**20:.1f} MB" + (", TOO LARGE" if size > MOST_BYTES else ""))


def pack() -> None:
    """Written aside, then renamed: cubins and their descriptions, the library and the note of its build."""
    ARCHIVE.parent.mkdir(parents=True, exist_ok=True)
    aside = ARCHIVE.with_suffix(".tmp")
    with tarfile.open(aside, "w:xz", preset=9) as archive:
        for path in sorted(CACHE.rglob("*")):
            if path.suffix in (".cubin", ".json"):
                archive.add(path, f"triton/{path.relative_to(CACHE)}")
        for name in ("_C.abi3.so", "_build.json"):
            library = ROOT / "inherit_kernels" / name
            if library.exists():
                archive.add(library, f"library/{name}")
    os.replace(aside, ARCHIVE)


def unpack(library: bool) -> str:
    """Put the cache, and the library unless this is a rehearsal, where they belong; one line of what was there."""
    if not ARCHIVE.exists():
        return f"nothing was prepared: {ARCHIVE.relative_to(ROOT)} is not there"
    start, kernels = time.monotonic(), 0
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            kind, _, name = member.name.partition("/")
            target = (CACHE if kind == "triton" else ROOT / "inherit_kernels") / name
            source = archive.extractfile(member)
            if source is not None and ".." not in name and (library or kind == "triton"):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())
                kernels += target.suffix == ".cubin"
    return f"{kernels} kernels{library * ' and the library'} unpacked in {time.monotonic() - start:.0f} s"


# --- the lease ---------------------------------------------------------------------------------------------------------


def run(seconds: float, rehearse: bool, out: Path) -> int:
    """All stages within `seconds`; how many failed."""
    end = time.monotonic() + seconds
    shutil.rmtree(WORK, ignore_errors=True)
    for folder in (out, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    lines = [unpack(library=not rehearse)]
    environment = os.environ | {"TRITON_CACHE_DIR": str(CACHE), "PYTHONUNBUFFERED": "1", "COLUMNS": "150"}
    failed = 0
    for stage in stages(rehearse, WORK):
        left = end - time.monotonic()
        if left < 5:
            lines.append(f"{stage.name}: not run, no time was left")
            continue
        code, spent, log = _stage(stage, left * stage.share, environment)
        failed += code not in (0, 3, 124)
        lines.append(f"{stage.name}: exit {code} in {spent:.0f} s\n" + _ending(log))
        _write(out, lines)
    _write(out, lines)
    print((out / "page.txt").read_text())
    return failed


def _stage(stage: Stage, seconds: float, environment: dict[str, str]) -> tuple[int, float, Path]:
    """Run it and what is beside it; 124 where its time was over."""
    log = WORK / f"{stage.name.replace(' ', '_').replace(',', '')}.txt"
    words = {"{seconds}": f"{seconds - 5:.0f}", "{minutes}": f"{(seconds - 5) / 60:.2f}"}
    start = time.monotonic()
    with log.open("w") as file, log.with_suffix(".beside.txt").open("w") as other:

        def begin(command: Sequence[str], to: Any) -> subprocess.Popen[bytes]:
            found = [words.get(word, word) for word in command]
            return subprocess.Popen(found, stdout=to, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)

        main, beside = begin(stage.command, file), begin(stage.beside, other) if stage.beside else None
        try:
            code = main.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = 124
        for process in (main, beside):
            if process is not None and process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=3)
                except subprocess.TimeoutExpired:
                    process.kill()
    if not stage.beside:
        log.with_suffix(".beside.txt").unlink()
    return code, time.monotonic() - start, log


def _ending(log: Path, count: int = 45) -> str:
    """The last lines of a stage, and of what ran beside it."""
    found = log.read_text(errors="replace").splitlines()[-count:]
    beside = log.with_suffix(".beside.txt")
    if beside.exists():
        found += ["beside:", *beside.read_text(errors="replace").splitlines()[-10:]]
    return "\n".join("  " + line[:200] for line in found)


def _write(out: Path, lines: Sequence[str]) -> None:
    """The page and the archive of everything, whole at any time."""
    (out / "page.txt").write_text("\n\n".join(lines) + "\n")
    aside = out / "results.tmp"
    with tarfile.open(aside, "w:gz") as archive:
        for path in sorted(WORK.rglob("*")):
            if path.is_file():
                archive.add(path, path.relative_to(WORK))
        for path in sorted((ROOT / "inherit_kernels" / "configs").rglob("nvidia-*.json")):
            archive.add(path, f"configs/{path.relative_to(ROOT / 'inherit_kernels' / 'configs')}")
    os.replace(aside, out / "results.tar.gz")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.lease", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prepare", "run"))
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=int, help="prepare: no more than so many jobs")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "build" / "lease" / "out")))
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.what == "prepare":
        prepare(arguments.seconds, arguments.processes, arguments.limit)
    else:
        raise SystemExit(min(run(arguments.seconds, arguments.rehearse, arguments.out), 1))


if __name__ == "__main__":
    main()
