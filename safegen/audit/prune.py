"""Removes old segments, and leaves a signed tombstone for each, so that the rest of the log still verifies."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from safegen.audit.chain import SCHEMA_VERSION, utc_now
from safegen.audit.check import SegmentCheck
from safegen.audit.check_digests import DigestsCheck
from safegen.audit.digest import digests_path
from safegen.audit.files import segment_files
from safegen.audit.linefile import alone_in, being_written
from safegen.audit.signing import Signer
from safegen.audit.tombstone import Tombstone, Tombstones
from safegen.errors import AuditChainError, AuditWriteError, UsageError

MIN_RETENTION_DAYS = 185  # six months, which record-keeping duties ask for at least


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `prune` did, or would do.

    Attributes:
        segments: Paths of the segments that were removed, from the root of the log.
        records: How many records they held.
        in_use: Old segments that a process has open still; they stay.
    """

    segments: tuple[str, ...]
    records: int
    in_use: tuple[str, ...]


def prune(root: Path, before: datetime, signer: Signer, *, dry_run: bool = False) -> Pruned:
    """Removes the segments whose last record is older than `before`, with their digests.

    The tombstone reaches the disk before its segment is removed. Nothing is removed from a log whose old segments have
    faults: they are evidence.

    Args:
        root: The root of a log.
        before: A time with its zone.
        signer: Signs the tombstones.
        dry_run: Only say what would be removed.

    Raises:
        UsageError: `root` is no folder, or another process prunes it.
        AuditChainError: An old segment, or a tombstone, is not as it was written; nothing was removed.
        AuditWriteError: A tombstone could not be written, or a file not removed.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: expected the folder of a log")
    with alone_in(root):
        return _prune(root, before, signer, dry_run=dry_run)


def _prune(root: Path, before: datetime, signer: Signer, *, dry_run: bool) -> Pruned:
    stones = Tombstones(root)
    for fault in stones.read():
        raise AuditChainError(f"{fault}; nothing was removed", fault.seq)
    old: list[tuple[Path, SegmentCheck]] = []
    in_use: list[str] = []
    for file in segment_files(root):
        digests = DigestsCheck(file, ())
        faults = [*digests.run()]
        check = SegmentCheck(file, digests.digests)
        faults += check.run()
        if check.last is not None and check.last >= before:
            continue
        if faults:
            raise AuditChainError(f"{faults[0]}; nothing was removed: a log with faults is evidence", faults[0].seq)
        if being_written(file):
            in_use.append(file.relative_to(root).as_posix())
        else:
            old.append((file, check))
    if not dry_run:
        _finish_earlier(root, stones)
        for file, check in old:
            _remove(root, file, check, stones, signer)
    names = tuple(file.relative_to(root).as_posix() for file, _ in old)
    return Pruned(names, sum(check.records for _, check in old), tuple(in_use))


def _finish_earlier(root: Path, stones: Tombstones) -> None:
    """Removes digests that an earlier run left behind when it died."""
    for name in stones.segments:
        if not (root / name).exists():
            digests_path(root / name).unlink(missing_ok=True)


def _remove(root: Path, file: Path, check: SegmentCheck, stones: Tombstones, signer: Signer) -> None:
    assert check.first is not None
    assert check.last is not None
    name = file.relative_to(root).as_posix()
    if name not in stones.segments:  # else an earlier run died between the tombstone and the removal
        stone = Tombstone(
            v=SCHEMA_VERSION,
            ts=utc_now(),
            segment=name,
            count=check.records,
            first=check.first.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            last=check.last.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            sha256=check.sha256,
            prev=stones.last,
            public_key=signer.public_key,
        )
        stones.add(stone.signed(signer))
    try:
        file.unlink()
        digests_path(file).unlink(missing_ok=True)
    except OSError as error:
        raise AuditWriteError(f"{error.filename}: cannot be removed: {error.strerror}; its tombstone stands") from error
    with contextlib.suppress(OSError):  # not empty
        file.parent.rmdir()
