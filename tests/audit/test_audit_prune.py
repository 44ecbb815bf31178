"""Pruning removes old segments, and leaves what proves that it did."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from audit_samples import KEY, SIGNER, signed_log, write_gated

from safegen.audit import AuditLog, AuditOptions, Signer, verify
from safegen.audit.files import TOMBSTONES, segment_files
from safegen.audit.linefile import alone_in
from safegen.audit.prune import prune
from safegen.errors import AuditChainError, AuditWriteError, UsageError

KEYS = (SIGNER.public_key,)


def moment_after(folder: Path, number: int) -> datetime:
    """A moment after the first `number` segments were closed, and before the end of the next."""
    from safegen.audit.check import SegmentCheck

    ends: list[datetime] = []
    for file in segment_files(folder):
        check = SegmentCheck(file)
        assert list(check.run()) == []
        assert check.last is not None
        ends.append(check.last)
    return ends[number - 1] + timedelta(milliseconds=1)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    signed_log(tmp_path, runs=4)
    return tmp_path


def test_a_pruned_log_verifies_and_says_so(log: Path) -> None:
    segments = segment_files(log)
    before = moment_after(log, 2)
    assert prune(log, before, SIGNER, dry_run=True).records > 0
    assert segment_files(log) == segments
    pruned = prune(log, before, SIGNER)
    assert pruned.segments == tuple(path.relative_to(log).as_posix() for path in segments[:2])
    assert segment_files(log) == segments[2:]
    report = verify(log, public_keys=KEYS)
    assert report.ok, str(report)
    assert report.pruned == 2
    assert "2 segments were pruned, with a signed tombstone" in str(report)
    assert prune(log, before, SIGNER).segments == ()
    prune(log, datetime.now(UTC) + timedelta(days=1), SIGNER)
    report = verify(log, public_keys=KEYS)
    assert (report.ok, report.segments, report.pruned) == (True, 0, 4)
    signed_log(log, runs=1)  # and the log goes on
    assert verify(log, public_keys=KEYS).ok


def test_removing_without_a_tombstone_or_changing_one_is_found(log: Path) -> None:
    prune(log, moment_after(log, 2), SIGNER)
    stones = log / TOMBSTONES
    data = stones.read_bytes()
    lines = data.splitlines(keepends=True)
    for damage in (b"", lines[0], lines[1], b"".join(reversed(lines)), data.replace(b'"count":8', b'"count":9', 1)):
        stones.write_bytes(damage)
        assert not verify(log, public_keys=KEYS).ok
    stones.write_bytes(data)
    assert verify(log, public_keys=KEYS).ok


def test_a_tombstone_of_somebody_else_is_found(log: Path) -> None:
    other = Signer(bytes(32))
    prune(log, moment_after(log, 1), other)
    assert verify(log).ok
    assert "none of the keys" in str(verify(log, public_keys=KEYS))


def test_a_segment_that_is_being_written_stays(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path, key=KEY, options=AuditOptions(signer=SIGNER))
    write_gated(log)
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    pruned = prune(tmp_path, tomorrow, SIGNER)
    assert (pruned.segments, pruned.in_use) == ((), (log.path.relative_to(tmp_path).as_posix(),))
    write_gated(log)
    log.close()
    assert prune(tmp_path, tomorrow, SIGNER).records == 4


def test_a_log_with_faults_is_not_pruned(log: Path) -> None:
    segment = segment_files(log)[0]
    segment.write_bytes(segment.read_bytes().replace(b'"match"', b'"clear"', 1))
    with pytest.raises(AuditChainError, match="is evidence"):
        prune(log, moment_after_all(), SIGNER)
    assert not (log / TOMBSTONES).exists()
    assert len(segment_files(log)) == 4


def moment_after_all() -> datetime:
    return datetime.now(UTC) + timedelta(days=1)


@pytest.mark.parametrize("left", ["both", "digests"])
def test_a_run_that_stopped_halfway_is_finished(log: Path, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if left == "digests" and ".digests." not in path.name:
            return unlink(path)
        raise PermissionError(13, "Permission denied", str(path))

    before = moment_after(log, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(AuditWriteError, match="cannot be removed: Permission denied; its tombstone stands"):
            prune(log, before, SIGNER)
    assert (log / TOMBSTONES).read_bytes().count(b"\n") == 1
    assert verify(log, public_keys=KEYS).ok
    prune(log, before, SIGNER)
    assert (log / TOMBSTONES).read_bytes().count(b"\n") == 1
    assert len(list(log.rglob("*-0001.*"))) == 0
    assert verify(log, public_keys=KEYS).ok


def test_only_a_folder_can_be_pruned(log: Path) -> None:
    with pytest.raises(UsageError, match="folder of a log"):
        prune(segment_files(log)[0], moment_after_all(), SIGNER)


def test_two_processes_do_not_prune_one_log_together(log: Path) -> None:
    with alone_in(log), pytest.raises(UsageError, match="another process prunes this log"):
        prune(log, moment_after_all(), SIGNER)
    assert len(segment_files(log)) == 4
