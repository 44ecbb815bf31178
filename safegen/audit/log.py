"""The audit log: hash-chained JSON lines, one segment file per process.

Layout: `<directory>/<UTC date>/<host>-<pid>-<uuid7>.jsonl`, mode 0600. The first record is `segment.open`, the last of
a closed segment `segment.close`. What the chain shows, and what it cannot show, stands in `safegen.audit.verify`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, Unpack

from safegen._version import __version__
from safegen.audit.chain import SCHEMA_VERSION, canonical, record_hash, utc_now, uuid7
from safegen.audit.events import (
    ErrorRecord,
    EventFields,
    EventKind,
    FooterRecord,
    HitRecord,
    ModelRecord,
    PromptRecord,
    Record,
    RuntimeRecord,
    RuntimeVersions,
    SegmentRecord,
    missing_fields,
    parse_record,
)
from safegen.audit.keys import ALGORITHM, HmacKey
from safegen.audit.plain import as_dict
from safegen.audit.segment import Segment
from safegen.errors import AuditWriteError, UsageError

TextPolicy = Literal["none", "full"]


class AuditLog:
    """A log that is open for writing; safe to share between threads, and across `fork`.

    A context manager: leaving it closes the log. Build prompts, hits and failures with `prompt`, `hit` and `failure`:
    they keep or drop the text as the log's text policy says, and `write` refuses text that got around them.
    """

    def __init__(self, directory: Path, key: HmacKey, segment: SegmentRecord, versions: RuntimeVersions) -> None:
        """Starts the first segment; use `AuditLog.open`."""
        self._directory = directory
        self._key = key
        self._promise = segment
        self._versions = versions
        self._lock = threading.Lock()
        self._closed = False
        self._segment = self._start()
        _OPEN_LOGS.add(self)

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        key: HmacKey,
        text: TextPolicy = "none",
        durable: bool = True,
        runtime: RuntimeVersions | None = None,
    ) -> Self:
        """Opens a log and writes `segment.open`.

        Args:
            directory: Root of the log; created where it is missing (mode 0700).
            key: Key of the prompt HMACs, from `load_key`.
            text: `none` keeps no prompt text, no matched text and no exception message; `full` keeps all three.
            durable: Whether each record is synced to disk before `write` returns, so that it survives a power cut.
                False leaves that to the system: a record still survives the death of the process. Meant for `observe`.
            runtime: Versions of torch and diffusers, to stand in each record.

        Raises:
            AuditWriteError: The directory or the segment cannot be created or written; nothing is left open.
            UsageError: The key file lies inside `directory`, or `text` is neither `none` nor `full`.
        """
        directory = Path(directory).expanduser().absolute()
        if text not in ("none", "full"):
            raise UsageError(f"audit log: expected text='none' or text='full', found {text!r}")
        if key.path is not None and key.path.resolve().is_relative_to(directory.resolve()):
            raise UsageError(
                f"{key.path}: the audit key lies inside the log {directory}, so that whoever gets the log can test "
                "guesses of its prompts; move the key elsewhere"
            )
        promise = SegmentRecord(text=text, durable=durable, key_id=key.key_id)
        return cls(directory, key, promise, runtime or RuntimeVersions())

    @property
    def path(self) -> Path:
        """The segment file; in a child after `fork`, the parent's until the child has written."""
        return self._segment.path

    @property
    def records_written(self) -> int:
        """Records in that segment, `segment.open` and a footer included."""
        return self._segment.count

    def prompt(self, text: str, *, decoded: bool = False) -> PromptRecord:
        """Returns a prompt (or negative prompt) as this log keeps it: its HMAC, and its text only in `full`.

        Args:
            text: The prompt.
            decoded: Whether `text` was decoded from token ids because the caller's own text was not seen.
        """
        kept = text if self._promise.text == "full" else None
        return PromptRecord(self._key.hmac(text), self._key.key_id, ALGORITHM, len(text), kept, decoded or None)

    def hit(self, rule: str, concept: str, matched: str) -> HitRecord:
        """Returns a lexical hit as this log keeps it: `matched`, the words of the prompt, only in `full`."""
        return HitRecord(rule, concept, matched if self._promise.text == "full" else None)

    def failure(self, code: str, error: BaseException) -> ErrorRecord:
        """Returns a failure as this log keeps it: the message of `error`, which may quote a prompt, only in `full`."""
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        return ErrorRecord(code, kind, str(error) if self._promise.text == "full" else None)

    def write(self, kind: EventKind, *, model: ModelRecord | None = None, **fields: Unpack[EventFields]) -> Record:
        """Appends one record; on return it is in the file, and on disk where the log is durable.

        Args:
            kind: What happened; `safegen.audit.events.REQUIRED` lists the fields it needs.
            model: The base model, to stand in `runtime`.
            **fields: The finished values.

        Returns:
            The record as written.

        Raises:
            AuditWriteError: The log is closed, a field is missing, text would break the text policy, or the system
                refuses the write. After the last, the log refuses all further writes: open a new one.
        """
        with self._lock:
            if self._closed:
                raise AuditWriteError(f"{self._segment.path}: the log is closed; open a new one")
            if self._segment.pid != os.getpid():  # a child after fork: the parent goes on writing its own segment
                self._segment.release()
                self._segment = self._start()
            return self._append(self._segment, kind, model, fields)

    def close(self) -> None:
        """Writes the footer and closes the file; does nothing the second time.

        A log whose write has failed, and a child of `fork` that wrote nothing, are closed without a footer.

        Raises:
            AuditWriteError: The footer cannot be written; the file is closed nevertheless.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            segment = self._segment
            try:
                if segment.pid == os.getpid() and not segment.failed:
                    footer = FooterRecord(count=segment.count, head=segment.head)
                    self._append(segment, "segment.close", None, {}, footer=footer)
            finally:
                segment.release()

    def __enter__(self) -> Self:
        """Returns the log."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the log."""
        self.close()

    def _start(self) -> Segment:
        segment = Segment(self._directory)
        try:
            self._append(segment, "segment.open", None, {}, promise=self._promise)
            segment.publish()
        except BaseException:
            segment.discard()
            raise
        return segment

    def _append(
        self,
        segment: Segment,
        kind: str,
        model: ModelRecord | None,
        fields: EventFields,
        *,
        promise: SegmentRecord | None = None,
        footer: FooterRecord | None = None,
    ) -> Record:
        record = Record(
            v=SCHEMA_VERSION,
            seq=segment.count,
            prev=segment.head,
            ts=utc_now(),
            event_id=uuid7(),
            kind=kind,
            hash="",
            runtime=RuntimeRecord(__version__, segment.pid, self._versions.torch, self._versions.diffusers, model),
            segment=promise,
            footer=footer,
            **fields,
        )
        record, line = _seal(record)
        self._check(record)
        # Both ends of a segment reach the disk in any case: what lies between is then at least complete once closed.
        durable = self._promise.durable or promise is not None or footer is not None
        segment.append(line, record.hash, durable=durable)
        return record

    def _check(self, record: Record) -> None:
        missing = missing_fields(record)
        if missing:
            raise AuditWriteError(f"audit record {record.kind!r}: missing {', '.join(missing)}")
        if self._promise.text == "full":
            return
        texts = [part.text for part in (record.prompt, record.negative, *(record.hits or ())) if part]
        if any(text is not None for text in (*texts, record.error and record.error.message)):
            raise AuditWriteError(
                f"audit record {record.kind!r}: holds text of a prompt, in a log opened with text='none'; "
                "build it with prompt(), hit() and failure() of this log"
            )


def _seal(record: Record) -> tuple[Record, bytes]:
    """Returns the record with its hash, as a reader will get it, and its line."""
    line = canonical(as_dict(replace(record, hash=record_hash(as_dict(record)))))
    try:
        return parse_record(line), line + b"\n"
    except ValueError as error:
        raise AuditWriteError(f"audit record {record.kind!r}: a value of the wrong type: {error}") from error


_OPEN_LOGS: weakref.WeakSet[AuditLog] = weakref.WeakSet()


def _renew_locks() -> None:
    # Another thread of the parent may hold the lock at the moment of the fork; in the child it would never be released.
    for log in list(_OPEN_LOGS):
        log._lock = threading.Lock()


with contextlib.suppress(AttributeError):  # no fork on Windows
    os.register_at_fork(after_in_child=_renew_locks)
