"""Outputs appear whole or not at all: written under a temporary name beside the final one, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from halo.errors import OutputError

_PREFIX = ".halo-"
_UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG,
    errno.EFBIG, errno.EIO,
)  # fmt: skip


def refuse_unusable(path: Path, force: bool) -> None:
    """OutputError when ``path`` exists (without ``force``) or lies below something that is no folder. Staging asks it;
    ask before long work too."""
    if path.exists() and not force:
        raise OutputError(f"{path}: exists already; give another -o, or --force to replace it")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise OutputError(f"{path}: cannot be written: {above} is no folder; give another -o")


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{path.parent}: no space left on the device; free some or give another -o") from None
        if error.errno in _UNWRITABLE:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
        raise


def sweep(parent: Path) -> None:
    """Remove what killed runs left in ``parent`` (temporary names carry the process number of their writer)."""
    for left in parent.glob(f"{_PREFIX}*-*"):
        pid = left.name[len(_PREFIX) :].split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged_file(path: Path, force: bool = False) -> Iterator[BinaryIO]:
    """A file to write, renamed to ``path`` when the block ends well and removed when it does not.

    Raises:
        OutputError: ``path`` exists (without ``force``), cannot be written, or the disk is full.
    """
    refuse_unusable(path, force)
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        handle, name = tempfile.mkstemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """As ``staged_file``, for a folder. With ``force`` an existing folder is replaced only after all went well."""
    refuse_unusable(path, force)
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            for file in temporary.iterdir():
                _sync(file)
            _swap(temporary, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    old = temporary.with_name(temporary.name + "-old")
    path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old) if old.is_dir() else old.unlink()
