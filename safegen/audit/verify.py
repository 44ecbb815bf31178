"""Checks a log after the fact.

What is promised: any byte flipped, any line deleted, duplicated or moved, and any cut inside a segment are found and
named by `seq`. A signed log also shows a segment that was removed, a segment cut between two lines, and a chain that
was computed anew without the signing key, as far as digests cover it. What is left:

* What was written after the last digest of a segment that was never closed (its process died, or goes on writing) can
  be cut off, or forged, without a trace: `uncovered` counts these records.
* A cut inside the *last* line of such a segment looks like a process that died while writing: it is listed in
  `recovered_tail`, not as a fault. (The newline of that line belongs to it.)
* The segments of the processes that were started last, and that no other digest names yet, can be removed together
  with their digests.
* Who holds the signing key can rewrite everything; only an anchor outside the log shows that. Without a public key to
  hold the signatures against (`public_keys`), so can anybody.

In a log that is not signed, a segment cut exactly between two lines cannot be told from one whose process died
there; it is listed in `unclosed`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safegen.audit.check import SegmentCheck
from safegen.audit.check_digests import DigestsCheck
from safegen.audit.digest import SUFFIX
from safegen.audit.fault import Fault
from safegen.audit.files import digest_files, segment_files
from safegen.audit.tombstone import Tombstones
from safegen.errors import AuditChainError

MAX_FAULTS = 1000  # listed in one report; the rest is counted


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        segments: Segment files found.
        segments_valid: Of these, without a fault.
        records: Whole lines found.
        records_valid: Of these, without a fault.
        digests: Signed digests found.
        digests_valid: Of these, without a fault.
        uncovered: Records of signed segments that no digest covers: written since the last one.
        unsigned: Segments that are not signed at all.
        signers: Public keys that signed.
        pruned: Segments that were removed, with a tombstone.
        faults: The first 1000 faults, by file and line.
        fault_count: All faults.
        recovered_tail: Segments, or files of digests, whose last line is torn: their process died while writing it. Not
            a fault.
        unclosed: Segments without a footer: still being written, or their process died. Not a fault; what is missing
            at their end after the last digest, if anything, cannot be known.
    """

    segments: int
    segments_valid: int
    records: int
    records_valid: int
    digests: int
    digests_valid: int
    uncovered: int
    unsigned: int
    signers: tuple[str, ...]
    pruned: int
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
        counts = (
            f"{self.segments_valid}/{self.segments} segments valid, {self.records_valid}/{self.records} records valid"
        )
        lines = [f"{self.digests_valid}/{self.digests} digests valid, {counts}" if self.digests else counts]
        lines += [f"signed by {signer}" for signer in self.signers]
        if self.signers and self.unsigned:
            lines.append(f"{self.unsigned} segments are not signed")
        if self.uncovered:
            lines.append(f"{self.uncovered} records are newer than the last digest of their segment")
        if self.pruned:
            lines.append(f"{self.pruned} segments were pruned, with a signed tombstone")
        lines += [f"fault: {fault}" for fault in self.faults]
        if self.fault_count > len(self.faults):
            lines.append(f"… and {self.fault_count - len(self.faults)} more faults")
        lines += [
            f"recovered tail: {file}: the last line is torn; its process died while writing"
            for file in self.recovered_tail
        ]
        lines += [f"no footer: {file}: still being written, or its process died" for file in self.unclosed]
        return "\n".join(lines)


def verify(path: str | Path, *, public_keys: Collection[str] = ()) -> VerifyReport:
    """Checks one segment file, or the whole log below a folder, in constant memory per segment.

    Args:
        path: A segment (with its digests, where they stand beside it) or the root of a log.
        public_keys: Keys that may have signed, as 64 hex digits; what none of them signed is a fault then. Without one
            any key is accepted, and `signers` says which.

    Raises:
        UsageError: Nothing exists at `path`, or a folder below it cannot be read.
    """
    return _Check(Path(path), public_keys).report()


class _Check:
    """One verification."""

    def __init__(self, path: Path, trusted: Collection[str]) -> None:
        self._trusted = trusted
        self._faults: list[Fault] = []
        self._bad: dict[str, int] = {}  # faults by file
        files = segment_files(path)
        self._tombstones = Tombstones(path, trusted) if path.is_dir() else None
        for fault in self._tombstones.read() if self._tombstones else ():
            self._add(fault)
        if not files and not (self._tombstones and self._tombstones.segments):
            self._add(Fault(str(path), None, 0, "expected *.jsonl segments, found none"))
        self._segments: dict[str, SegmentCheck] = {}
        self._digests: dict[str, DigestsCheck] = {}
        for file in files:
            self._check_segment(file, file.relative_to(path).as_posix() if path.is_dir() else file.name)
        if self._tombstones is not None:
            for fault in self._across(path, self._tombstones.segments):
                self._add(fault)

    def _add(self, fault: Fault) -> None:
        self._bad[fault.file] = self._bad.get(fault.file, 0) + 1
        if len(self._faults) < MAX_FAULTS:
            self._faults.append(fault)

    def _check_segment(self, file: Path, name: str) -> None:
        digests = DigestsCheck(file, self._trusted)
        for fault in digests.run():
            self._add(fault)
        check = SegmentCheck(file, digests.digests)
        for fault in check.run():
            self._add(fault)
        self._segments[name] = check
        self._digests[_digests_name(name)] = digests
        signer = check.opened.get("signer")
        # A process may die between its first record and its first digest; nothing was acknowledged then.
        if signer and not digests.count and check.records > 1:
            self._add(Fault(str(file), 1, 0, f"signed by {signer}, and its digests are missing: {digests.file.name}"))
        elif self._trusted and not digests.count and check.records > 1:
            self._add(Fault(str(file), 0, 0, "not signed, and a public key was given"))
        if signer and any(digest.public_key != signer for digest in digests.digests):
            self._add(Fault(str(digests.file), 0, 0, f"the segment says that {signer} signs it; somebody else did"))

    def _across(self, root: Path, pruned: Collection[str]) -> Iterator[Fault]:
        """Finds what is missing: segments and digests that others name."""
        for file in digest_files(root):
            name = file.relative_to(root).as_posix()
            if name not in self._digests and _segment_name(name) not in pruned:
                yield Fault(str(file), 0, 0, f"digests of a segment that is missing: {_segment_name(name)}")
        writers: dict[str, dict[int, str]] = {}
        for name, check in self._segments.items():
            if check.following is not None and check.following not in self._segments and check.following not in pruned:
                yield Fault(str(check.file), check.records, 0, f"the segment after it is missing: {check.following}")
            if "writer" in check.opened and "number" in check.opened:
                writers.setdefault(check.opened["writer"], {})[check.opened["number"]] = name
        yield from self._gaps(writers, pruned)
        yield from self._dangling(pruned)

    def _gaps(self, writers: Mapping[str, Mapping[int, str]], pruned: Collection[str]) -> Iterator[Fault]:
        removed = {Path(name).name for name in pruned}
        for writer, numbers in writers.items():
            for number, name in numbers.items():
                check, before = self._segments[name], numbers.get(number - 1)
                if number > 1 and before is None and f"{writer}-{number - 1:04}.jsonl" not in removed:
                    yield Fault(
                        str(check.file), 0, 0, f"the segment before it is missing: {writer}-{number - 1:04}.jsonl"
                    )
                elif before is not None and check.opened.get("after") not in self._segments[before].ends:
                    yield Fault(str(check.file), 0, 1, f"does not follow the last record of {before}")

    def _dangling(self, pruned: Collection[str]) -> Iterator[Fault]:
        for digests in self._digests.values():
            for link in (link for digest in digests.digests for link in digest.previous):
                named = self._digests.get(link.file)
                if named is None and _segment_name(link.file) not in pruned:
                    yield Fault(str(digests.file), None, 0, f"names {link.file}, which is missing")
                elif named is not None and link.sha256 not in named.names:
                    text = f"a digest that {digests.file.name} names is missing: {link.sha256}"
                    yield Fault(str(named.file), None, 0, text)

    def report(self) -> VerifyReport:
        segments, digests = list(self._segments.values()), [d for d in self._digests.values() if d.count]
        signed = [check for name, check in self._segments.items() if self._digests[_digests_name(name)].count]
        return VerifyReport(
            segments=len(segments),
            segments_valid=sum(str(check.file) not in self._bad for check in segments),
            records=sum(check.records for check in segments),
            records_valid=sum(check.valid for check in segments),
            digests=sum(check.count for check in digests),
            digests_valid=sum(len(check.digests) for check in digests),
            uncovered=sum(check.records - check.covered for check in signed),
            unsigned=len(segments) - len(signed),
            signers=tuple(sorted({digest.public_key for check in digests for digest in check.digests})),
            pruned=len(self._tombstones.segments) if self._tombstones else 0,
            faults=tuple(self._faults),
            fault_count=sum(self._bad.values()),
            recovered_tail=tuple(str(check.file) for check in (*segments, *self._digests.values()) if check.torn),
            unclosed=tuple(str(check.file) for check in segments if check.records and not check.closed),
        )


def _digests_name(segment: str) -> str:
    return segment.removesuffix(".jsonl") + SUFFIX


def _segment_name(digests: str) -> str:
    return digests.removesuffix(SUFFIX) + ".jsonl"


def raise_for_faults(report: VerifyReport) -> None:
    """Raises for a report that is not ok.

    Raises:
        AuditChainError: The text of the report; `seq` is that of the first fault.
    """
    if report.faults:
        raise AuditChainError(str(report), report.faults[0].seq)
