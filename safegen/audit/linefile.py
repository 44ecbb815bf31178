"""Append-only files of whole lines, and what to say where the system refuses to write them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Generator
from pathlib import Path

from safegen.errors import AuditWriteError, UsageError

_ADVICE = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "raise the quota or free space",
    errno.EFBIG: "raise the file size limit of the process (ulimit -f)",
    errno.EACCES: "give this user write access",
    errno.EPERM: "give this user write access",
    errno.EROFS: "choose a directory on a writable file system",
    errno.ENOTDIR: "choose a directory whose parents are directories",
    errno.EEXIST: "choose a directory, not a file",
}

# macOS has no fdatasync.
_sync = getattr(os, "fdatasync", os.fsync)


class LineFile:
    """A new file, mode 0600, that this process alone appends to.

    Attributes:
        size: Bytes of the whole lines in it.
    """

    def __init__(self, path: Path) -> None:
        """Creates the file.

        Raises:
            OSError: It exists already, or cannot be created.
        """
        self.size = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        _hold(self._fd)

    def append(self, line: bytes) -> None:
        """Writes one line, its newline included.

        Raises:
            OSError: The system refuses; part of the line may stand in the file then, until `cut`.
        """
        written = os.write(self._fd, line)
        if written != len(line):
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes were written")
        self.size += len(line)

    def sync(self) -> None:
        """Waits until all that was written is on the disk."""
        _sync(self._fd)

    def cut(self, size: int) -> None:
        """Shortens the file to whole lines; where that fails, verify reports a recovered tail."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, size)
        self.size = size

    def release(self) -> None:
        """Closes the file of this process; in a child after `fork` the parent's stays open."""
        with contextlib.suppress(OSError):  # nothing is buffered here, so nothing is lost by an error of close
            os.close(self._fd)
        self._fd = -1  # the number may be another file's by now: closing twice must not reach it


def _hold(fd: int) -> None:
    """Marks a file as being written; the mark goes with its process, however that ends."""
    with contextlib.suppress(ImportError, OSError):  # no such locks on Windows, nor on some network file systems
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_SH)


def being_written(path: Path) -> bool:
    """Tells whether a process has this file open for writing; False where the system cannot tell."""
    try:
        import fcntl

        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


@contextlib.contextmanager
def alone_in(folder: Path) -> Generator[None]:
    """Keeps other processes that ask for the same out of a folder.

    Raises:
        UsageError: One is in it already.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{folder}: another process prunes this log already; wait for it") from error
        except (ImportError, OSError):  # no such locks here
            pass
        yield
    finally:
        os.close(fd)


def write_error(path: Path, what: str, error: OSError) -> AuditWriteError:
    """Returns the error for a refusal of the system: path, its text, and what to do."""
    advice = _ADVICE.get(error.errno or 0, "check the disk and the directory of the log")
    name = errno.errorcode.get(error.errno or 0, "unknown")
    return AuditWriteError(f"{path}: {what}: {error.strerror} ({name}); {advice}, then open the log again")
