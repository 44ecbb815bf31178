"""Signed digests: what a segment held, by whom it is vouched for, and which digests came before.

Beside each segment of a signed log stands `<segment>.digests.jsonl`: one canonical line per digest, the first when the
segment begins, then heartbeats, the last when it is closed. Each names the one before by its sha256; the first of a
segment names the last of its predecessor, or, where its process has just started, those of the segments that were
written last in the same log. A digest that is missing is missed by the one that names it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safegen.audit.chain import SCHEMA_VERSION, canonical, parse_line, utc_now
from safegen.audit.linefile import LineFile, write_error
from safegen.audit.plain import Plain, as_dict
from safegen.audit.signing import Signer, signed_by
from safegen.files import make_durable

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SUFFIX = ".digests.jsonl"
DigestKind = Literal["open", "heartbeat", "close"]
_LINKS = 16  # digests of other processes that the first digest of a process names
_TAIL = 1 << 16  # bytes; many times the longest digest


@dataclass(frozen=True, slots=True)
class LinkRecord(Plain):
    """Another digest: the path of its file, from the root of the log, and the sha256 of its line."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Digest(Plain):
    """What a segment held at one time.

    Attributes:
        v: Schema version, 1.
        kind: `open`, `heartbeat` or `close`.
        segment: Path of the segment, from the root of the log.
        ts: Wall clock, UTC, milliseconds.
        count: How many records it held.
        head: Hash of the last of them.
        size: How many bytes they take.
        sha256: Of these bytes.
        previous: The digests before this one.
        public_key: Ed25519, 64 hex digits.
        signature: Of the canonical form without `signature`, 128 hex digits.
    """

    v: int
    kind: str
    segment: str
    ts: str
    count: int
    head: str
    size: int
    sha256: str
    previous: tuple[LinkRecord, ...]
    public_key: str
    signature: str = ""

    def signed(self, signer: Signer) -> Digest:
        """Returns it with its signature."""
        return replace(self, signature=signer.sign(self._body()))

    @property
    def authentic(self) -> bool:
        """Whether the signature is one of this digest by its public key."""
        return signed_by(self.public_key, self.signature, self._body())

    @property
    def line(self) -> bytes:
        """Its line, without the newline."""
        return canonical(as_dict(self))

    def _body(self) -> bytes:
        return canonical({name: value for name, value in as_dict(self).items() if name != "signature"})


def parse_digest(line: bytes) -> Digest:
    """Reads one line (without its newline).

    Raises:
        ValueError: Says what it is instead.
    """
    from pydantic import ValidationError

    parse_line(line)
    try:
        return _adapter().validate_json(line, strict=True)
    except ValidationError as error:
        raise ValueError("; ".join(f"{fault['loc']}: {fault['msg']}" for fault in error.errors())) from error


@functools.cache
def _adapter() -> TypeAdapter[Digest]:
    from pydantic import TypeAdapter

    return TypeAdapter(Digest)


def digests_path(segment: Path) -> Path:
    """Returns where the digests of a segment are."""
    return segment.with_name(segment.name.removesuffix(".jsonl") + SUFFIX)


def line_sha256(line: bytes) -> str:
    """Returns the sha256 of a line without its newline: what a link names."""
    return hashlib.sha256(line).hexdigest()


class DigestFile:
    """The digests of one segment, being written.

    Attributes:
        path: Where they are.
        last: Names the last one.
        covered: How many records the last one covers.
    """

    def __init__(self, root: Path, segment: Path, signer: Signer, previous: tuple[LinkRecord, ...]) -> None:
        """Creates the file.

        Raises:
            AuditWriteError: Where the system refuses.
        """
        self.path = digests_path(segment)
        self.covered = 0
        self._segment = segment.relative_to(root).as_posix()
        self._name = self.path.relative_to(root).as_posix()
        self._signer = signer
        self._previous = previous
        try:
            self._file = LineFile(self.path)
            make_durable(self.path.parent)
        except OSError as error:
            raise write_error(self.path, "cannot create the digests of the audit segment", error) from error

    @property
    def last(self) -> tuple[LinkRecord, ...]:
        """What the next digest, here or in the next segment, names as the one before."""
        return self._previous

    def add(self, kind: DigestKind, *, count: int, head: str, size: int, sha256: str) -> Digest:
        """Signs what the segment holds, and writes that to the disk.

        Raises:
            AuditWriteError: Where the system refuses.
        """
        digest = Digest(
            v=SCHEMA_VERSION,
            kind=kind,
            segment=self._segment,
            ts=utc_now(),
            count=count,
            head=head,
            size=size,
            sha256=sha256,
            previous=self._previous,
            public_key=self._signer.public_key,
        ).signed(self._signer)
        line, size = digest.line, self._file.size
        try:
            self._file.append(line + b"\n")
            self._file.sync()
        except OSError as error:
            self._file.cut(size)
            raise write_error(self.path, "cannot write the digest of the audit segment", error) from error
        self.covered = count
        self._previous = (LinkRecord(self._name, line_sha256(line)),)
        return digest

    def release(self) -> None:
        """Closes the file of this process."""
        self._file.release()


def latest_digests(root: Path) -> tuple[LinkRecord, ...]:
    """Returns links to the last digests of the segments of a log that were signed last, at most 16.

    Only the two latest days are looked at: it is done whenever a process opens the log.
    """
    days = sorted((day for day in root.glob("[0-9]*-[0-9]*-[0-9]*") if day.is_dir()), reverse=True)[:2]
    found: list[tuple[int, Path]] = []
    for path in (path for day in days for path in day.glob(f"*{SUFFIX}")):
        with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
            found.append((path.stat().st_mtime_ns, path))
    links: list[LinkRecord] = []
    for _, path in sorted(found, reverse=True)[:_LINKS]:
        with contextlib.suppress(FileNotFoundError):
            line = _last_line(path)
            if line:
                links.append(LinkRecord(path.relative_to(root).as_posix(), line_sha256(line)))
    return tuple(links)


def _last_line(path: Path) -> bytes:
    """Returns the last whole line of a file, without its newline; nothing where there is none."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().split(b"\n")[:-1]
    return lines[-1] if lines else b""
