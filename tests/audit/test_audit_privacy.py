"""What is kept of a prompt's text; what happens where redactor, sink or disk fail."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from audit_samples import KEY, NEGATIVE, POLICY, PROMPT, REQUEST, SIGNER, write_gated, write_run

from safegen.audit import AuditLog, AuditOptions, GapRecord, Record, read_records, verify
from safegen.errors import AuditWriteError, UsageError

CANARY = "canary-7d1f"


def redact(text: str) -> str:
    return text.replace(CANARY, "<bird>")


def contents(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_redacted_log_keeps_what_the_redactor_leaves(tmp_path: Path) -> None:
    options = AuditOptions(redact=redact)
    with AuditLog.open(tmp_path, key=KEY, text="redacted", options=options) as log:
        gated = write_gated(log, f"a {CANARY} in a mine")
        write_run(log, f"a {CANARY} in a mine")
    assert gated.prompt is not None
    assert (gated.prompt.redacted, gated.prompt.text) == ("a <bird> in a mine", None)
    assert gated.prompt.hmac == KEY.hmac(f"a {CANARY} in a mine")
    assert CANARY.encode() not in contents(tmp_path)
    assert NEGATIVE.encode() in contents(tmp_path)
    assert verify(tmp_path).ok


def explode(text: str) -> str:
    raise ValueError(f"cannot redact {text}")


def returns_nothing(_text: str) -> Any:
    return None


@pytest.mark.parametrize("broken", [explode, returns_nothing])
def test_a_failing_redactor_drops_the_text_and_keeps_the_record(
    broken: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.DEBUG),
        AuditLog.open(tmp_path, key=KEY, text="redacted", options=AuditOptions(redact=broken)) as log,
    ):
        gated = write_gated(log, f"a {CANARY}")
    assert gated.prompt is not None
    assert (gated.prompt.redacted, gated.prompt.redaction_failed) == (None, True)
    assert CANARY.encode() not in contents(tmp_path)
    assert CANARY not in caplog.text
    assert "the text of that prompt is dropped" in caplog.text


def test_redacted_text_does_not_get_into_a_log_without_text(tmp_path: Path) -> None:
    with (
        AuditLog.open(tmp_path / "a", key=KEY, text="redacted", options=AuditOptions(redact=redact)) as redacted,
        AuditLog.open(tmp_path / "b", key=KEY) as log,
    ):
        fields: dict[str, Any] = {"error": log.failure("x", ValueError()), "prompt": redacted.prompt(PROMPT)}
        with pytest.raises(AuditWriteError, match="text of a prompt"):
            log.write("run.failed", request=REQUEST, policy=POLICY, **fields)


def test_redacted_needs_a_redactor(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a redactor"):
        AuditLog.open(tmp_path / "log", key=KEY, text="redacted")
    assert not (tmp_path / "log").exists()


def test_sinks_get_every_record_and_may_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    got: list[Record] = []

    def broken(record: Record) -> None:
        raise ConnectionError(f"not sent: {record}")

    options = AuditOptions(sinks=(broken, got.append))
    with AuditLog.open(tmp_path, key=KEY, text="full", options=options) as log:
        written = write_run(log, f"a {CANARY}")
    assert got == written
    assert "a sink raised ConnectionError" in caplog.text
    assert CANARY not in caplog.text


# Disks that fail


def test_threads_that_wait_for_the_disk_wait_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sync covers the records of all threads that wrote meanwhile."""
    import safegen.audit.linefile as module

    syncs: list[int] = []
    entered, leave = threading.Event(), threading.Event()

    def slow(fd: int) -> None:
        syncs.append(fd)
        entered.set()
        assert leave.wait(20)
        os.fsync(fd)

    with AuditLog.open(tmp_path, key=KEY) as log:
        monkeypatch.setattr(module, "_sync", slow)
        threads = [threading.Thread(target=write_gated, args=(log,)) for _ in range(8)]
        threads[0].start()
        assert entered.wait(20)
        for thread in threads[1:]:
            thread.start()
        while log.records_written < 9:  # they write while the first one waits
            time.sleep(0.001)
        leave.set()
        for thread in threads:
            thread.join()
        assert len(syncs) == 2
    assert str(verify(tmp_path)) == "1/1 segments valid, 10/10 records valid"


def test_a_sync_that_fails_loses_nothing_that_was_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safegen.audit.linefile as module

    log = AuditLog.open(tmp_path, key=KEY, options=AuditOptions(signer=SIGNER))
    kept = [write_gated(log) for _ in range(3)]

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "_sync", fail)
    failures: list[AuditWriteError] = []

    def attempt() -> None:
        try:
            write_gated(log)
        except AuditWriteError as error:
            failures.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 6
    monkeypatch.undo()
    attempt()
    assert "an earlier write failed" in str(failures[-1])
    assert [record for record in read_records(log.path) if record.kind == "gated"] == kept
    log.resume()
    log.write("audit.gap", policy=POLICY, gap=GapRecord(7, "2027-01-05T10:00:00.000Z"))
    kept.append(write_gated(log))
    log.close()
    assert [record for record in read_records(tmp_path) if record.kind == "gated"] == kept
    report = verify(tmp_path, public_keys=[SIGNER.public_key])
    assert report.ok, str(report)
    assert report.segments == 2
    assert len(report.unclosed) == 1


def test_a_disk_that_is_full_while_rotating_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safegen.audit.linefile as module

    options = AuditOptions(signer=SIGNER, max_bytes=1000)
    log = AuditLog.open(tmp_path, key=KEY, options=options)
    write_gated(log)

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_sync", fail)
    with pytest.raises(AuditWriteError, match="free space"):
        write_gated(log)
    monkeypatch.undo()
    assert verify(tmp_path).ok
    write_gated(log)  # the old segment was not touched, and the next one could be begun
    log.close()
    report = verify(tmp_path, public_keys=[SIGNER.public_key])
    assert report.ok, str(report)
    assert sum(record.kind == "gated" for record in read_records(tmp_path)) == 2


@pytest.mark.parametrize("failing", range(1, 8))
def test_a_rotation_that_fails_at_any_sync_leaves_a_log_that_verifies_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    import safegen.audit.linefile as module

    log = AuditLog.open(tmp_path, key=KEY, options=AuditOptions(signer=SIGNER, max_bytes=1000))
    kept = [write_gated(log)]
    done = 0

    def fail_once(fd: int) -> None:
        nonlocal done
        done += 1
        if done == failing:
            raise OSError(28, "No space left on device")
        os.fsync(fd)

    monkeypatch.setattr(module, "_sync", fail_once)
    try:
        kept.append(write_gated(log))
        assert done < failing
        monkeypatch.undo()
    except AuditWriteError:
        monkeypatch.undo()
        assert verify(tmp_path, public_keys=[SIGNER.public_key]).ok
        log.resume()
        kept.append(write_gated(log))
    log.close()
    report = verify(tmp_path, public_keys=[SIGNER.public_key])
    assert report.ok, str(report)
    assert [record for record in read_records(tmp_path) if record.kind == "gated"] == kept
