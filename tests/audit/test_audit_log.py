from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast

import pytest
from audit_samples import ATTEST, GATED, KEY, NEGATIVE, POLICY, PROMPT, REQUEST, child_env, write_gated, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from safegen.audit import (
    AuditLog,
    HmacKey,
    MembraneRecord,
    OutputRecord,
    PromptRecord,
    Record,
    RuntimeVersions,
    ScoreRecord,
    read_records,
    verify,
)
from safegen.audit.chain import GENESIS
from safegen.errors import AuditWriteError, UsageError


def test_a_whole_run_reads_back_as_written_and_verifies(tmp_path: Path) -> None:
    with AuditLog.open(tmp_path, key=KEY, runtime=RuntimeVersions(torch="2.6.0", diffusers="0.36.0")) as log:
        written = write_run(log)
        assert log.records_written == 7
    records = list(read_records(tmp_path))
    assert records[1:-1] == written
    assert [record.seq for record in records] == list(range(8))
    assert records[0].kind == "segment.open"
    assert records[0].prev == GENESIS
    assert records[-1].footer is not None
    assert (records[-1].footer.count, records[-1].footer.head) == (7, records[-2].hash)
    runtime = records[2].runtime
    assert runtime is not None
    assert (runtime.torch, runtime.diffusers, runtime.pid) == ("2.6.0", "0.36.0", os.getpid())
    assert runtime.model is not None
    assert str(verify(tmp_path)) == "1/1 segments valid, 8/8 records valid"


def test_the_segment_is_private_and_named_by_date_host_and_process(tmp_path: Path) -> None:
    with AuditLog.open(tmp_path, key=KEY) as log:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", log.path.parent.name)
        assert re.fullmatch(rf"[A-Za-z0-9._-]+-{os.getpid()}-[0-9a-f-]{{36}}-0001\.jsonl", log.path.name)
        assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [log.path]


@pytest.mark.parametrize("text", ["none", "full"])
def test_the_canary_is_in_no_file_unless_text_is_full(tmp_path: Path, text: Any) -> None:
    canary = "canary-7d1f"
    with AuditLog.open(tmp_path, key=KEY, text=text) as log:
        write_run(log, f"{canary} in a coal mine")
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert (canary.encode() in content) == (text == "full")
    assert (NEGATIVE.encode() in content) == (text == "full")
    assert KEY.hmac(f"{canary} in a coal mine").encode() in content


@pytest.mark.parametrize("field", ["prompt", "negative", "hits", "error"])
def test_text_that_was_not_built_by_the_log_is_refused(tmp_path: Path, field: str) -> None:
    with (
        AuditLog.open(tmp_path / "full", key=KEY, text="full") as full,
        AuditLog.open(tmp_path / "none", key=KEY) as log,
    ):
        parts: dict[str, Any] = {
            "prompt": full.prompt(PROMPT),
            "negative": full.prompt(PROMPT),
            "hits": (full.hit("nudity", "nudity", PROMPT),),
            "error": full.failure("run.failed", ValueError(PROMPT)),
        }
        fields: dict[str, Any] = {"error": log.failure("run.failed", ValueError(PROMPT)), field: parts[field]}
        with pytest.raises(AuditWriteError, match="text of a prompt"):
            log.write("run.failed", request=REQUEST, policy=POLICY, **fields)
        write_gated(log)  # a refused record is not a failed write: the log goes on, without a gap
    assert verify(tmp_path).ok
    assert PROMPT.encode() not in log.path.read_bytes()


def test_a_prompt_is_an_hmac_of_its_nfc_form(tmp_path: Path) -> None:
    with AuditLog.open(tmp_path, key=KEY) as log:
        composed, decomposed = log.prompt("Zo\u00eb"), log.prompt("Zoe\u0308")
    assert composed == PromptRecord(KEY.hmac("Zo\u00eb"), KEY.key_id, "HMAC-SHA256", 3)
    assert composed.hmac == decomposed.hmac
    assert decomposed.chars == 4
    assert HmacKey(b"another key, 16+").hmac("Zo\u00eb") != composed.hmac


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, object(), b"bytes"])
def test_values_that_are_not_finite_and_plain_are_refused(value: Any) -> None:
    with pytest.raises(AuditWriteError, match=r"ScoreRecord\.clipcos"):
        ScoreRecord(clipcos=value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "missing policy"),
        ({"policy": "strict"}, "wrong type: policy"),
        ({"policy": POLICY, "timing_ms": "fast"}, "wrong type: timing_ms"),
    ],
)
def test_incomplete_and_mistyped_records_are_refused(tmp_path: Path, fields: Any, message: str) -> None:
    with AuditLog.open(tmp_path, key=KEY) as log, pytest.raises(AuditWriteError, match=message):
        log.write("policy.removed", **fields)
    assert verify(tmp_path).ok


def test_gated_needs_a_gate_for_each_membrane_and_a_prompt_unless_there_was_none(tmp_path: Path) -> None:
    with AuditLog.open(tmp_path, key=KEY) as log:
        whole = write_gated(log)
        names = ("request", "policy", "inputs", "membranes", "hits", "verdict", "action", "attest")
        fields: dict[str, Any] = {name: getattr(whole, name) for name in names}
        with pytest.raises(AuditWriteError, match="missing prompt"):
            log.write("gated", **fields)
        fields["inputs"] = ("embeds_only",)
        log.write("gated", **fields)
        fields["membranes"] = (GATED, MembraneRecord("nudity", "nudity", "77" * 32, 1.0))
        with pytest.raises(AuditWriteError, match=r"membranes\[1\]\.permeability, membranes\[1\]\.opened"):
            log.write("gated", **fields)


numbers = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(), max_size=20)  # lone surrogates included
membranes = st.builds(
    MembraneRecord,
    rule=words,
    concept=words,
    sha256=words,
    strength=numbers,
    score=st.none() | st.builds(ScoreRecord, clipcos=numbers, token=st.none() | numbers),
    permeability=numbers,
    opened=st.booleans(),
    effect=st.none() | numbers,
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(words, st.lists(membranes, max_size=3), numbers), min_size=1, max_size=4))
def test_reading_gives_what_was_written(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    written: list[Record] = []
    with AuditLog.open(tmp_path_factory.mktemp("log"), key=KEY, text="full", durable=False) as log:
        for text, gates, timing in rows:
            written.append(
                log.write(
                    "generated",
                    request=REQUEST,
                    policy=POLICY,
                    prompt=log.prompt(text),
                    membranes=gates,
                    attest=ATTEST,
                    output=OutputRecord(n=1, sha256=(text,), seed="7"),
                    timing_ms=timing,
                )
            )
            assert written[-1].membranes == tuple(gates)
            assert written[-1].timing_ms == pytest.approx(timing, abs=5e-7)
    assert [record for record in read_records(log.path) if record.kind == "generated"] == written
    assert verify(log.path).ok


def test_threads_share_one_segment(tmp_path: Path) -> None:
    with AuditLog.open(tmp_path, key=KEY, durable=False) as log:
        threads = [threading.Thread(target=lambda: [write_gated(log) for _ in range(50)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert str(verify(tmp_path)) == "1/1 segments valid, 402/402 records valid"


def test_a_forked_child_writes_its_own_segment_even_if_the_lock_was_held(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path, key=KEY)
    write_gated(log)
    with log._lock:  # as if another thread of the parent were writing at the moment of the fork
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            write_gated(log)
            log.close()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    write_gated(log)
    log.close()
    report = verify(tmp_path)
    assert str(report) == "2/2 segments valid, 7/7 records valid"
    assert sorted(int(path.name.split("-")[-7]) for path in tmp_path.rglob("*.jsonl")) == sorted([os.getpid(), pid])


def test_a_forked_child_that_writes_nothing_leaves_the_parent_alone(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path, key=KEY)
    pid = os.fork()
    if pid == 0:
        log.close()
        os._exit(0)
    os.waitpid(pid, 0)
    write_gated(log)
    log.close()
    assert str(verify(tmp_path)) == "1/1 segments valid, 3/3 records valid"


def test_a_closed_log_refuses_and_closes_twice(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path, key=KEY)
    log.close()
    log.close()
    with pytest.raises(AuditWriteError, match="closed"):
        write_gated(log)
    assert verify(tmp_path).ok


@pytest.mark.parametrize("place", ["under a file", "in /proc"])
def test_a_directory_that_cannot_be_made_is_refused_at_open(tmp_path: Path, place: str) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("x")
    directory = blocker / "audit" if place == "under a file" else Path("/proc/safegen-audit")
    with pytest.raises(AuditWriteError, match=rf"{re.escape(str(directory))}.*cannot create.*then open the log again"):
        AuditLog.open(directory, key=KEY)
    assert list(tmp_path.iterdir()) == [blocker]


def test_wrong_arguments_are_refused_before_anything_is_created(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected text='none', text='redacted' or text='full'"):
        AuditLog.open(tmp_path / "a", key=KEY, text=cast(Any, "some"))
    with pytest.raises(UsageError, match="inside the log"):
        AuditLog.open(tmp_path / "b", key=HmacKey(b"k" * 32, tmp_path / "b" / "audit.key"))
    assert list(tmp_path.iterdir()) == []


WRITER = """
import resource, sys
from audit_samples import KEY, write_gated
from safegen.audit import AuditLog
from safegen.errors import AuditWriteError
limit = int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    log = AuditLog.open(sys.argv[1], key=KEY)
    while True:
        print(write_gated(log).seq, flush=True)
except AuditWriteError as error:
    print(error)
    if "cannot write" in str(error) and limit > 1000:
        try:
            write_gated(log)
        except AuditWriteError as again:
            print(again)
        log.close()
"""


def test_a_full_disk_raises_and_the_log_still_verifies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path), "20000"]
    done = subprocess.run(command, env=child_env(), capture_output=True, text=True, check=True, timeout=60)
    *acknowledged, first, second = done.stdout.splitlines()
    assert re.search(r"\.jsonl: cannot write the audit record: .*; .*, then open the log again$", first)
    assert second.endswith("an earlier write failed; open the log again before writing to it")
    report = verify(tmp_path)
    assert report.ok
    assert report.records == report.records_valid == len(acknowledged) + 1
    assert not report.recovered_tail
    assert len(report.unclosed) == 1


def test_a_disk_that_is_full_at_start_leaves_no_segment(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path), "100"]
    done = subprocess.run(command, env=child_env(), capture_output=True, text=True, check=True, timeout=60)
    assert "cannot write the audit record" in done.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_kill_9_loses_no_acknowledged_record(tmp_path: Path) -> None:
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        command = [sys.executable, "-c", WRITER, str(folder), "0"]
        with subprocess.Popen(command, env=child_env(), stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(5 + 7 * attempt):
                writer.stdout.readline()
            writer.kill()
            acknowledged = 5 + 7 * attempt + len(writer.stdout.read().split())
        report = verify(folder)
        assert report.ok, str(report)
        assert report.records >= acknowledged + 1  # segment.open comes before them
        assert len(report.unclosed) == 1
