"""Writing files so that a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from fastflow.errors import UserError

__all__ = ["atomic_write"]

# EDQUOT (quota) does not exist on Windows.
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """Yields a path in the same folder to write to, which becomes `path` if the block succeeds.

    On success the data are flushed to the disk (`sync`) and renamed over `path` in one step. On any failure, Ctrl-C
    included, the temporary file is removed and `path` is what it was before.

    Args:
        path: the file to write. Its folder must exist. A symbolic link is followed. The temporary name keeps the
            suffix, because some writers choose their format by it.
        sync: False leaves flushing to the operating system, for many small files that can be made again: after a power
            cut such a file may be truncated, though never after a crash of the program alone.

    Raises:
        UserError: the disk is full (or a quota or size limit reached), or `path` may not be written. Other exceptions
            of the block pass through.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.tmp{target.suffix}")
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        # Some writers (safetensors) make files that only their owner may read, whatever the umask allows.
        temporary.chmod(mode)
        if sync:
            _sync(temporary)
        os.replace(temporary, target)
        if sync:
            _sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        state = "the old file is intact" if target.exists() else "nothing was written"
        code = _errno_of(error)
        if code in _FULL:
            raise UserError(f"{path}: cannot write, the disk is full ({os.strerror(code)}); {state}") from error
        if isinstance(error, OSError) and error.errno in _DENIED and _concerns(error, temporary):
            raise UserError(f"{path}: cannot write ({os.strerror(error.errno)}); {state}") from error
        raise


def _errno_of(error: BaseException | None) -> int:
    """The first "disk full" code among an exception and what led to it, or 0.

    A writer that fails while closing hides the first failure as its context, and Rust libraries (safetensors) put the
    code into the text of their own exception.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None and error.errno in _FULL:
            return error.errno
        found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
        if found and int(found[1]) in _FULL:
            return int(found[1])
        error = error.__cause__ or error.__context__
    return 0


def _concerns(error: OSError, temporary: Path) -> bool:
    return error.filename is not None and os.path.basename(os.fsdecode(error.filename)) == temporary.name


def _sync(path: Path) -> None:
    # Windows flushes only through a descriptor opened for writing.
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    # The rename itself lives in the folder; Windows cannot open one, and some network file systems refuse.
    if os.name == "posix":
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
