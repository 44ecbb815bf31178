"""One segment of the log: an append-only file that one process writes, line by line.

A segment gets its name only once its first record is on disk: a crash at start leaves no empty segment behind, so an
empty one always means that somebody emptied it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from pathlib import Path

from safegen.audit.chain import GENESIS, MAX_RECORD_BYTES, utc_now, uuid7
from safegen.errors import AuditWriteError

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


class Segment:
    """The file of one process, with the state of its chain.

    Attributes:
        path: Where it is, once `publish` has named it.
        pid: The process that owns it.
        count: Records written; also the next `seq`.
        head: Hash of the last record, or the genesis constant.
        failed: Whether a write failed; no further write is accepted then.
    """

    def __init__(self, directory: Path) -> None:
        """Creates the file, not yet under its name.

        Raises:
            AuditWriteError: Where the directory or the file cannot be created.
        """
        self.pid = os.getpid()
        self.count = 0
        self.head = GENESIS
        self.failed = False
        host = re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())[:64] or "host"
        self.path = directory / utc_now()[:10] / f"{host}-{self.pid}-{uuid7()}.jsonl"
        self._draft = self.path.with_name(f".{self.path.name}.part")
        self._size = 0
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(self._draft, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise write_error(self.path, "cannot create the audit segment", error) from error

    def append(self, line: bytes, head: str, *, durable: bool) -> None:
        """Writes one line (with its newline) whose record has the hash `head`, and waits for the disk if `durable`.

        On any failure, an interrupt included, the file is cut back to its last whole record and refuses further writes:
        a record is in the log or its write raised, never a silent gap.

        Raises:
            AuditWriteError: The line is too long, the segment has failed before, or the system refuses the write.
        """
        if self.failed:
            raise AuditWriteError(f"{self.path}: an earlier write failed; open the log again before writing to it")
        if len(line) > MAX_RECORD_BYTES:
            raise AuditWriteError(
                f"{self.path}: expected a record of at most {MAX_RECORD_BYTES} bytes, found {len(line)}; "
                "shorten the prompt, or open the log with text='none'"
            )
        try:
            written = os.write(self._fd, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes were written")
            if durable:
                sync(self._fd)
            self._size, self.count, self.head = self._size + len(line), self.count + 1, head
        except BaseException as error:
            self.failed = True
            with contextlib.suppress(OSError):  # else the torn line stays, and verify reports it as a recovered tail
                os.ftruncate(self._fd, self._size)
            if isinstance(error, OSError):
                raise write_error(self.path, "cannot write the audit record", error) from error
            raise

    def publish(self) -> None:
        """Gives the file its name, once its first record is on disk.

        Raises:
            AuditWriteError: Where the system refuses.
        """
        try:
            self._draft.rename(self.path)
            for folder in (self.path.parent, self.path.parent.parent):
                fd = os.open(folder, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        except OSError as error:
            raise write_error(self.path, "cannot create the audit segment", error) from error

    def discard(self) -> None:
        """Removes a segment that could not be started."""
        self.release()
        for path in (self._draft, self.path):
            with contextlib.suppress(OSError):
                path.unlink()

    def release(self) -> None:
        """Closes the file of this process; in a child after `fork` the parent's stays open."""
        with contextlib.suppress(OSError):  # nothing is buffered here, so nothing is lost by an error of close
            os.close(self._fd)
        self._fd = -1  # the number may be another file's by now: closing twice must not reach it


# macOS has no fdatasync.
sync = getattr(os, "fdatasync", os.fsync)


def write_error(path: Path, what: str, error: OSError) -> AuditWriteError:
    """Returns the error for a refusal of the system: path, its text, and what to do."""
    advice = _ADVICE.get(error.errno or 0, "check the disk and the directory of the log")
    name = errno.errorcode.get(error.errno or 0, "unknown")
    return AuditWriteError(f"{path}: {what}: {error.strerror} ({name}); {advice}, then open the log again")
