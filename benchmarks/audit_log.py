"""The audit log: how fast it is durable, what a kill and a full disk leave of it, and whether damage is found.

    python benchmarks/audit_log.py [--json] [--kills 50] [--records 10000] [--damages 40] [--seconds 2]

Rates are of records with twenty membranes (about 4 kB), four processes at once, signed digests included. The peer does
in the same minute, in turn, what a log without promises does: `json.dumps` and one write per record. Exit code 1 if a
floor is missed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from audit_log_parts.writer import KEY, SIGNER, write_record
from floors import Floor, command, finish
from rich.console import Console

from safegen.audit import AuditLog, AuditOptions, read_records, verify
from safegen.audit.files import segment_files

PROCESSES = 4
CANARY = "canary-5e1f of the benchmark"
KEYS = [SIGNER.public_key]
console = Console(stderr=True)


def _start(folder: Path, *args: object) -> subprocess.Popen[str]:
    roots = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", *map(str, args)]
    command.insert(3, str(folder))
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@dataclass(frozen=True)
class Rate:
    """Records per second of the clock, and microseconds of a processor per record, which other load does not change."""

    per_second: float
    cpu: float


def rate(folder: Path, kind: str, sync: str, records: int, threads: int) -> Rate:
    """Returns how fast four processes write at once."""
    place = Path(tempfile.mkdtemp(dir=folder))
    writers = [_start(place, "audit_log_parts.writer", kind, sync, records, threads) for _ in range(PROCESSES)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n", writer.communicate()
    results: list[dict[str, float]] = [json.loads(writer.communicate("go\n")[0]) for writer in _going(writers)]
    if kind == "log":
        report = verify(place, public_keys=KEYS)
        if not report.ok:
            raise SystemExit(f"the log does not verify: {report}")
    shutil.rmtree(place)
    span = max(one["end"] for one in results) - min(one["begin"] for one in results)
    written = sum(one["records"] for one in results)
    return Rate(written / span, 1e6 * sum(one["cpu"] for one in results) / written)


def _going(writers: list[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    return writers


def rates(folder: Path, seconds: float, repeats: int) -> dict[str, float]:
    """Returns the median rates of log and peer, measured in turn."""
    cases = {
        "durable, 1 thread each": ("durable", 250, 1),
        "durable, 8 threads each": ("durable", 600, 8),
        "no sync, 1 thread each": ("quick", 1250, 1),
    }
    found: dict[str, float] = {}
    for name, (sync, expected, threads) in cases.items():
        records = max(8, round(expected * seconds))
        measured: dict[str, list[Rate]] = {"log": [], "peer": []}
        for _ in range(repeats):
            for kind, values in measured.items():
                values.append(rate(folder, kind, sync, records, threads))
        for kind, values in measured.items():
            found[f"{kind}: {name} (records/s)"] = round(statistics.median(one.per_second for one in values), 1)
            found[f"{kind}: {name} (processor µs/record)"] = round(statistics.median(one.cpu for one in values), 1)
        console.print(f"{name}: {measured}", soft_wrap=True)
    return found


def kills(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Kills writers at random moments; counts acknowledged records that are lost, and logs that do not verify."""
    draw = random.Random(seed)
    totals = {"acknowledged": 0, "lost": 0, "logs that do not verify": 0, "recovered tails": 0, "unclosed": 0}
    for turn in range(count):
        place = folder / f"kill-{turn}"
        with _start(place, "audit_log_parts.writer", "log", "durable", 0, 1 + turn % 4) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            time.sleep(draw.uniform(0, 0.25))
            writer.kill()
            acknowledged = {first.strip(), *writer.stdout.read().split("\n")[:-1]} - {""}
        kept = {record.event_id for record in read_records(place)}
        report = verify(place, public_keys=KEYS)
        totals["acknowledged"] += len(acknowledged)
        totals["lost"] += len(acknowledged - kept)
        totals["logs that do not verify"] += not report.ok
        totals["recovered tails"] += len(report.recovered_tail)
        totals["unclosed"] += len(report.unclosed)
        if not report.ok:
            console.print(str(report), soft_wrap=True)
        shutil.rmtree(place)
    console.print(f"{count} kills: {totals}", soft_wrap=True)
    return totals


def disks(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns what became of logs on disks that refuse."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("full", "limit", "readonly"):
        place = Path(tempfile.mkdtemp(dir=folder))
        output, errors = _start(place, "audit_log_parts.disks", kind).communicate()
        if not output:
            raise SystemExit(errors)
        found[kind] = json.loads(output)
        console.print(f"{kind}: {found[kind]}", soft_wrap=True)
    return found


def long_log(folder: Path, records: int) -> Path:
    """Writes a signed log of many records in several segments; every prompt is a canary."""
    place = folder / "long"
    options = AuditOptions(signer=SIGNER, max_bytes=400 * records)  # about ten segments
    with AuditLog.open(place, key=KEY, durable=False, options=options) as log:
        for turn in range(records):
            write_record(log, turn, f"{CANARY} {turn}")
    return place


def damage(lines: list[bytes], others: list[bytes], kind: str, draw: random.Random) -> tuple[list[bytes], int]:
    """Damages the lines of a segment; returns them, and the number of the first that is not as it was."""
    at = draw.randrange(len(lines) - 1)
    if kind == "flip":
        line = bytearray(lines[at])
        line[draw.randrange(len(line))] ^= 1 << draw.randrange(8)
        return [*lines[:at], bytes(line), *lines[at + 1 :]], at
    if kind == "remove":
        return lines[:at] + lines[at + 1 :], at
    if kind == "repeat":
        return lines[: at + 1] + lines[at:], at + 1
    if kind == "reorder":
        return [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]], at
    if kind == "splice":
        return lines[:at] + others[at:], at
    return [*lines[:at], lines[at][: draw.randrange(len(lines[at]))]], at  # truncate


def damages(place: Path, count: int, seed: int) -> dict[str, int]:
    """Damages one file at a time; counts what was found, and what was located at the right record."""
    draw, segments = random.Random(seed), segment_files(place)
    kinds = ("flip", "remove", "repeat", "reorder", "splice", "truncate")
    totals = {"damages": count, "found": 0, "located": 0}
    for turn in range(count):
        file, other = draw.sample(segments, 2)
        before = file.read_bytes()
        lines, others = before.splitlines(keepends=True), other.read_bytes().splitlines(keepends=True)
        changed, first = damage(lines, others, kinds[turn % len(kinds)], draw)
        file.write_bytes(b"".join(changed))
        report = verify(place, public_keys=KEYS)
        file.write_bytes(before)
        seqs = [fault.seq for fault in report.faults if fault.file == str(file) and fault.seq is not None]
        totals["found"] += not report.ok
        totals["located"] += bool(seqs) and min(seqs) == first
    console.print(f"damage: {totals}", soft_wrap=True)
    return totals


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")] = False,
    kill_count: Annotated[int, typer.Option("--kills", min=1, help="Writers to kill.")] = 50,
    records: Annotated[int, typer.Option(min=100, help="Records of the log that is damaged.")] = 10_000,
    damage_count: Annotated[int, typer.Option("--damages", min=6, help="Damages to find.")] = 42,
    seconds: Annotated[float, typer.Option(help="About how long one measurement of a rate takes.")] = 2.0,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each rate; the median counts.")] = 3,
    seed: int = 0,
) -> None:
    """Measures, and exits with 1 if a floor is missed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = rates(folder, seconds, repeats)
        killed = kills(folder, kill_count, seed)
        refused = disks(folder)
        place = long_log(folder, records)
        started = time.perf_counter()
        report = verify(place, public_keys=KEYS)
        found["verify (records/s)"] = round(report.records / (time.perf_counter() - started), 1)
        content = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
        damaged = damages(place, damage_count, seed)
    durable, quick = "durable, 1 thread each (records/s)", "no sync, 1 thread each (records/s)"
    found["durable: log / peer"] = round(found[f"log: {durable}"] / found[f"peer: {durable}"], 3)
    found["no sync: log / peer"] = round(found[f"log: {quick}"] / found[f"peer: {quick}"], 3)
    floors = [
        Floor.at_least("durable records/s, 4 processes", found[f"log: {durable}"], 1000),
        Floor.at_least("records/s without sync, 4 processes", found[f"log: {quick}"], 5000),
        Floor.at_least("kill -9 runs", kill_count, 50),
        Floor.at_most("acknowledged records lost by kill -9", killed["lost"], 0),
        Floor.at_most("logs that do not verify after kill -9", killed["logs that do not verify"], 0),
        *(
            Floor.at_least(f"refused and verifiable: {one['how']}", _refused(one), 1)
            for one in (refused["full"], refused["limit"], refused["readonly"])
        ),
        Floor.at_least("records of the damaged log", report.records, 10_000),
        Floor.at_least("share of damages found", damaged["found"] / damage_count, 1),
        Floor.at_least("share of damages located", damaged["located"] / damage_count, 1),
        Floor.at_most("files with prompt text by default", float(CANARY.encode() in content), 0),
    ]
    result = {
        "benchmark": "The audit log",
        "command": command(__file__),
        "model": "none: records with twenty membranes",
        "peer": "json.dumps and one write per record, with fdatasync where durable",
        "processors": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "results": found | {f"kill -9: {name}": value for name, value in killed.items()},
    }
    finish(result, floors, as_json=as_json)


def _refused(found: dict[str, Any]) -> float:
    """Returns 1 where the log refused, and holds exactly what it acknowledged; else 0."""
    whole = found["kept"] == found["found"] and found["ok"]
    return float(whole and "; " in found["refused"] and "then open the log again" in found["refused"])


if __name__ == "__main__":
    typer.run(main)
