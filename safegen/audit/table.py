"""Records as rows of a table: for CSV, Parquet and DuckDB.

One row per record, with what people filter by in columns of its own, the membranes as a list, and the whole record as
JSON in the last column.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safegen.audit.read import Line, merged
from safegen.errors import UsageError

if TYPE_CHECKING:
    import duckdb

_BATCH = 2000  # rows in memory at a time
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

# Column: where its value stands in a record.
COLUMNS: dict[str, tuple[str, ...]] = {
    "ts": ("ts",),
    "kind": ("kind",),
    "event_id": ("event_id",),
    "request": ("request", "id"),
    "trace_id": ("request", "trace_id"),
    "policy": ("policy", "id"),
    "policy_version": ("policy", "version"),
    "policy_digest": ("policy", "digest"),
    "mode": ("policy", "mode"),
    "prompt_hmac": ("prompt", "hmac"),
    "prompt_key": ("prompt", "key_id"),
    "prompt_chars": ("prompt", "chars"),
    "prompt_text": ("prompt", "text"),
    "prompt_redacted": ("prompt", "redacted"),
    "inputs": ("inputs",),
    "decision": ("verdict", "decision"),
    "rule": ("verdict", "rule"),
    "severity": ("verdict", "severity"),
    "action": ("action", "type"),
    "enforced": ("action", "enforced"),
    "would": ("action", "would"),
    "images": ("output", "sha256"),
    "seed": ("output", "seed"),
    "calls": ("attest", "calls"),
    "timing_ms": ("timing_ms",),
    "truncated_tokens": ("truncated_tokens",),
    "error": ("error", "code"),
    "family": ("runtime", "model", "family"),
    "model": ("runtime", "model", "source"),
    "safegen": ("runtime", "safegen"),
    "pid": ("runtime", "pid"),
    "seq": ("seq",),
    "hash": ("hash",),
}
INTEGERS = ("prompt_chars", "calls", "truncated_tokens", "pid", "seq")
LISTS = ("inputs", "images")
MEMBRANE = ("rule", "concept", "sha256", "strength", "permeability", "opened", "effect")
SCORES = ("clipcos", "token", "lexical", "direction", "semantic")


def row(line: Line) -> dict[str, Any]:
    """Returns one record as a row: the columns, `membranes` (a list of flat mappings), `segment` and `record`."""
    values = {name: _at(line.values, path) for name, path in COLUMNS.items()}
    membranes = [_membrane(item) for item in line.values.get("membranes") or ()]
    return {**values, "membranes": membranes, "segment": line.file.name, "record": line.data.decode()}


def _at(values: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = values
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _membrane(item: Mapping[str, Any]) -> dict[str, Any]:
    score = item.get("score") or {}
    return {name: item.get(name) for name in MEMBRANE} | {name: score.get(name) for name in SCORES}


def _batches(lines: Iterable[Line]) -> Iterator[list[dict[str, Any]]]:
    rows = map(row, lines)
    while batch := list(islice(rows, _BATCH)):
        yield batch


def write_csv(lines: Iterable[Line], file: IO[str]) -> int:
    """Writes records as CSV; lists and membranes stand in their cells as JSON.

    Text that a spreadsheet would take for a formula gets an apostrophe in front.

    Returns:
        How many records.
    """
    table, count = csv.writer(file), 0
    table.writerow((*COLUMNS, "membranes", "segment", "record"))
    for batch in _batches(lines):
        table.writerows([_cell(value) for value in values.values()] for values in batch)
        count += len(batch)
    return count


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value


def arrow_schema() -> Any:
    """Returns the columns of the Parquet file, a `pyarrow.Schema`."""
    import pyarrow as pa

    special = {"ts": pa.timestamp("ms", tz="UTC"), "enforced": pa.bool_(), "timing_ms": pa.float64()}
    special |= dict.fromkeys(INTEGERS, pa.int64()) | dict.fromkeys(LISTS, pa.list_(pa.string()))
    fields: list[Any] = [pa.field(name, special.get(name, pa.string())) for name in COLUMNS]
    kinds = {name: pa.string() for name in ("rule", "concept", "sha256")} | {"opened": pa.bool_()}
    membrane = pa.struct([pa.field(name, kinds.get(name, pa.float64())) for name in (*MEMBRANE, *SCORES)])
    fields += [pa.field("membranes", pa.list_(membrane))]
    fields += [pa.field("segment", pa.string()), pa.field("record", pa.string())]
    return pa.schema(fields)


def write_parquet(lines: Iterable[Line], path: Path) -> int:
    """Writes records as a Parquet file (zstd), in batches.

    Returns:
        How many records.

    Raises:
        UsageError: pyarrow is not installed.
    """
    pyarrow, parquet = _library("pyarrow"), _library("pyarrow.parquet")
    schema, count = arrow_schema(), 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as file:
        for batch in _batches(lines):
            for values in batch:
                values["ts"] = _moment(values["ts"])
            file.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
            count += len(batch)
    return count


def _moment(text: str) -> Any:
    from safegen.audit.chain import parse_ts

    return parse_ts(text)


def connect(path: str | Path) -> duckdb.DuckDBPyConnection:
    """Opens a log for SQL: the table `records`, and the view `membranes` with one row per record and membrane.

    The records are read into DuckDB's memory in the order of time. Verify the log first: SQL does not.

    Args:
        path: A segment, the folder of a log, or a Parquet file that `write_parquet` wrote (which is not read into
            memory).

    Raises:
        UsageError: duckdb or pyarrow is not installed, or nothing exists at `path`.
        AuditChainError: A line is not a record.
    """
    duckdb, path = _library("duckdb"), Path(path)
    connection = duckdb.connect()
    if path.suffix == ".parquet":
        connection.read_parquet(str(path)).create_view("records")
    else:
        pyarrow, schema = _library("pyarrow"), arrow_schema()
        batches = [
            pyarrow.RecordBatch.from_pylist([{**v, "ts": _moment(v["ts"])} for v in batch], schema=schema)
            for batch in _batches(merged([path]))
        ]
        table = pyarrow.Table.from_batches(batches, schema=schema)
        connection.register("log", table)
        connection.execute("CREATE TABLE records AS SELECT * FROM log")
    kept = "ts, kind, event_id, request, prompt_hmac, policy, mode, action"
    parts = ", ".join(f"membrane.{name}" for name in (*MEMBRANE, *SCORES))
    flat = f"SELECT {kept}, unnest(membranes) AS membrane FROM records"
    connection.execute(f"CREATE VIEW membranes AS SELECT {kept}, {parts} FROM ({flat})")
    return connection


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"this needs {name.partition('.')[0]}, which is not installed; run: pip install 'safegen[audit]'"
        ) from error
