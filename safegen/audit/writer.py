"""The segments that one process writes, one after another, with their digests."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safegen._version import __version__
from safegen.audit.chain import SCHEMA_VERSION, sealed, utc_now, uuid7
from safegen.audit.digest import Digest, DigestFile, DigestKind, latest_digests
from safegen.audit.events import (
    EventFields,
    FooterRecord,
    ModelRecord,
    Record,
    RuntimeRecord,
    RuntimeVersions,
    SegmentRecord,
)
from safegen.audit.options import AuditOptions
from safegen.audit.plain import as_dict
from safegen.audit.schema import check_values, missing_fields
from safegen.audit.segment import Segment
from safegen.errors import AuditWriteError

logger = logging.getLogger("safegen")


class Writer:
    """The end of the log that this process writes. Whoever calls it holds the log's lock.

    Attributes:
        pid: The process that it belongs to.
        segment: The segment that is written now.
    """

    def __init__(
        self,
        directory: Path,
        promise: SegmentRecord,
        versions: RuntimeVersions,
        options: AuditOptions,
        check: Callable[[Record], None],
        lock: threading.RLock,
    ) -> None:
        """Starts the first segment.

        Raises:
            AuditWriteError: The system refuses; nothing is left behind.
        """
        host = re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())[:64] or "host"
        self.pid = os.getpid()
        self._name = f"{host}-{self.pid}-{uuid7()}"
        self._directory = directory
        self._promise = promise
        self._versions = versions
        self._options = options
        self._check_text = check
        self._lock = lock
        self._undelivered: list[Digest] = []
        self._signed_at = 0.0
        self.segment = self._start(1, None)
        try:
            self._vouch(self.segment, None)
        except BaseException:
            self.segment.discard()
            raise

    def append(self, kind: str, model: ModelRecord | None, fields: EventFields) -> Record:
        """Writes one record, in a new segment where one is due.

        Raises:
            AuditWriteError: See `AuditLog.write`.
        """
        self.deliver()
        self._rotate_if_due()
        return self._append(self.segment, kind, model, fields)

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
        data = as_dict(record)
        try:
            digest, line = sealed(data)
            check_values({**data, "hash": digest})
        except ValueError as error:
            raise AuditWriteError(f"audit record {kind!r}: a value of the wrong type: {error}") from error
        if missing := missing_fields(data):
            raise AuditWriteError(f"audit record {kind!r}: missing {', '.join(missing)}")
        self._check_text(record)
        object.__setattr__(record, "hash", digest)
        segment.append(line + b"\n", digest)
        return record

    def _start(self, number: int, after: str | None) -> Segment:
        segment = Segment(self._directory, self._name, number, self._lock)
        signer = self._options.signer
        promise = replace(
            self._promise, writer=self._name, number=number, after=after, signer=signer.public_key if signer else None
        )
        try:
            self._append(segment, "segment.open", None, {}, promise=promise)
            segment.commit(1)
            segment.publish()
        except BaseException:
            segment.discard()
            raise
        return segment

    def _vouch(self, segment: Segment, before: Segment | None) -> None:
        """Signs the first digest of a segment, which names the last of the segment before it."""
        signer = self._options.signer
        if signer is None:
            return
        if before is not None and before.digests is not None:
            links = before.digests.last
        else:
            links = latest_digests(self._directory)
        segment.digests = DigestFile(self._directory, segment.path, signer, links)
        self._sign(segment, "open")

    def _sign(self, segment: Segment, kind: DigestKind) -> None:
        """Signs what the segment holds, once that is on the disk."""
        segment.commit(segment.count)
        if segment.digests is None:
            return
        digest = segment.digests.add(
            kind, count=segment.count, head=segment.head, size=segment.size, sha256=segment.sha256
        )
        self._signed_at = time.monotonic()
        if self._options.anchor is not None:
            self._undelivered.append(digest)
            try:
                self.deliver()
            except AuditWriteError as error:  # what is in the log already stands; the next record is refused
                logger.error("%s", error)

    def deliver(self) -> None:
        """Hands the anchor the digests that it has not taken yet.

        Raises:
            AuditWriteError: It raised.
        """
        while self._undelivered:
            assert self._options.anchor is not None
            try:
                self._options.anchor(self._undelivered[0])
            except Exception as error:
                raise AuditWriteError(
                    f"{self.segment.path}: the anchor did not take digest {self._undelivered[0].count} of this segment "
                    f"({type(error).__name__}: {error}); no record is written until it does"
                ) from error
            del self._undelivered[0]

    def beat_if_due(self) -> None:
        """Signs a heartbeat where one is due.

        Raises:
            AuditWriteError: The system refuses.
        """
        segment = self.segment
        if segment.digests is None:
            return
        late = time.monotonic() - self._signed_at >= self._options.heartbeat_seconds
        if late or segment.count - segment.digests.covered >= self._options.heartbeat_records:
            self._sign(segment, "heartbeat")

    def _rotate_if_due(self) -> None:
        segment, options = self.segment, self._options
        if segment.failed or segment.count < 2:  # an empty one is not worth another
            return
        if segment.size < options.max_bytes and time.monotonic() - segment.started < options.max_age:
            return
        following = self._start(segment.number + 1, segment.head)  # first, so that the footer names what exists
        before = segment.count
        try:
            self._finish(segment, following)
            self._vouch(following, segment)
        except BaseException:
            if segment.count == before:  # no footer names it
                segment.failed = True
                following.discard()
                raise
            following.failed = True
            self._go_on_with(following)
            raise
        self._go_on_with(following)

    def _go_on_with(self, following: Segment) -> None:
        self.segment.release()
        self.segment = following

    def resume(self) -> None:
        """Goes on in a new segment after a failed write.

        Raises:
            AuditWriteError: The system still refuses.
        """
        failed = self.segment
        following = self._start(failed.number + 1, failed.head)
        try:
            self._vouch(following, failed)
        except BaseException:
            following.discard()
            raise
        self._go_on_with(following)

    def _finish(self, segment: Segment, following: Segment | None) -> None:
        if segment.digests is not None and segment.digests.covered < segment.count:
            self._sign(segment, "heartbeat")  # were it killed before the last digest, only the footer would lack one
        name = following.path.relative_to(self._directory).as_posix() if following else None
        footer = FooterRecord(count=segment.count, head=segment.head, next=name)
        self._append(segment, "segment.close", None, {}, footer=footer)
        self._sign(segment, "close")

    def finish(self) -> None:
        """Writes the footer, signs it, and hands the anchor what it lacks.

        Raises:
            AuditWriteError: The system or the anchor refuses.
        """
        self._finish(self.segment, None)
        self.deliver()
