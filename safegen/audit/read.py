"""Reads a log: one segment after another, all of them in the order of time, the last records, or those that match.

Nothing here checks the chain; `safegen.audit.verify` does.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegen.audit.chain import parse_line
from safegen.audit.events import Record
from safegen.audit.files import lines_of, segment_files
from safegen.audit.schema import parse_record
from safegen.errors import AuditChainError

_BLOCK = 1 << 16  # bytes read at a time from the end of a file


@dataclass(frozen=True, slots=True)
class Line:
    """One record where it stands.

    Attributes:
        file: The segment.
        data: The line without its newline.
        values: The record as plain values, unknown fields included.
    """

    file: Path
    data: bytes
    values: dict[str, Any]

    @property
    def ts(self) -> str:
        """Its time stamp; all have the same form, so that their text sorts as the times do."""
        return self.values["ts"]


def read_records(path: str | Path) -> Iterator[Record]:
    """Yields the records of a segment, or of every segment below a folder (by path), without checking the chain.

    A torn last line is left out; fields that this version does not know are left out of a record.

    Raises:
        UsageError: Nothing exists at `path`.
        AuditChainError: A line is not a record, or a file cannot be read.
    """
    for file in segment_files(Path(path)):
        for line in lines_in(file):
            try:
                yield parse_record(line.data)
            except ValueError as error:
                raise _not_a_record(file, line.values.get("seq"), error) from error


def lines_in(file: Path) -> Iterator[Line]:
    """Yields the lines of one segment, without a torn last one.

    Raises:
        AuditChainError: A line is not a record, or the file cannot be read.
    """
    try:
        for number, data, whole in lines_of(file):
            if whole:
                yield _line(file, data, number - 1)
    except OSError as error:
        raise AuditChainError(f"{file}: cannot be read: {error.strerror}") from error


def _line(file: Path, data: bytes, seq: int | None) -> Line:
    try:
        values = parse_line(data)
        for name in ("ts", "event_id", "kind"):
            if not isinstance(values.get(name), str):
                raise ValueError(f"{name}: expected text")
    except ValueError as error:
        raise _not_a_record(file, seq, error) from error
    return Line(file, data, values)


def _not_a_record(file: Path, seq: object, error: ValueError) -> AuditChainError:
    number = seq if isinstance(seq, int) else None
    where = f":{number + 1}" if number is not None else ""
    return AuditChainError(f"{file}{where}: not a record: {error}; run verify on it", number)


def merged(paths: Sequence[Path]) -> Iterator[Line]:
    """Yields the records of several segments or logs in the order of time, each segment in its own order.

    Only segments that overlap in time are open together.

    Raises:
        UsageError, AuditChainError: See `read_records`.
    """
    waiting: list[tuple[str, int, Path]] = []
    for number, file in enumerate(dict.fromkeys(file for path in paths for file in segment_files(path))):
        first = next(lines_in(file), None)  # opened again when its turn comes
        if first is not None:
            waiting.append((first.ts, number, file))
    waiting.sort(reverse=True)
    running: list[tuple[str, int, Line, Iterator[Line]]] = []  # no two have the same number
    while waiting or running:
        while waiting and (not running or waiting[-1][:2] <= running[0][:2]):
            ts, number, file = waiting.pop()
            lines = lines_in(file)
            heapq.heappush(running, (ts, number, next(lines), lines))
        ts, number, line, lines = heapq.heappop(running)
        yield line
        following = next(lines, None)
        if following is not None:  # a clock that went back must not put a record before its predecessor
            heapq.heappush(running, (max(ts, following.ts), number, following, lines))


def _in_order(segments: Iterable[Iterable[Line]]) -> list[Line]:
    """Returns the lines of several segments in the order of time, each segment in its own order."""
    placed: list[tuple[str, Line]] = []
    for lines in segments:
        latest = ""
        for line in lines:
            latest = max(latest, line.ts)
            placed.append((latest, line))
    return [line for _, line in sorted(placed, key=lambda item: item[0])]


def last_lines(path: Path, count: int) -> list[Line]:
    """Returns the last records of a log, in the order of time; reads no more than the ends of its segments.

    Raises:
        UsageError, AuditChainError: See `read_records`.
    """
    ends = ([_line(file, data, None) for data in _ends(file, count)] for file in segment_files(path))
    return _in_order(ends)[-count:]


def _ends(file: Path, count: int) -> list[bytes]:
    """Returns the last whole lines of a file."""
    try:
        with file.open("rb") as handle:
            end, tail = handle.seek(0, 2), b""
            while end > 0 and tail.count(b"\n") <= count + 1:
                start = max(0, end - _BLOCK)
                handle.seek(start)
                tail = handle.read(end - start) + tail
                end = start
    except OSError as error:
        raise AuditChainError(f"{file}: cannot be read: {error.strerror}") from error
    lines = tail.split(b"\n")[:-1]  # what follows the last newline is torn, or nothing
    return (lines if end == 0 else lines[1:])[-count:]


class Follower:
    """Yields what is added to a log from now on."""

    def __init__(self, path: Path) -> None:
        """Notes where the log ends."""
        self._path = path
        self._read = {file: file.stat().st_size for file in segment_files(path)}

    def added(self) -> list[Line]:
        """Returns the records that were added since the last call, in the order of time.

        Raises:
            UsageError, AuditChainError: See `read_records`.
        """
        segments: list[list[Line]] = []
        for file in segment_files(self._path):
            start = self._read.get(file, 0)
            with file.open("rb") as handle:
                handle.seek(start)
                whole = handle.read().rpartition(b"\n")[0]
            if whole:
                segments.append([_line(file, data, None) for data in whole.split(b"\n")])
                self._read[file] = start + len(whole) + 1
        return _in_order(segments)


def matching(path: Path, identifier: str) -> Iterator[Line]:
    """Yields the records that carry an identifier: an event, a request, a hash, or the digest of an image.

    Args:
        path: A segment or the folder of a log.
        identifier: The whole of one, or the first eight characters or more.

    Raises:
        UsageError, AuditChainError: See `read_records`.
    """
    for line in _containing(path, identifier):
        values = line.values
        output = values.get("output") or {}
        known = [values["event_id"], values.get("hash"), (values.get("request") or {}).get("id")]
        if any(str(name).startswith(identifier) for name in (*known, *output.get("sha256", ()))):
            yield line


def of_prompt(path: Path, digests: Sequence[str]) -> Iterator[Line]:
    """Yields the records whose prompt or negative prompt has one of these HMACs.

    Raises:
        UsageError, AuditChainError: See `read_records`.
    """
    for line in _containing(path, *digests):
        if any((line.values.get(name) or {}).get("hmac") in digests for name in ("prompt", "negative")):
            yield line


def _containing(path: Path, *texts: str) -> Iterator[Line]:
    """Yields the records whose line contains one of these texts: many times faster than parsing all of them."""
    needles = [text.encode() for text in texts]
    for file in segment_files(path):
        try:
            for number, data, whole in lines_of(file):
                if whole and any(needle in data for needle in needles):
                    yield _line(file, data, number - 1)
        except OSError as error:
            raise AuditChainError(f"{file}: cannot be read: {error.strerror}") from error
