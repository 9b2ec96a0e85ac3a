"""Replace a directory as a whole: after a crash at any moment either the old or the new one is there, complete."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a sibling of `target`, flush it to disk, then swap it in.

    Writers into one parent directory are serialised by a lock that dies with its process, so what a killed writer
    left behind is recognised and removed.

    Args:
        target: the directory to create or replace, resolved; its parent must exist.
        write: called with an empty directory; whatever it raises leaves `target` as it was.

    Raises:
        FileNotFoundError: the parent does not exist.
    """
    with _locked(target.parent) as alone:
        if alone:
            _clean(target)
        fresh = target.parent / f"{_prefix(target)}{uuid.uuid4().hex[:12]}"
        fresh.mkdir()
        try:
            write(fresh)
            for path in (*fresh.iterdir(), fresh):
                _flush(path)
            _swap(fresh, target)
            _flush(target.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # the previous version, or what a failed write left


@contextmanager
def file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write to that becomes `path`, whose folder is made, when all went well, and is gone otherwise."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield aside
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def readable(target: Path) -> Path:
    """Where the current version is: `target`, or the previous one if a crash fell between two renames."""
    previous = _previous(target)
    return previous if previous.is_dir() and not target.exists() else target


def _clean(target: Path) -> None:
    """Finish or undo what a killed writer left; called under the lock."""
    previous = _previous(target)
    if previous.is_dir() and not target.exists():
        os.rename(previous, target)
    for path in target.parent.iterdir():
        if path == previous or path.name.startswith(_prefix(target)):
            shutil.rmtree(path, ignore_errors=True)


def _swap(fresh: Path, target: Path) -> None:
    if not target.exists():
        os.rename(fresh, target)
    elif not _exchange(fresh, target):
        previous = _previous(target)
        os.rename(target, previous)
        try:
            os.rename(fresh, target)
        except OSError:
            os.rename(previous, target)
            raise
        shutil.rmtree(previous, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two paths in one step; False where the C library or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _prefix(target: Path) -> str:
    return f".{target.name}.saving-"


def _previous(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Hold the directory's lock; yields False where the file system has none (network mounts)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)
