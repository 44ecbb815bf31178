"""The audit log: hash-chained JSON lines, one segment file after another per process.

Layout: `<directory>/<UTC date>/<host>-<pid>-<uuid7>-<number>.jsonl`, mode 0600, with its signed digests beside it
(`safegen.audit.digest`). The first record is `segment.open`, the last of a closed segment `segment.close`. What the
chain and the digests show, and what they cannot show, stands in `safegen.audit.verify`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from safegen.audit.events import (
    ErrorRecord,
    EventFields,
    EventKind,
    HitRecord,
    ModelRecord,
    PromptRecord,
    Record,
    RuntimeVersions,
    SegmentRecord,
)
from safegen.audit.keys import HmacKey
from safegen.audit.options import AuditOptions
from safegen.audit.privacy import TextKeeper, TextPolicy
from safegen.audit.writer import Writer
from safegen.errors import AuditWriteError, UsageError

logger = logging.getLogger("safegen")


class AuditLog:
    """A log that is open for writing; safe to share between threads, and across `fork`.

    A context manager: leaving it closes the log. Build prompts, hits and failures with `prompt`, `hit` and `failure`:
    they keep or drop the text as the log's text policy says, and `write` refuses text that got around them.
    """

    def __init__(
        self,
        directory: Path,
        keeper: TextKeeper,
        durable: bool,
        versions: RuntimeVersions,
        options: AuditOptions,
    ) -> None:
        """Starts the first segment; use `AuditLog.open`."""
        self._directory = directory
        self._keeper = keeper
        self._durable = durable
        self._versions = versions
        self._options = options
        self._lock = threading.RLock()
        self._closed = False
        self._writer = self._begin()
        _OPEN_LOGS.add(self)

    def _begin(self) -> Writer:
        promise = SegmentRecord(text=self._keeper.policy, durable=self._durable, key_id=self._keeper.key_id)
        return Writer(self._directory, promise, self._versions, self._options, self._keeper.check, self._lock)

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        key: HmacKey,
        text: TextPolicy = "none",
        durable: bool = True,
        runtime: RuntimeVersions | None = None,
        options: AuditOptions | None = None,
    ) -> Self:
        """Opens a log and writes `segment.open`.

        Args:
            directory: Root of the log; created where it is missing (mode 0700).
            key: Key of the prompt HMACs, from `load_key`.
            text: `none` keeps no prompt text, no matched text and no exception message; `redacted` keeps what
                `options.redact` leaves of a prompt; `full` keeps all three.
            durable: Whether each record is synced to disk before `write` returns, so that it survives a power cut.
                False leaves that to the system: a record still survives the death of the process. Meant for `observe`.
            runtime: Versions of torch and diffusers, to stand in each record.
            options: Signing, anchor, redactor, sinks, rotation; by default nothing is signed.

        Raises:
            AuditWriteError: The directory or the segment cannot be created or written; nothing is left open.
            UsageError: A key file lies inside `directory`, `text` is none of the three, `redacted` lacks a redactor,
                or an anchor a signer.
        """
        directory = Path(directory).expanduser().absolute()
        options = options or AuditOptions()
        if options.anchor is not None and options.signer is None:
            raise UsageError("audit log: an anchor gets signed digests, so it needs a signer; give load_signer()")
        keeper = TextKeeper(key, text, options.redact)
        for secret in (key, options.signer):
            if secret is not None and secret.path is not None:
                _refuse_inside(secret.path, directory)
        return cls(directory, keeper, durable, runtime or RuntimeVersions(), options)

    @property
    def path(self) -> Path:
        """The segment file; in a child after `fork`, the parent's until the child has written."""
        return self._writer.segment.path

    @property
    def records_written(self) -> int:
        """Records in that segment, `segment.open` and a footer included."""
        return self._writer.segment.count

    def prompt(self, text: str, *, decoded: bool = False) -> PromptRecord:
        """Returns a prompt (or negative prompt) as this log keeps it: its HMAC, and of its text what the policy allows.

        Args:
            text: The prompt.
            decoded: Whether `text` was decoded from token ids because the caller's own text was not seen.
        """
        return self._keeper.prompt(text, decoded=decoded)

    def hit(self, rule: str, concept: str, matched: str) -> HitRecord:
        """Returns a lexical hit as this log keeps it: `matched`, the words of the prompt, only in `full`."""
        return self._keeper.hit(rule, concept, matched)

    def failure(self, code: str, error: BaseException) -> ErrorRecord:
        """Returns a failure as this log keeps it: the message of `error`, which may quote a prompt, only in `full`."""
        return self._keeper.failure(code, error)

    def write(self, kind: EventKind, *, model: ModelRecord | None = None, **fields: Unpack[EventFields]) -> Record:
        """Appends one record; on return it is in the file, and on disk where the log is durable.

        Args:
            kind: What happened; `safegen.audit.events.REQUIRED` lists the fields it needs.
            model: The base model, to stand in `runtime`.
            **fields: The finished values.

        Returns:
            The record as written.

        Raises:
            AuditWriteError: The log is closed, a field is missing, text would break the text policy, the anchor does
                not take the digests, or the system refuses the write. After the last, the log refuses all further
                writes: open a new one, or `resume`.
        """
        with self._lock:
            if self._closed:
                raise AuditWriteError(f"{self.path}: the log is closed; open a new one")
            if self._writer.pid != os.getpid():  # a child after fork: the parent goes on writing its own segment
                self._writer.segment.release()
                self._writer = self._begin()
            record = self._writer.append(kind, model, fields)
            segment, count = self._writer.segment, self._writer.segment.count
            if not self._durable:
                segment.settle()
            self._writer.beat_if_due()
        if self._durable:
            segment.commit(count)  # without the lock: threads that wait for the disk wait together
        self._copy(record)
        return record

    def _copy(self, record: Record) -> None:
        for sink in self._options.sinks:
            try:
                sink(record)
            except Exception as error:  # its message may quote the record, and the record a prompt
                logger.error("audit: a sink raised %s; the record stands in the log", type(error).__name__)

    def resume(self) -> None:
        """Goes on in a new segment after a write has failed; does nothing where none has.

        Raises:
            AuditWriteError: The system still refuses.
        """
        with self._lock:
            if self._writer.segment.failed and not self._closed and self._writer.pid == os.getpid():
                self._writer.resume()

    def close(self) -> None:
        """Writes the footer, signs the segment and closes the file; does nothing the second time.

        A log whose write has failed, and a child of `fork` that wrote nothing, are closed without a footer.

        Raises:
            AuditWriteError: The footer cannot be written, or the anchor does not take the digests; the file is closed
                nevertheless.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                if self._writer.pid == os.getpid() and not self._writer.segment.failed:
                    self._writer.finish()
            finally:
                self._writer.segment.release()

    def __enter__(self) -> Self:
        """Returns the log."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the log."""
        self.close()


def _refuse_inside(key: Path, directory: Path) -> None:
    if key.resolve().is_relative_to(directory.resolve()):
        raise UsageError(
            f"{key}: the audit key lies inside the log {directory}, so that whoever gets the log can test guesses of "
            "its prompts, or sign in its name; move the key elsewhere"
        )


_OPEN_LOGS: weakref.WeakSet[AuditLog] = weakref.WeakSet()


def _renew_locks() -> None:
    # Another thread of the parent may hold the lock at the moment of the fork; in the child it would never be released.
    for log in list(_OPEN_LOGS):
        log._lock = threading.RLock()


with contextlib.suppress(AttributeError):  # no fork on Windows
    os.register_at_fork(after_in_child=_renew_locks)
