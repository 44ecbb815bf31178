"""The commands that look into an audit log, on a log that a real run wrote."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow.parquet as parquet
import pytest
from cli_world import Run, World, complaint
from PIL import Image

import safegen
from safegen.audit import read_records, verify
from safegen.audit.files import segment_files

CANARY = "zanzibar"


@pytest.fixture
def log(run: Run, world: World, tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    for prompt in (f"a ghost {CANARY}", "a fox"):
        drawn = run("generate", prompt, world.host, "--steps", "1", "--out", tmp_path / "out", "--audit", folder)
        assert drawn.exit_code == 0, drawn.stderr
        assert CANARY not in drawn.stderr
    return folder


def test_no_file_holds_a_prompt(log: Path, tmp_path: Path) -> None:
    places = [log, tmp_path / "config"]
    content = b"".join(path.read_bytes() for place in places for path in place.rglob("*") if path.is_file())
    assert b"policy.applied" in content
    assert CANARY.encode() not in content


def test_tail_shows_the_last_records_of_all_processes(run: Run, log: Path) -> None:
    result = run("audit", "tail", log, "-n", "3")
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["generated", "policy.removed", "segment.close"]
    records = json.loads(run("audit", "tail", log, "-n", "100", "--json").stdout)["records"]
    assert len(records) == len(list(read_records(log))) == 12
    assert [record["ts"] for record in records] == sorted(record["ts"] for record in records)
    shown = run("audit", "tail", log, "-n", "100").stdout
    assert "no-ghosts match  erase  ghost 1.00" in shown
    assert "effect" in shown


def test_the_default_log_is_looked_into(run: Run, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEGEN_AUDIT_DIR", str(log))
    assert len(run("audit", "tail").stdout.splitlines()) == 10


def test_tail_follows_until_it_is_interrupted(log: Path) -> None:
    command = [sys.executable, "-m", "safegen", "audit", "tail", str(log), "-n", "1", "--follow", "--json"]
    env = {**os.environ, "PYTHONPATH": str(Path(safegen.__file__).parents[1])}
    # A process that was started in the background ignores interrupts, and so would its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, preexec_fn=heed, **pipes) as process:
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["kind"] == "segment.close"
            segment = segment_files(log)[-1]
            last = segment.read_bytes().splitlines(keepends=True)[-2]
            with segment.open("ab") as file:
                file.write(last)
            assert json.loads(process.stdout.readline())["kind"] == json.loads(last)["kind"]
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
        finally:
            process.kill()  # where the test failed: nothing else would end it
    assert process.returncode in (1, 130)


def test_show_finds_an_image_by_its_pixels(run: Run, log: Path, tmp_path: Path) -> None:
    picture = sorted((tmp_path / "out").glob("*.png"))[0]
    digest = hashlib.sha256(Image.open(picture).convert("RGB").tobytes()).hexdigest()
    (record,) = json.loads(run("audit", "show", digest, log, "--json").stdout)["records"]
    assert record["kind"] == "generated"
    assert record["output"]["seed"].isdigit()
    shown = run("audit", "show", record["event_id"], log)
    assert f'"event_id": "{record["event_id"]}"' in shown.stdout
    assert len(json.loads(run("audit", "show", record["request"]["id"], log, "--json").stdout)["records"]) == 2
    assert "no record of 'ffffffff'" in complaint(run("audit", "show", "ffffffff", log))
    assert "at least 8 characters" in complaint(run("audit", "show", "ff", log))


def test_find_answers_whether_a_prompt_appeared(run: Run, log: Path, tmp_path: Path) -> None:
    result = run("audit", "find", "--prompt", f"a ghost {CANARY}", log)
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["gated", "generated"]
    assert result.stderr.startswith("2 records (key ")
    assert run("audit", "find", "--prompt", "a ghost", log, "--json").stdout == '{\n "records": []\n}\n'
    other = tmp_path / "other.key"
    other.write_text("ab" * 32)
    other.chmod(0o600)
    assert run("audit", "find", "--prompt", "a fox", log, "--key", other).stdout == ""
    own = tmp_path / "config" / "safegen" / "audit.key"
    assert len(run("audit", "find", "--prompt", "a fox", log, "--key", other, "--key", own).stdout.splitlines()) == 2


def test_export_writes_the_same_records_in_each_form(run: Run, log: Path, tmp_path: Path) -> None:
    ids = [record.event_id for record in read_records(log)]
    target = tmp_path / "log.parquet"
    assert run("audit", "export", log, "--parquet", target).stderr == "12 records written\n"
    assert sorted(parquet.read_table(target)["event_id"].to_pylist()) == sorted(ids)
    assert target.stat().st_mode & 0o777 == 0o600
    text = run("audit", "export", log, "--csv", "-").stdout
    assert sorted(row["event_id"] for row in csv.DictReader(io.StringIO(text))) == sorted(ids)
    assert run("audit", "export", log, "--csv", tmp_path / "log.csv").exit_code == 0
    assert (tmp_path / "log.csv").read_text("utf-8").splitlines() == text.splitlines()
    assert "exactly one of" in complaint(run("audit", "export", log))
    assert "exactly one of" in complaint(run("audit", "export", log, "--csv", "-", "--parquet", target))
    assert "could not be written" in complaint(run("audit", "export", log, "--csv", tmp_path / "none" / "x.csv"))


def test_export_sends_spans_to_a_collector(run: Run, log: Path) -> None:
    bodies: list[bytes] = []
    status = 200

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Collector)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    assert run("audit", "export", log, "--otlp", url).stderr == "4 spans sent\n"
    assert b"run_guardrail" in b"".join(bodies)
    status = 400
    refused = run("audit", "export", log, "--otlp", url)
    assert refused.exit_code == 4
    assert "did not take the spans" in complaint(refused)
    server.shutdown()
    server.server_close()


def test_merge_joins_verified_logs_line_by_line(run: Run, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.ndjson"
    assert run("audit", "merge", log, "--out", out).stderr == "12 records written\n"
    lines = [line for file in segment_files(log) for line in file.read_bytes().splitlines()]
    assert sorted(out.read_bytes().splitlines()) == sorted(lines)
    segment = segment_files(log)[0]
    segment.write_bytes(segment.read_bytes().replace(b'"erase"', b'"allow"', 1))
    result = run("audit", "merge", log, "--out", tmp_path / "again.ndjson")
    assert result.exit_code == 4
    assert "not as it was written" in complaint(result)
    assert not (tmp_path / "again.ndjson").exists()


def test_prune_removes_what_is_old_and_says_what_the_law_may_ask(run: Run, log: Path) -> None:
    assert run("audit", "prune", log).stderr == "0 segments with 0 records removed\n"
    time.sleep(0.01)
    dry = run("audit", "prune", log, "--older-than", "0", "--dry-run")
    assert len(dry.stdout.splitlines()) == 2
    assert "warning: laws may ask for records of at least six months" in dry.stderr
    assert len(segment_files(log)) == 2
    report = json.loads(run("audit", "prune", log, "--older-than", "0", "--json").stdout)
    assert (report["records"], len(report["segments"])) == (12, 2)
    assert run("audit", "verify", log).stdout.endswith("2 segments were pruned, with a signed tombstone\n")
    assert verify(log).ok
