"""Tombstones: signed records of segments that were removed on purpose, so that the rest of the log still verifies."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safegen.audit.chain import GENESIS, canonical, parse_line
from safegen.audit.digest import line_sha256
from safegen.audit.fault import Fault
from safegen.audit.files import TOMBSTONES, lines_of
from safegen.audit.linefile import write_error
from safegen.audit.plain import Plain, as_dict
from safegen.audit.signing import Signer, signed_by

if TYPE_CHECKING:
    from pydantic import TypeAdapter


@dataclass(frozen=True, slots=True)
class Tombstone(Plain):
    """A segment that was removed.

    Attributes:
        v: Schema version, 1.
        ts: When it was removed: wall clock, UTC, milliseconds.
        segment: Its path, from the root of the log; its digests went with it.
        count: How many records it held.
        first: Time of its first record.
        last: Time of its last record.
        sha256: Of its whole lines.
        prev: sha256 of the tombstone line before this one, or the genesis constant.
        public_key: Ed25519, 64 hex digits.
        signature: Of the canonical form without `signature`, 128 hex digits.
    """

    v: int
    ts: str
    segment: str
    count: int
    first: str
    last: str
    sha256: str
    prev: str
    public_key: str
    signature: str = ""

    def signed(self, signer: Signer) -> Tombstone:
        """Returns it with its signature."""
        return replace(self, signature=signer.sign(self._body()))

    @property
    def authentic(self) -> bool:
        """Whether the signature is one of this tombstone by its public key."""
        return signed_by(self.public_key, self.signature, self._body())

    def _body(self) -> bytes:
        return canonical({name: value for name, value in as_dict(self).items() if name != "signature"})


@functools.cache
def _adapter() -> TypeAdapter[Tombstone]:
    from pydantic import TypeAdapter

    return TypeAdapter(Tombstone)


class Tombstones:
    """The tombstones of a log.

    Attributes:
        segments: Paths of the segments that were removed, from the root of the log.
        last: sha256 of the last line, or the genesis constant.
    """

    def __init__(self, root: Path, trusted: Collection[str] = ()) -> None:
        """Takes the root of the log, and the public keys that may have signed; none given means any."""
        self.file = root / TOMBSTONES
        self.segments: set[str] = set()
        self.last = GENESIS
        self._trusted = trusted

    def read(self) -> Iterator[Fault]:
        """Reads them; yields a fault for each line that cannot be trusted."""
        from pydantic import ValidationError

        if not self.file.exists():
            return
        try:
            for number, line, whole in lines_of(self.file):
                if not whole:  # the process that pruned died while writing it, and removed nothing
                    break
                try:
                    parse_line(line)
                    stone = _adapter().validate_json(line, strict=True)
                except (ValueError, ValidationError) as error:
                    yield Fault(str(self.file), None, number, f"not a tombstone: {error}")
                    self.last = line_sha256(line)
                    continue
                problems = list(self._problems(stone))
                self.last = line_sha256(line)
                if problems:
                    yield Fault(str(self.file), None, number, "; ".join(problems))
                else:
                    self.segments.add(stone.segment)
        except OSError as error:
            yield Fault(str(self.file), None, 0, f"cannot be read: {error.strerror}")

    def _problems(self, stone: Tombstone) -> Iterator[str]:
        if not stone.authentic:
            yield "the signature is not one of this tombstone: it was changed"
        if self._trusted and stone.public_key not in self._trusted:
            yield f"signed by {stone.public_key}, which is none of the keys that were given"
        if stone.prev != self.last:
            yield "does not name the tombstone before it: one is missing, doubled or out of order"

    def add(self, stone: Tombstone) -> None:
        """Writes a tombstone to the disk.

        Raises:
            AuditWriteError: Where the system refuses.
        """
        line = canonical(as_dict(stone))
        try:
            fd = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                size = os.lseek(fd, 0, os.SEEK_END)
                if os.write(fd, line + b"\n") != len(line) + 1:
                    os.ftruncate(fd, size)
                    raise OSError(errno.ENOSPC, "only a part of the line was written")
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise write_error(self.file, "cannot write the tombstone", error) from error
        self.last = line_sha256(line)
        self.segments.add(stone.segment)
