"""Follows the chain through one segment, and holds it against what its digests vouch for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

from safegen.audit.chain import GENESIS, SCHEMA_VERSION, line_hash, parse_line, parse_ts
from safegen.audit.digest import Digest
from safegen.audit.fault import Fault
from safegen.audit.files import lines_of
from safegen.audit.schema import check_line, missing_fields

CLOCK_SLACK = timedelta(seconds=1)


class SegmentCheck:
    """One segment; holds one line at a time.

    Attributes:
        file: Its path.
        records: Whole lines.
        valid: Of these, without a fault.
        torn: Whether the last line is torn: its process died while writing it.
        closed: Whether there is a footer.
        covered: How many records digests vouch for.
        ends: Hashes that a following segment may name as the end of this one.
        opened: `segment` of the first record.
        following: Path of the next segment of the writer, as the footer names it.
        first: Time of the first record.
        last: Time of the last one.
    """

    def __init__(self, file: Path, digests: Sequence[Digest] = ()) -> None:
        """Starts at the genesis, with the trusted digests of the segment in order."""
        self.file = file
        self.records = 0
        self.valid = 0
        self.torn = False
        self.closed = False
        self.covered = 0
        self.ends: tuple[str, ...] = ()
        self.opened: dict[str, Any] = {}
        self.following: str | None = None
        self.first: datetime | None = None
        self.last: datetime | None = None
        self._seq = 0
        self._prev: str | None = GENESIS  # None after a line whose hash is not known: the next link cannot be judged
        self._digests = list(digests)
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._sound = True  # no fault since the last digest that fits

    @property
    def sha256(self) -> str:
        """The sha256 of the whole lines."""
        return self._sha256.hexdigest()

    def run(self) -> Iterator[Fault]:
        """Yields at most one fault for each line, one for each digest that does not fit, and one for the file."""
        try:
            for number, line, whole in lines_of(self.file):
                if not whole and not self.closed:
                    self.torn = self.records > 0
                    break
                self.records += 1
                seq, problems = self._check(line)
                self.valid += not problems
                if problems:
                    self._sound = False
                    yield Fault(str(self.file), seq, number, "; ".join(problems))
                self._sha256.update(line + b"\n")
                self._size += len(line) + 1
                yield from self._hold_against_digests(number)
        except OSError as error:
            yield Fault(str(self.file), None, 0, f"cannot be read: {error.strerror}")
            return
        # A segment gets its name after its first record is on disk, so a crash cannot leave less than one.
        if not self.records:
            yield Fault(str(self.file), 0, 0, "expected a whole segment.open, found none: the file was cut")
        elif self._digests:
            digest = self._digests[-1]
            found = f"expected {digest.count} records or more (signed {digest.ts}), found {self.records}"
            yield Fault(str(self.file), self.records, 0, f"{found}: the end was cut off")

    def _hold_against_digests(self, number: int) -> Iterator[Fault]:
        while self._digests and self._digests[0].count <= self.records:
            digest = self._digests.pop(0)
            if (digest.size, digest.sha256, digest.head) == (self._size, self.sha256, self._prev):
                self.covered, self._sound = digest.count, True
            elif self._sound:
                text = f"records {self.covered} to {digest.count - 1} are not those that were signed {digest.ts}"
                yield Fault(str(self.file), self.covered, number, text)

    def _check(self, line: bytes) -> tuple[int, list[str]]:
        """Returns the number of the first record in question and what is wrong with this line."""
        expected = self._seq
        problems = ["data after the footer"] if self.closed else []
        try:
            data = parse_line(line)
        except ValueError as error:
            self._seq, self._prev = expected + 1, None
            return expected, [*problems, f"not a record: {error}"]
        problems += self._check_chain(line, data)
        if data.get("v") != SCHEMA_VERSION:
            problems.append(f"expected schema version {SCHEMA_VERSION}, found {data.get('v')!r}; update safegen")
            return expected, problems
        try:
            check_line(line)
            return expected, [*problems, *self._check_content(data)]
        except ValueError as error:
            return expected, [*problems, f"not of schema safegen.audit/1: {error}"]

    def _check_chain(self, line: bytes, data: dict[str, object]) -> Iterator[str]:
        seq, digest = data.get("seq"), data.get("hash")
        if seq != self._seq or isinstance(seq, bool):
            yield f"expected seq {self._seq}, found {seq!r}: records are missing, doubled or out of order"
        if self._prev is not None and data.get("prev") != self._prev:
            yield "prev is not the hash of the record before"
        if not isinstance(digest, str) or digest != line_hash(line, digest):
            yield "hash does not match the record: it was changed"
        self._seq = (seq if isinstance(seq, int) else self._seq) + 1
        self._prev = digest if isinstance(digest, str) else None

    def _check_content(self, data: dict[str, Any]) -> Iterator[str]:
        """Checks a record of the right types; raises ValueError for a time stamp of another form."""
        if missing := missing_fields(data):
            yield f"{data['kind']} lacks {', '.join(missing)}"
        if (data["kind"] == "segment.open") != (data["seq"] == 0):
            yield f"expected segment.open as seq 0 and only there, found {data['kind']}"
        when = parse_ts(data["ts"])
        if self.last is not None and when < self.last - CLOCK_SLACK:
            yield f"time goes back by {(self.last - when).total_seconds():.3f} s"
        self.first, self.last = self.first or when, when
        self.ends = (data["hash"],)
        if data["seq"] == 0 and data.get("segment"):
            self.opened = data["segment"]
        footer = cast("dict[str, Any] | None", data.get("footer"))
        if footer is not None:
            self.closed = True
            self.following = footer.get("next")
            self.ends = (data["hash"], data["prev"])
            if footer["count"] != data["seq"] or footer["head"] != data["prev"]:
                found = f"count {footer['count']} and head {footer['head']}"
                yield f"footer: expected count {data['seq']} and head {data['prev']}, found {found}"
