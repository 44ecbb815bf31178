"""What signed digests show beyond the chain: removed segments, cuts between lines, chains computed anew."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from audit_samples import KEY, SIGNER, as_objects, resealed, signed_log, write_gated, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from safegen.audit import AuditLog, AuditOptions, Digest, Signer, VerifyReport, read_records, verify
from safegen.audit.digest import digests_path, parse_digest
from safegen.audit.files import digest_files
from safegen.errors import AuditWriteError, UsageError

OTHER = Signer(bytes(range(60, 92)))
KEYS = (SIGNER.public_key,)

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a closed log of three segments, with heartbeats."""
    root = tmp_path_factory.mktemp("log")
    segments = signed_log(root)
    assert len(segments) == 3
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.jsonl")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("copy")


def check(place: Path, files: Files, **options: Any) -> VerifyReport:
    shutil.rmtree(place)
    for name, data in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return verify(place, **({"public_keys": KEYS} | options))


def names(log: Files, *, digests: bool = False) -> list[str]:
    return sorted(name for name in log if name.endswith(".digests.jsonl") == digests)


def found(report: VerifyReport) -> bool:
    """Whether a report says that something is not as it was: this log was closed, so that nothing may be uncovered."""
    return not report.ok or bool(report.recovered_tail) or report.uncovered > 0


def test_an_untouched_log_verifies(place: Path, log: Files) -> None:
    report = check(place, log)
    total = sum(log[name].count(b"\n") for name in names(log, digests=True))
    assert str(report).splitlines() == [
        f"{total}/{total} digests valid, 3/3 segments valid, 24/24 records valid",
        f"signed by {SIGNER.public_key}",
    ]
    assert (report.ok, report.uncovered, report.unsigned, report.unclosed) == (True, 0, 0, ())


@settings(max_examples=120, deadline=None)
@given(data=st.data(), flip=st.integers(1, 255))
def test_any_flipped_byte_of_any_file_is_found(place: Path, log: Files, data: st.DataObject, flip: int) -> None:
    name = data.draw(st.sampled_from(sorted(log)))
    content = bytearray(log[name])
    offset = data.draw(st.integers(0, len(content) - 1))
    content[offset] ^= flip
    report = check(place, {**log, name: bytes(content)})
    assert found(report)
    if not name.endswith(".digests.jsonl"):  # and in a segment it is named
        assert (report.faults[0].file, report.faults[0].seq) == (str(place / name), log[name][:offset].count(b"\n"))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_file_that_was_cut_short_is_found(place: Path, log: Files, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(log)))
    content = log[name]
    offset = data.draw(st.integers(0, len(content) - 1))
    report = check(place, {**log, name: content[:offset]})
    assert found(report)
    if not name.endswith(".digests.jsonl"):
        seqs = [fault.seq for fault in report.faults if fault.file == str(place / name)]
        assert content[:offset].count(b"\n") in seqs


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_lines_that_were_removed_repeated_moved_or_spliced_are_found(
    place: Path, log: Files, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(log)))
    lines = log[name].splitlines(keepends=True)
    damage = data.draw(st.sampled_from(["remove", "repeat", "swap", "splice"]))
    at = data.draw(st.integers(0, len(lines) - 1))
    if damage == "remove":
        changed = lines[:at] + lines[at + 1 :]
    elif damage == "repeat":
        changed = lines[: at + 1] + lines[at:]
    elif damage == "swap":
        to = data.draw(st.integers(0, len(lines) - 1).filter(lambda k: k != at))
        changed = list(lines)
        changed[at], changed[to] = changed[to], changed[at]
    else:
        others = [n for n in names(log, digests=name.endswith(".digests.jsonl")) if n != name]
        changed = lines[:at] + log[data.draw(st.sampled_from(others))].splitlines(keepends=True)[at:]
        if changed == lines:
            return
    report = check(place, {**log, name: b"".join(changed)})
    assert found(report)
    if not name.endswith(".digests.jsonl"):
        first = next(k for k, (a, b) in enumerate(itertools.zip_longest(lines, changed)) if a != b)
        assert min(f.seq for f in report.faults if f.file == str(place / name) and f.seq is not None) == first


@pytest.mark.parametrize("what", ["a segment", "its digests", "both"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_removed_segment_is_found(place: Path, log: Files, what: str, number: int) -> None:
    segment, digests = names(log)[number], names(log, digests=True)[number]
    gone = {"a segment": {segment}, "its digests": {digests}, "both": {segment, digests}}[what]
    report = check(place, {name: data for name, data in log.items() if name not in gone})
    assert not report.ok
    assert any("missing" in fault.message for fault in report.faults)


def test_a_chain_that_was_computed_anew_is_found_and_located(place: Path, log: Files) -> None:
    """Without the signing key: every hash is right, and the signatures are not of these records."""
    name = names(log)[0]
    objects = as_objects(log[name])
    objects[2]["verdict"]["decision"] = "clear"
    report = check(place, {**log, name: resealed(objects)})
    assert report.records_valid == report.records
    fault = report.faults[0]
    assert (fault.file, fault.seq) == (str(place / name), 1)  # digest by digest: the first covers the record before
    assert "are not those that were signed" in fault.message


def test_somebody_elses_signature_is_found_where_a_key_was_given(tmp_path: Path) -> None:
    signed_log(tmp_path, signer=OTHER)
    assert verify(tmp_path).ok
    assert verify(tmp_path).signers == (OTHER.public_key,)
    report = verify(tmp_path, public_keys=KEYS)
    assert report.digests_valid == 0
    assert "none of the keys" in report.faults[0].message
    assert verify(tmp_path, public_keys=(*KEYS, OTHER.public_key)).ok


def test_a_digest_signed_by_another_key_is_found_without_a_key_given(place: Path, log: Files) -> None:
    name = names(log, digests=True)[-1]
    lines = log[name].splitlines()
    last = parse_digest(lines[-1])
    forged = replace(last, public_key=OTHER.public_key, signature="").signed(OTHER)
    report = check(place, {**log, name: b"\n".join([*lines[:-1], forged.line, b""])}, public_keys=())
    assert not report.ok
    assert "somebody else did" in str(report)


def test_an_unsigned_log_is_a_fault_where_a_key_was_given(tmp_path: Path) -> None:
    with AuditLog.open(tmp_path, key=KEY, durable=False) as log:
        write_run(log)
    assert verify(tmp_path).ok
    assert "not signed" in str(verify(tmp_path, public_keys=KEYS))


def test_one_segment_verifies_alone_with_its_digests(place: Path, log: Files) -> None:
    check(place, log)
    path = place / names(log)[1]
    report = verify(path, public_keys=KEYS)
    assert report.ok
    assert report.digests > 1
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert "the end was cut off" in str(verify(path))


# Rotation


def test_segments_are_numbered_and_chained(place: Path, log: Files) -> None:
    check(place, log)
    records = [list(read_records(place / name)) for name in names(log)]
    promises = [found[0].segment for found in records]
    assert [promise.number for promise in promises if promise] == [1, 2, 3]
    assert len({promise.writer for promise in promises if promise}) == 1
    assert promises[1] is not None
    assert promises[1].after == records[0][-2].hash
    footers = [found[-1].footer for found in records]
    assert [footer.next for footer in footers if footer] == [names(log)[1], names(log)[2], None]


def test_a_segment_from_elsewhere_does_not_fit(place: Path, log: Files, tmp_path: Path) -> None:
    objects = as_objects(log[names(log)[1]])
    objects[0]["segment"]["after"] = "00" * 32
    report = check(place, {**log, names(log)[1]: resealed(objects)})
    assert any("does not follow the last record" in fault.message for fault in report.faults)


def test_an_old_segment_is_rotated(tmp_path: Path) -> None:
    options = AuditOptions(max_age=0.05)
    with AuditLog.open(tmp_path, key=KEY, durable=False, options=options) as log:
        first = log.path
        write_gated(log)
        time.sleep(0.06)
        write_gated(log)
        assert log.path != first
    assert str(verify(tmp_path)) == "2/2 segments valid, 6/6 records valid"


def test_rotation_under_load_leaves_no_gap(tmp_path: Path) -> None:
    options = AuditOptions(signer=SIGNER, max_bytes=20_000, heartbeat_records=7)
    with AuditLog.open(tmp_path, key=KEY, durable=True, options=options) as log:
        threads = [threading.Thread(target=lambda: [write_gated(log) for _ in range(25)]) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    report = verify(tmp_path, public_keys=KEYS)
    assert report.ok, str(report)
    assert report.segments > 4
    assert report.uncovered == 0
    assert sum(record.kind == "gated" for record in read_records(tmp_path)) == 150


# Heartbeats


def digests_of(folder: Path) -> list[Digest]:
    return [parse_digest(line) for path in digest_files(folder) for line in path.read_bytes().splitlines()]


def test_heartbeats_come_by_number_and_by_time(tmp_path: Path) -> None:
    options = AuditOptions(signer=SIGNER, heartbeat_records=4, heartbeat_seconds=3600)
    log = AuditLog.open(tmp_path / "a", key=KEY, durable=False, options=options)
    for _ in range(9):
        write_gated(log)
    assert [(d.kind, d.count) for d in digests_of(tmp_path / "a")] == [("open", 1), ("heartbeat", 5), ("heartbeat", 9)]
    report = verify(tmp_path / "a", public_keys=KEYS)
    assert (report.ok, report.uncovered) == (True, 1)
    assert "1 records are newer than the last digest" in str(report)
    log.close()
    assert [d.kind for d in digests_of(tmp_path / "a")][-2:] == ["heartbeat", "close"]
    options = AuditOptions(signer=SIGNER, heartbeat_seconds=1e-9)
    with AuditLog.open(tmp_path / "b", key=KEY, durable=False, options=options) as log:
        write_gated(log)
        write_gated(log)
    assert [d.count for d in digests_of(tmp_path / "b")] == [1, 2, 3, 4]


def test_a_cut_behind_a_heartbeat_of_an_open_log_is_found(tmp_path: Path) -> None:
    options = AuditOptions(signer=SIGNER, heartbeat_records=4)
    log = AuditLog.open(tmp_path, key=KEY, durable=False, options=options)
    for _ in range(9):
        write_gated(log)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:9]))
    assert verify(tmp_path).ok  # what no digest covers cannot be missed
    log.path.write_bytes(b"".join(lines[:6]))
    report = verify(tmp_path)
    assert report.faults[0].seq == 6
    assert "expected 9 records or more" in report.faults[0].message


def test_a_process_that_started_later_vouches_for_those_before(tmp_path: Path) -> None:
    for _ in range(3):
        signed_log(tmp_path, runs=1, max_bytes=1 << 20)
    paths = sorted(digest_files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    for path in (paths[0], *paths[0].parent.glob(paths[0].name.replace(".digests", ""))):
        path.unlink()
    report = verify(tmp_path, public_keys=KEYS)
    assert f"names {paths[0].relative_to(tmp_path)}, which is missing" in str(report)


# The anchor


def test_the_anchor_gets_every_digest_and_a_failing_one_stops_the_next_record(tmp_path: Path) -> None:
    taken: list[Digest] = []
    broken = False

    def anchor(digest: Digest) -> None:
        if broken:
            raise ConnectionError("no route")
        taken.append(digest)

    options = AuditOptions(signer=SIGNER, anchor=anchor, heartbeat_records=2)
    log = AuditLog.open(tmp_path, key=KEY, durable=False, options=options)
    write_gated(log)
    write_gated(log)
    broken = True
    write_gated(log)
    write_gated(log)  # its heartbeat is not taken
    for _ in range(2):
        with pytest.raises(AuditWriteError, match=r"the anchor did not take digest 5 .*ConnectionError: no route"):
            write_gated(log)
    broken = False
    write_gated(log)
    log.close()
    assert taken == digests_of(tmp_path)
    assert [digest.count for digest in taken] == [1, 3, 5, 6, 7]
    assert all(digest.authentic for digest in taken)


def test_an_anchor_that_fails_at_close_is_reported_and_the_file_is_closed(tmp_path: Path) -> None:
    def anchor(digest: Digest) -> None:
        if digest.kind == "close":
            raise OSError("gone")

    log = AuditLog.open(tmp_path, key=KEY, options=AuditOptions(signer=SIGNER, anchor=anchor))
    with pytest.raises(AuditWriteError, match="did not take"):
        log.close()
    assert verify(tmp_path).unclosed == ()


def test_options_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_bytes above 0, found 0"):
        AuditOptions(max_bytes=0)
    with pytest.raises(UsageError, match="needs a signer"):
        AuditLog.open(tmp_path / "log", key=KEY, options=AuditOptions(anchor=lambda digest: None))
    with pytest.raises(UsageError, match="expected 32 bytes"):
        Signer(b"short")
    inside = AuditOptions(signer=Signer(b"k" * 32, tmp_path / "log" / "audit-signing.key"))
    with pytest.raises(UsageError, match="inside the log"):
        AuditLog.open(tmp_path / "log", key=KEY, options=inside)
    assert not (tmp_path / "log").exists()


def test_digests_stand_beside_their_segment(tmp_path: Path) -> None:
    for segment in signed_log(tmp_path):
        assert digests_path(segment).is_file()
        assert digests_path(segment).stat().st_mode & 0o777 == 0o600
