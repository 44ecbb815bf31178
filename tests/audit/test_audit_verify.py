from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
import tracemalloc
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audit_samples import KEY, NEGATIVE, PROMPT, SIGNER, as_objects, child_env, resealed, sample_bytes, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from safegen.audit import (
    AuditLog,
    AuditOptions,
    RuntimeVersions,
    VerifyReport,
    digest,
    raise_for_faults,
    read_records,
    verify,
    writer,
)
from safegen.audit import segment as segment_module
from safegen.audit.chain import MAX_RECORD_BYTES, uuid7
from safegen.errors import AuditChainError, UsageError

GOLDEN = Path(__file__).parent / "golden" / "run.jsonl"
SIGNED = GOLDEN.with_name("signed")
RECORDS = 8


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """The bytes of a closed segment, and a path for damaged copies of it."""
    return sample_bytes(tmp_path_factory.mktemp("log")), tmp_path_factory.mktemp("damaged") / "copy.jsonl"


def check(segment: tuple[bytes, Path], data: bytes) -> VerifyReport:
    segment[1].write_bytes(data)
    return verify(segment[1])


def first_seq(report: VerifyReport) -> int | None:
    with pytest.raises(AuditChainError) as caught:
        raise_for_faults(report)
    return caught.value.seq


@settings(max_examples=300, deadline=None)
@given(data=st.data(), flip=st.integers(1, 255))
def test_any_flipped_byte_is_found_and_named(segment: tuple[bytes, Path], data: st.DataObject, flip: int) -> None:
    content = bytearray(segment[0])
    offset = data.draw(st.integers(0, len(content) - 1))
    content[offset] ^= flip
    report = check(segment, bytes(content))
    if offset == len(content) - 1:  # the last newline: like a process that died just before writing it
        assert report.ok
        assert report.recovered_tail
    else:
        assert first_seq(report) == segment[0][:offset].count(b"\n")


@pytest.mark.parametrize("place", range(RECORDS))
def test_a_deleted_line_is_found_unless_it_was_the_last(segment: tuple[bytes, Path], place: int) -> None:
    lines = segment[0].splitlines(keepends=True)
    report = check(segment, b"".join(lines[:place] + lines[place + 1 :]))
    if place == RECORDS - 1:
        assert report.ok
        assert report.unclosed
    else:
        assert first_seq(report) == place


@pytest.mark.parametrize("place", range(RECORDS))
def test_a_duplicated_line_is_found(segment: tuple[bytes, Path], place: int) -> None:
    lines = segment[0].splitlines(keepends=True)
    assert first_seq(check(segment, b"".join(lines[: place + 1] + lines[place:]))) == place + 1


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(range(RECORDS)))
def test_lines_out_of_order_are_found(segment: tuple[bytes, Path], order: list[int]) -> None:
    lines = segment[0].splitlines(keepends=True)
    report = check(segment, b"".join(lines[place] for place in order))
    wrong = next((place for place, found in enumerate(order) if place != found), None)
    if wrong is None:
        assert report.ok
    else:
        assert first_seq(report) == wrong


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_cut_inside_a_line_is_a_recovered_tail(segment: tuple[bytes, Path], data: st.DataObject) -> None:
    content = segment[0]
    offset = data.draw(st.integers(0, len(content) - 1))
    report = check(segment, content[:offset])
    whole = content[:offset].count(b"\n")
    assert report.records == report.records_valid == whole
    if whole == 0:
        assert first_seq(report) == 0
    else:
        assert report.ok
        assert report.unclosed == (str(segment[1]),)
        assert bool(report.recovered_tail) == (content[offset - 1 : offset] != b"\n")


def test_a_cut_between_two_lines_cannot_be_found_but_shows_as_unclosed(segment: tuple[bytes, Path]) -> None:
    lines = segment[0].splitlines(keepends=True)
    for keep in range(1, RECORDS):
        report = check(segment, b"".join(lines[:keep]))
        assert report.ok
        assert not report.recovered_tail
        assert "no footer" in str(report)


def test_two_spliced_segments_are_found(segment: tuple[bytes, Path], tmp_path: Path) -> None:
    mine, other = segment[0].splitlines(keepends=True), sample_bytes(tmp_path).splitlines(keepends=True)
    assert first_seq(check(segment, b"".join(mine[:3] + other[3:]))) == 3


Damage = Callable[[list[dict[str, Any]]], bytes]


def change(place: int, **values: Any) -> Damage:
    def apply(objects: list[dict[str, Any]]) -> bytes:
        objects[place].update(values)
        return resealed(objects)

    return apply


BACK = "2020-01-01T00:00:00.000Z"


DAMAGE: list[tuple[Damage, int, str]] = [
    (change(2, v=2), 2, "expected schema version 1, found 2; update safegen"),
    (change(2, ts="yesterday"), 2, "schema"),
    (change(2, ts=BACK), 2, "time goes back by"),
    (change(2, prompt={"hmac": 1}), 2, "prompt.hmac"),
    (change(2, policy=None), 2, "gated lacks policy"),
    (change(2, seq=True), 2, "expected seq 2"),
    (change(2, seq="2"), 2, "expected seq 2"),
    (change(2, seq=9), 2, "found 9"),
    (change(2, kind="segment.open"), 2, "segment.open"),
    (change(0, kind="gated"), 0, "segment.open"),
    (change(7, footer={"count": 6, "head": "00"}), 7, "footer: expected count 7"),
    (lambda objects: resealed(objects) + b"x", 8, "data after the footer"),
    (lambda objects: resealed([*objects, {**objects[6], "seq": 8}]), 8, "data after the footer"),
    (
        lambda objects: resealed(objects).replace(b'{"action"', b'{"action":1,"action"', 1),
        2,
        "duplicate key 'action'",
    ),
    (lambda objects: resealed(objects).replace(b":1.25,", b":1.250,", 1), 2, "not in canonical form"),
    (lambda objects: resealed(objects).replace(b":1.25,", b":NaN,", 1), 2, "NaN is not JSON"),
    (lambda objects: resealed(objects).replace(b":1.25,", b":1e999,", 1), 2, "not JSON compliant"),
    (lambda objects: resealed(objects).replace(b":1.25,", b":" + b"9" * 5000 + b",", 1), 2, "not a record"),
    (lambda objects: b"[" * 100_000 + b"\n" + resealed(objects), 0, "nested too deeply"),
    (lambda objects: b"[]\n" + resealed(objects), 0, "expected a JSON object, found list"),
    (lambda objects: b"\xff\n" + resealed(objects), 0, "not UTF-8 at byte 0"),
    (lambda objects: b"\n" + resealed(objects), 0, "not JSON"),
    (lambda objects: b"", 0, "expected a whole segment.open"),
]


@pytest.mark.parametrize(("damage", "seq", "message"), DAMAGE)
def test_each_kind_of_damage_is_named(segment: tuple[bytes, Path], damage: Damage, seq: int, message: str) -> None:
    report = check(segment, damage(as_objects(segment[0])))
    assert first_seq(report) == seq
    assert message in report.faults[0].message
    assert str(segment[1]) in str(report)
    assert report.segments_valid == 0


def test_an_untouched_copy_and_one_second_of_clock_slack_are_fine(segment: tuple[bytes, Path]) -> None:
    assert check(segment, resealed(as_objects(segment[0]))).ok
    objects = as_objects(segment[0])
    for item, second in zip(objects, itertools.cycle(("01.000", "00.000")), strict=False):
        item["ts"] = f"2027-01-05T10:00:{second}Z"
    assert check(segment, resealed(objects)).ok


def test_fields_and_kinds_of_later_versions_are_accepted(segment: tuple[bytes, Path]) -> None:
    objects = as_objects(segment[0])
    objects[2]["weather"] = {"sky": "blue"}
    objects[2]["prompt"]["tokens"] = 11
    objects[3]["kind"] = "lora.loaded"
    assert check(segment, resealed(objects)).ok
    assert [record.kind for record in read_records(segment[1])][3] == "lora.loaded"


def test_a_folder_is_checked_segment_by_segment(tmp_path: Path) -> None:
    paths: list[Path] = []
    for _ in range(3):
        with AuditLog.open(tmp_path, key=KEY, durable=False) as log:
            write_run(log)
        paths.append(log.path)
    assert str(verify(tmp_path)) == "3/3 segments valid, 24/24 records valid"
    paths[1].write_bytes(paths[1].read_bytes().replace(b'"match"', b'"clear"', 1))
    report = verify(tmp_path)
    assert str(report).startswith("2/3 segments valid, 23/24 records valid\nfault: ")
    assert [(fault.file, fault.seq, fault.line) for fault in report.faults] == [(str(paths[1]), 2, 3)]
    assert len(list(read_records(tmp_path))) == 24


def test_nothing_to_verify(tmp_path: Path) -> None:
    report = verify(tmp_path)
    assert not report.ok
    assert first_seq(report) is None
    assert "found none" in str(report)
    with pytest.raises(UsageError, match="found nothing there"):
        verify(tmp_path / "absent")
    with pytest.raises(UsageError, match="found nothing there"):
        next(read_records(tmp_path / "absent"))


def test_reading_skips_a_torn_tail_and_stops_at_a_bad_line(segment: tuple[bytes, Path]) -> None:
    segment[1].write_bytes(segment[0][:-1])
    assert len(list(read_records(segment[1]))) == RECORDS - 1
    lines = segment[0].splitlines(keepends=True)
    segment[1].write_bytes(b"".join([*lines[:3], b"{}\n"]))
    with pytest.raises(AuditChainError, match=r"copy\.jsonl:4: not a record") as caught:
        list(read_records(segment[1]))
    assert caught.value.seq == 3


def test_an_endless_line_and_endless_faults_take_constant_memory(segment: tuple[bytes, Path]) -> None:
    long_line = segment[0] + b"x" * (16 * MAX_RECORD_BYTES)
    many_faults = segment[0] + b"x\n" * 3000
    segment[1].write_bytes(long_line)
    tracemalloc.start()
    report = verify(segment[1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * MAX_RECORD_BYTES
    assert [fault.seq for fault in report.faults] == [8]
    assert "at most 1048576 bytes" in report.faults[0].message
    report = check(segment, many_faults)
    assert (report.fault_count, len(report.faults)) == (3000, 1000)
    assert str(report).endswith("… and 2000 more faults")


def test_the_golden_log_is_what_is_written_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(writer, "__version__", "0.0.0")
    monkeypatch.setattr(writer, "uuid7", lambda: f"0194-{next(ticks):04}")
    for module in (writer, digest, segment_module):
        monkeypatch.setattr(module, "utc_now", lambda: f"2027-01-05T10:00:00.{next(ticks):03}Z")
    monkeypatch.setattr(os, "getpid", lambda: 4242)  # no real process can be given a number
    monkeypatch.setattr(socket, "gethostname", lambda: "golden")
    options = AuditOptions(signer=SIGNER, heartbeat_records=3, max_bytes=2000, heartbeat_seconds=1e9)
    versions = RuntimeVersions(torch="2.6.0", diffusers="0.36.0")
    with AuditLog.open(tmp_path, key=KEY, runtime=versions, options=options) as log:
        write_run(log)
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    assert written == {path.relative_to(SIGNED): path.read_bytes() for path in SIGNED.rglob("*.jsonl")}


def test_every_golden_log_still_verifies() -> None:
    """Logs of earlier versions stay readable: `run.jsonl` was written before there were digests."""
    assert str(verify(GOLDEN)) == "1/1 segments valid, 8/8 records valid"
    report = verify(SIGNED, public_keys=[SIGNER.public_key])
    assert str(report).splitlines()[0] == "9/9 digests valid, 3/3 segments valid, 12/12 records valid"
    assert report.ok
    assert [record.kind for record in read_records(GOLDEN)][2] == "gated"
    assert [record.kind for record in read_records(SIGNED)][2] == "gated"


def test_the_golden_segment_passes_an_independent_verifier(tmp_path: Path) -> None:
    assert verify(GOLDEN).ok
    script = Path(__file__).parent / "independent_verifier.py"

    def run(path: Path, *prompts: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(script), str(path), KEY.secret.hex(), *prompts]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=child_env())

    assert run(GOLDEN, PROMPT).stdout == "1\n"
    assert run(GOLDEN, NEGATIVE).stdout == "0\n"
    assert run(sorted(SIGNED.rglob("*-0003.jsonl"))[0], PROMPT).stdout == "0\n"
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_bytes(GOLDEN.read_bytes().replace(b'"match"', b'"clear"', 1))
    assert "broken at seq 2" in run(damaged).stderr


def test_uuid7_is_of_version_7_and_sorts_by_time() -> None:
    first = uuid.UUID(uuid7())
    time.sleep(0.003)
    second = uuid.UUID(uuid7())
    assert first.version == second.version == 7
    assert first.variant == uuid.RFC_4122
    assert first < second
    assert abs((first.int >> 80) / 1000 - time.time()) < 60
