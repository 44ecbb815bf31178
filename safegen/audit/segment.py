"""One segment of the log: an append-only file that one process writes, line by line.

A segment gets its name only once its first record is on disk: a crash at start leaves no empty segment behind, so an
empty one always means that somebody emptied it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from safegen.audit.chain import GENESIS, MAX_RECORD_BYTES, utc_now
from safegen.audit.digest import DigestFile
from safegen.audit.linefile import LineFile, write_error
from safegen.errors import AuditWriteError
from safegen.files import make_durable


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a segment goes: its bytes, its records, the hash of the last one."""

    size: int
    count: int
    head: str


class Segment:
    """The file of one process, with the state of its chain.

    Whoever calls `append`, `settle` and `publish` holds the log's lock; `commit` needs no lock, so that one thread can
    wait for the disk while others write.

    Attributes:
        path: Where it is, once `publish` has named it.
        pid: The process that owns it.
        number: Its number among the segments of its writer, from 1.
        started: `time.monotonic` of its creation.
        failed: Whether a write failed; no further write is accepted then.
        digests: Its signed digests, in a log that is signed.
    """

    def __init__(self, directory: Path, writer: str, number: int, lock: threading.RLock) -> None:
        """Creates the file, not yet under its name.

        Raises:
            AuditWriteError: Where the directory or the file cannot be created.
        """
        self.pid = os.getpid()
        self.number = number
        self.started = time.monotonic()
        self.failed = False
        self.path = directory / utc_now()[:10] / f"{writer}-{number:04}.jsonl"
        self.digests: DigestFile | None = None
        self._lock = lock
        self._turn = threading.Lock()
        self._end = self._safe = Mark(0, 0, GENESIS)
        self._sha256 = hashlib.sha256()
        self._draft = self.path.with_name(f".{self.path.name}.part")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = LineFile(self._draft)
        except OSError as error:
            raise write_error(self.path, "cannot create the audit segment", error) from error

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._end.size

    @property
    def count(self) -> int:
        """Records written; also the next `seq`."""
        return self._end.count

    @property
    def head(self) -> str:
        """Hash of the last record, or the genesis constant."""
        return self._end.head

    @property
    def sha256(self) -> str:
        """The sha256 of all bytes written."""
        return self._sha256.hexdigest()

    def append(self, line: bytes, head: str) -> int:
        """Writes one line (with its newline) whose record has the hash `head`.

        On any failure, an interrupt included, the file is cut back to what is known to be kept, and refuses further
        writes: a record is in the log or its write raised, never a silent gap.

        Returns:
            What `commit` needs to know, to make this record durable.

        Raises:
            AuditWriteError: The line is too long, the segment has failed before, or the system refuses the write.
        """
        self._refuse_failed()
        if len(line) > MAX_RECORD_BYTES:
            raise AuditWriteError(
                f"{self.path}: expected a record of at most {MAX_RECORD_BYTES} bytes, found {len(line)}; "
                "shorten the prompt, or open the log with text='none'"
            )
        try:
            self._file.append(line)
        except BaseException as error:
            self._fail()
            if isinstance(error, OSError):
                raise write_error(self.path, "cannot write the audit record", error) from error
            raise
        self._sha256.update(line)
        self._end = Mark(self._file.size, self.count + 1, head)
        return self.count

    def settle(self) -> None:
        """Takes what was written as kept, without waiting for the disk."""
        self._safe = self._end

    def commit(self, count: int) -> None:
        """Waits until the first `count` records are on the disk.

        One thread waits for the disk, for all that was written until then; threads that come meanwhile wait for it, and
        mostly find their records on the disk already.

        Raises:
            AuditWriteError: They are not, and the file was cut back.
        """
        with self._turn:
            if count <= self._safe.count:
                return
            self._refuse_failed()
            end = self._end
            try:
                self._file.sync()
                self._safe = end
                return
            except BaseException as error:
                self.failed = True
                cause = error
        self._fail()  # only now: it waits for the log's lock, whose holder may be waiting for this turn
        if isinstance(cause, OSError):
            raise write_error(self.path, "cannot write the audit record", cause) from cause
        raise cause

    def _refuse_failed(self) -> None:
        if self.failed:
            raise AuditWriteError(f"{self.path}: an earlier write failed; open the log again before writing to it")

    def _fail(self) -> None:
        with self._lock:
            self.failed = True
            self._end = self._safe
            self._file.cut(self._safe.size)

    def publish(self) -> None:
        """Gives the file its name, once its first record is on disk.

        Raises:
            AuditWriteError: Where the system refuses.
        """
        try:
            self._draft.rename(self.path)
            for folder in (self.path.parent, self.path.parent.parent):
                make_durable(folder)
        except OSError as error:
            raise write_error(self.path, "cannot create the audit segment", error) from error

    def discard(self) -> None:
        """Removes a segment that could not be started."""
        self.release()
        for path in (self._draft, self.path):
            with contextlib.suppress(OSError):
                path.unlink()
        if self.digests is not None:
            with contextlib.suppress(OSError):
                self.digests.path.unlink()

    def release(self) -> None:
        """Closes the files of this process; in a child after `fork` the parent's stay open."""
        self._file.release()
        if self.digests is not None:
            self.digests.release()
