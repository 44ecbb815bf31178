"""Checks the digests of one segment: their lines, their signatures, and their chain."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from safegen.audit.digest import Digest, digests_path, line_sha256, parse_digest
from safegen.audit.fault import Fault
from safegen.audit.files import lines_of


class DigestsCheck:
    """The digests that stand beside one segment.

    Attributes:
        file: Their file.
        found: Whether it exists.
        digests: Those that can be trusted so far, in order: whole, signed, and each naming the one before.
        names: The sha256 of each whole line, by which other digests name it.
        count: Whole lines.
        torn: Whether the last line is torn: its process died while writing it.
    """

    def __init__(self, segment: Path, trusted: Collection[str]) -> None:
        """Takes the segment, and the public keys that may have signed; none given means any."""
        self.file = digests_path(segment)
        self.found = self.file.is_file()
        self.digests: list[Digest] = []
        self.names: set[str] = set()
        self.count = 0
        self.torn = False
        self._segment = segment.name
        self._trusted = trusted

    def run(self) -> Iterator[Fault]:
        """Yields a fault for each digest that cannot be trusted."""
        if not self.found:
            return
        last: str | None = None
        try:
            for number, line, whole in lines_of(self.file):
                if not whole:  # what it would have vouched for is not covered
                    self.torn = True
                    break
                self.count += 1
                name = line_sha256(line)
                self.names.add(name)
                try:
                    digest = parse_digest(line)
                except ValueError as error:
                    yield self._fault(number, f"not a digest: {error}")
                    last = name
                    continue
                problems = list(self._problems(digest, last))
                last = name
                if problems:
                    yield self._fault(number, "; ".join(problems))
                else:
                    self.digests.append(digest)
        except OSError as error:
            yield Fault(str(self.file), None, 0, f"cannot be read: {error.strerror}")

    def _fault(self, number: int, message: str) -> Fault:
        seq = self.digests[-1].count if self.digests else 0
        return Fault(str(self.file), seq, number, message)

    def _problems(self, digest: Digest, last: str | None) -> Iterator[str]:
        if Path(digest.segment).name != self._segment:
            yield f"expected a digest of {self._segment}, found one of {digest.segment}"
        if not digest.authentic:
            yield "the signature is not one of this digest: it was changed"
        if self._trusted and digest.public_key not in self._trusted:
            yield f"signed by {digest.public_key}, which is none of the keys that were given"
        if last is not None and [link.sha256 for link in digest.previous] != [last]:
            yield "does not name the digest before it: one is missing, doubled or out of order"
        if (last is None) != (digest.kind == "open"):
            yield f"expected the digest `open` first and only there, found {digest.kind!r}"
        if self.digests and (digest.count < self.digests[-1].count or self.digests[-1].kind == "close"):
            yield f"covers {digest.count} records after one that covers {self.digests[-1].count}"
