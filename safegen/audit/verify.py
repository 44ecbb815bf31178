"""Checks a log after the fact, and reads it.

What is promised: any byte flipped, any line deleted, duplicated or moved, and any cut inside a segment are found and
named by `seq`, with two exceptions that follow from the format.

* A cut inside the *last* line of a segment looks like a process that died while writing: it is listed in
  `recovered_tail`, not as a fault. (The newline of that line belongs to it.)
* A segment cut exactly between two lines, so that its footer is gone, looks like a process that died between two
  records: it cannot be found, by design, and is listed in `unclosed`. The same holds for a whole segment that was
  removed, and for an attacker who recomputes every hash: only an anchor outside the log shows those.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from safegen.audit.chain import GENESIS, MAX_RECORD_BYTES, SCHEMA_VERSION, parse_line, parse_ts, record_hash
from safegen.audit.events import Record, missing_fields, parse_record
from safegen.errors import AuditChainError, UsageError

MAX_FAULTS = 1000  # listed in one report; the rest is counted
CLOCK_SLACK = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Fault:
    """One line, or one file, that is not as it was written.

    Attributes:
        file: Path of the segment.
        seq: Number of the first record in question: the one that is missing, or the one that was changed. None where
            no record is in question (an unreadable file, a folder without segments).
        line: Line in the file, from 1; 0 for the file as a whole.
        message: What was expected and what was found.
    """

    file: str
    seq: int | None
    line: int
    message: str

    def __str__(self) -> str:
        """`file:line: seq N: message`."""
        return f"{self.file}:{self.line}: seq {'?' if self.seq is None else self.seq}: {self.message}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        segments: Segment files found.
        segments_valid: Of these, without a fault.
        records: Whole lines found.
        records_valid: Of these, without a fault.
        faults: The first 1000 faults, by file and line.
        fault_count: All faults.
        recovered_tail: Segments whose last line is torn: their process died while writing it. Not a fault.
        unclosed: Segments without a footer: still being written, or their process died. Not a fault; what is missing
            at their end, if anything, cannot be known.
    """

    segments: int
    segments_valid: int
    records: int
    records_valid: int
    faults: tuple[Fault, ...]
    fault_count: int
    recovered_tail: tuple[str, ...]
    unclosed: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return self.fault_count == 0

    def __str__(self) -> str:
        """The report as text: the counts, then one line for each fault and each incomplete segment."""
        lines = [
            f"{self.segments_valid}/{self.segments} segments valid, {self.records_valid}/{self.records} records valid"
        ]
        lines += [f"fault: {fault}" for fault in self.faults]
        if self.fault_count > len(self.faults):
            lines.append(f"… and {self.fault_count - len(self.faults)} more faults")
        lines += [
            f"recovered tail: {file}: the last line is torn; its process died while writing"
            for file in self.recovered_tail
        ]
        lines += [f"no footer: {file}: still being written, or its process died" for file in self.unclosed]
        return "\n".join(lines)


def verify(path: str | Path) -> VerifyReport:
    """Checks one segment file, or every `*.jsonl` file below a folder, in constant memory.

    Args:
        path: A segment or the root of a log.

    Raises:
        UsageError: Nothing exists at `path`, or a folder below it cannot be read.
    """
    path = Path(path)
    files = _segments(path)
    faults: list[Fault] = [] if files else [Fault(str(path), None, 0, "expected *.jsonl segments, found none")]
    checks: list[SegmentCheck] = []
    for file in files:
        check = SegmentCheck(str(file))
        for fault in check.run():
            check.fault_count += 1
            if len(faults) < MAX_FAULTS:
                faults.append(fault)
        checks.append(check)
    return VerifyReport(
        segments=len(checks),
        segments_valid=sum(check.fault_count == 0 for check in checks),
        records=sum(check.records for check in checks),
        records_valid=sum(check.valid for check in checks),
        faults=tuple(faults),
        fault_count=sum(check.fault_count for check in checks) + (not files),
        recovered_tail=tuple(check.file for check in checks if check.torn),
        unclosed=tuple(check.file for check in checks if check.records and not check.closed),
    )


def raise_for_faults(report: VerifyReport) -> None:
    """Raises for a report that is not ok.

    Raises:
        AuditChainError: The text of the report; `seq` is that of the first fault.
    """
    if report.faults:
        raise AuditChainError(str(report), report.faults[0].seq)


def read_records(path: str | Path) -> Iterator[Record]:
    """Yields the records of a segment, or of every segment below a folder (by path), without checking the chain.

    A torn last line is left out; fields that this version does not know are left out of a record.

    Raises:
        UsageError: Nothing exists at `path`.
        AuditChainError: A line is not a record, or a file cannot be read.
    """
    for file in _segments(Path(path)):
        try:
            for number, line, whole in _lines(file):
                if whole:
                    yield _read_record(file, number, line)
        except OSError as error:
            raise AuditChainError(f"{file}: cannot be read: {error.strerror}") from error


def _read_record(file: Path, number: int, line: bytes) -> Record:
    try:
        parse_line(line)
        return parse_record(line)
    except ValueError as error:
        raise AuditChainError(f"{file}:{number}: not a record: {error}; run verify on it", number - 1) from error


class SegmentCheck:
    """Follows the chain through one segment; holds one line at a time."""

    def __init__(self, file: str) -> None:
        """Starts at the genesis."""
        self.file = file
        self.records = 0
        self.valid = 0
        self.fault_count = 0
        self.torn = False
        self.closed = False
        self._seq = 0
        self._prev: str | None = GENESIS  # None after a line whose hash is not known: the next link cannot be judged
        self._last: datetime | None = None

    def run(self) -> Iterator[Fault]:
        """Yields at most one fault for each line, and one for the file."""
        try:
            for number, line, whole in _lines(Path(self.file)):
                if not whole and not self.closed:
                    self.torn = self.records > 0
                    break
                self.records += 1
                seq, problems = self._check(line)
                self.valid += not problems
                if problems:
                    yield Fault(self.file, seq, number, "; ".join(problems))
        except OSError as error:
            yield Fault(self.file, None, 0, f"cannot be read: {error.strerror}")
            return
        # A segment gets its name after its first record is on disk, so a crash cannot leave less than one.
        if not self.records:
            yield Fault(self.file, 0, 0, "expected a whole segment.open, found none: the file was cut")

    def _check(self, line: bytes) -> tuple[int, list[str]]:
        """Returns the number of the first record in question and what is wrong with this line."""
        expected = self._seq
        problems = ["data after the footer"] if self.closed else []
        try:
            data = parse_line(line)
        except ValueError as error:
            self._seq, self._prev = expected + 1, None
            return expected, [*problems, f"not a record: {error}"]
        problems += self._check_chain(data)
        if data.get("v") != SCHEMA_VERSION:
            problems.append(f"expected schema version {SCHEMA_VERSION}, found {data.get('v')!r}; update safegen")
            return expected, problems
        try:
            record = parse_record(line)
            return expected, [*problems, *self._check_schema(record)]
        except ValueError as error:
            return expected, [*problems, f"not of schema safegen.audit/1: {error}"]

    def _check_chain(self, data: dict[str, object]) -> Iterator[str]:
        seq, digest = data.get("seq"), data.get("hash")
        if seq != self._seq or isinstance(seq, bool):
            yield f"expected seq {self._seq}, found {seq!r}: records are missing, doubled or out of order"
        if self._prev is not None and data.get("prev") != self._prev:
            yield "prev is not the hash of the record before"
        if digest != record_hash(data):
            yield "hash does not match the record: it was changed"
        self._seq = (seq if isinstance(seq, int) else self._seq) + 1
        self._prev = digest if isinstance(digest, str) else None

    def _check_schema(self, record: Record) -> Iterator[str]:
        missing = missing_fields(record)
        if missing:
            yield f"{record.kind} lacks {', '.join(missing)}"
        if (record.kind == "segment.open") != (record.seq == 0):
            yield f"expected segment.open as seq 0 and only there, found {record.kind}"
        when = parse_ts(record.ts)
        if self._last is not None and when < self._last - CLOCK_SLACK:
            yield f"time goes back by {(self._last - when).total_seconds():.3f} s"
        self._last = when
        if record.footer is not None:
            self.closed = True
            if record.footer.count != record.seq or record.footer.head != record.prev:
                found = f"count {record.footer.count} and head {record.footer.head}"
                yield f"footer: expected count {record.seq} and head {record.prev}, found {found}"


def _segments(path: Path) -> list[Path]:
    if not path.exists():
        raise UsageError(f"{path}: expected an audit segment or the folder of a log, found nothing there")
    if not path.is_dir():
        return [path]

    def refuse(error: OSError) -> None:  # pathlib's rglob would skip the folder, and its segments, in silence
        raise UsageError(f"{error.filename}: cannot be read: {error.strerror}; give this user read access")

    files = [Path(root, name) for root, _, names in os.walk(path, onerror=refuse) for name in names]
    return sorted(file for file in files if file.suffix == ".jsonl" and file.is_file())


def _lines(file: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Yields (number from 1, line without newline, whether it is whole).

    Of a line over the limit only the first part is yielded, as whole: no writer of ours tears a line of that length,
    and `parse_line` refuses it.
    """
    with file.open("rb") as handle:
        number = 0
        while line := handle.readline(MAX_RECORD_BYTES + 1):
            number += 1
            too_long = len(line) > MAX_RECORD_BYTES
            yield number, line.removesuffix(b"\n"), too_long or line.endswith(b"\n")
            while too_long and not line.endswith(b"\n") and line:
                line = handle.readline(MAX_RECORD_BYTES)
