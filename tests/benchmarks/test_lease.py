"""The one command for a lent GPU: stages within their time, whatever they do; what was prepared comes back as it was."""

from __future__ import annotations

import sys
import tarfile
import time

import pytest

from benchmarks.gpu import lease
from benchmarks.gpu.lease import Stage


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name, place in {"CACHE": "cache", "ARCHIVE": "lease.tar.xz", "WORK": "work"}.items():
        monkeypatch.setattr(lease, name, tmp_path / place)
    monkeypatch.setattr(lease, "ROOT", tmp_path)
    (tmp_path / "inherit_kernels" / "configs").mkdir(parents=True)
    return tmp_path


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_stages_end_in_time_and_all_is_written_after_each(folders, monkeypatch):
    stages = [
        Stage("prints its share", 0.5, (*python("import sys; print('minutes', sys.argv[1])"), "{minutes}")),
        Stage("hangs", 0.3, python("import time; print('begun', flush=True); time.sleep(60)")),
        Stage("fails", 0.5, python("raise SystemExit(7)"), beside=python("print('I was beside it')")),
        Stage("declines", 0.5, python("raise SystemExit(3)")),
    ]
    monkeypatch.setattr(lease, "stages", lambda rehearse, out: stages)
    start, out = time.monotonic(), folders / "out"
    assert lease.run(14.0, rehearse=True, out=out) == 1  # what declines, or is out of time, has not failed
    assert time.monotonic() - start < 14
    page = (out / "page.txt").read_text()
    for line in ("nothing was prepared", "prints its share: exit 0", "minutes 0.0", "hangs: exit 124", "begun",
                 "fails: exit 7", "I was beside it", "declines: exit 3"):  # fmt: skip
        assert line in page, page
    with tarfile.open(out / "results.tar.gz") as archive:
        assert {"hangs.txt", "fails.beside.txt"} <= set(archive.getnames())
    assert sorted(path.name for path in out.iterdir()) == ["page.txt", "results.tar.gz"]
    monkeypatch.setattr(lease, "stages", lambda rehearse, out: stages[:1])
    lease.run(1.0, rehearse=True, out=out)
    assert "prints its share: not run, no time was left" in (out / "page.txt").read_text()


def test_what_was_packed_comes_back(folders):
    kernel, described, other = (folders / "cache" / "HASH" / f"k.{kind}" for kind in ("cubin", "json", "ttgir"))
    kernel.parent.mkdir(parents=True)
    for path in (kernel, described, other):
        path.write_text(path.name)
    library = folders / "inherit_kernels" / "_C.abi3.so"
    library.write_text("library")
    lease.pack()
    for path in (kernel, described, library):
        path.unlink()
    other.unlink()
    assert lease.unpack(library=False).startswith("1 kernels unpacked")
    assert not library.exists()
    assert lease.unpack(library=True).startswith("1 kernels and the library unpacked")
    assert [path.read_text() for path in (kernel, described, library)] == ["k.cubin", "k.json", "library"]
    assert not other.exists()  # 29 instead of 200 MB for 2,685 kernels


def test_every_stage_names_a_module_that_is_there(folders):
    from importlib.util import find_spec

    for rehearse in (True, False):
        found = lease.stages(rehearse, folders)
        assert len({stage.name for stage in found}) == len(found)
        for stage in found:
            assert find_spec(stage.command[2]), stage
    assert [stage.name for stage in found][:2] == ["first calls, native", "first calls, blas"]


def test_jobs_begin_with_the_figures_and_reach_every_kernel_that_is_tuned():
    pytest.importorskip("triton", reason="nothing was prepared: triton is not installed")
    from benchmarks.gpu import cases

    found = list(lease.jobs())
    assert [job[1] for job in found[:3]] == [item.point.case for item in cases.core()[:3]]
    kernels = {kernel for job in found for kernel in job[5]}
    assert {"forward", "backward_dx", "weight_gradient", "backward_dt", "backward_down", "backward_up"} <= kernels
