"""Logs as tables: CSV, Parquet and SQL say what the records say."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from audit_samples import GATED, KEY, PROMPT, signed_log, write_gated, write_run

from safegen.audit import AuditLog
from safegen.audit.read import merged
from safegen.audit.table import COLUMNS, connect, write_csv, write_parquet
from safegen.errors import UsageError


@pytest.fixture
def log(tmp_path: Path) -> Path:
    signed_log(tmp_path / "log", runs=3)
    return tmp_path / "log"


def test_parquet_holds_every_record(log: Path, tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    lines = list(merged([log]))
    assert write_parquet(merged([log]), path) == len(lines)
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    assert [json.loads(row["record"]) for row in rows] == [line.values for line in lines]
    gated = next(row for row in rows if row["kind"] == "gated")
    assert gated["ts"].isoformat(timespec="milliseconds") == json.loads(gated["record"])["ts"].replace("Z", "+00:00")
    assert (gated["decision"], gated["rule"], gated["action"], gated["enforced"]) == ("match", "nudity", "erase", True)
    assert gated["prompt_hmac"] == KEY.hmac(PROMPT)
    assert gated["prompt_text"] is None
    (membrane,) = gated["membranes"]
    assert (membrane["concept"], membrane["permeability"], membrane["opened"]) == ("nudity", 1.0, True)
    assert membrane["clipcos"] == pytest.approx(0.412346)
    generated = next(row for row in rows if row["kind"] == "generated")
    assert (generated["images"], generated["seed"]) == (["ab" * 32], str(2**64 - 1))


def test_csv_holds_every_record_and_no_formula(tmp_path: Path) -> None:
    with AuditLog.open(tmp_path, key=KEY, text="full", durable=False) as log:
        write_gated(log, '=HYPERLINK("http://x")')
        write_run(log, "a, b\nc")
    text = io.StringIO()
    count = write_csv(merged([tmp_path]), text)
    rows = list(csv.DictReader(io.StringIO(text.getvalue())))
    assert len(rows) == count == 9
    assert list(rows[0]) == [*COLUMNS, "membranes", "segment", "record"]
    assert rows[1]["prompt_text"] == '\'=HYPERLINK("http://x")'
    assert rows[3]["prompt_text"] == "a, b\nc"
    assert json.loads(rows[1]["membranes"])[0]["concept"] == "nudity"
    assert json.loads(rows[1]["record"])["prompt"]["text"] == '=HYPERLINK("http://x")'


@pytest.mark.parametrize("source", ["log", "parquet"])
def test_sql_over_a_log_or_a_parquet_file(log: Path, tmp_path: Path, source: str) -> None:
    path = log
    if source == "parquet":
        path = tmp_path / "log.parquet"
        write_parquet(merged([log]), path)
    connection = connect(path)
    found = connection.execute("SELECT kind, count(*) FROM records GROUP BY kind ORDER BY kind").fetchall()
    kinds = [line.values["kind"] for line in merged([log])]
    assert found == [(kind, kinds.count(kind)) for kind in sorted(set(kinds))]
    query = "SELECT concept, max(permeability), bool_or(opened) FROM membranes WHERE kind = 'gated' GROUP BY concept"
    assert connection.execute(query).fetchall() == [(GATED.concept, 1.0, True)]


def test_a_missing_library_is_named(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(UsageError, match=r"needs duckdb.*safegen\[audit\]"):
        connect(log)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"needs pyarrow.*safegen\[audit\]"):
        write_parquet(merged([log]), tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()
