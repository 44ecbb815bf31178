"""One process that writes records: the log of safegen, or its peer.

    python -m audit_log_parts.writer FOLDER log|peer durable|quick RECORDS THREADS

Says `ready`, waits for a line, writes, and prints begin and end by the system's monotonic clock. With RECORDS
0 it writes without end and prints the id of each record once it is acknowledged.

The peer is what a log without promises does: `json.dumps`, one write per record, and fdatasync where it is durable.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safegen.audit import (
    ActionRecord,
    AttestRecord,
    AuditLog,
    AuditOptions,
    HmacKey,
    MembraneRecord,
    ModelRecord,
    PolicyRecord,
    Record,
    RequestRecord,
    ScoreRecord,
    Signer,
    VerdictRecord,
)

KEY = HmacKey(b"a fixed key of the benchmark ...")
SIGNER = Signer(b"a signing key of the benchmark..")
MEMBRANES = 20
PROMPT = "a photograph of a lighthouse at dusk, in the rain"


def _membranes(turn: int) -> tuple[MembraneRecord, ...]:
    """Returns the twenty membranes of a decision: one open, the others shut, all with their scores."""
    return tuple(
        MembraneRecord(
            rule=f"rule-{k}",
            concept=f"concept-{k}",
            sha256=f"{k:02x}" * 32,
            strength=1.0,
            score=ScoreRecord(lexical=float(k == turn), direction=round(0.01 * k + 0.001 * turn, 6)),
            permeability=1.0 if k == turn else 0.0,
            opened=k == turn,
        )
        for k in range(MEMBRANES)
    )


_READY = [_membranes(turn) for turn in range(MEMBRANES)]  # finished values: making them is the guard's work
_FIXED: dict[str, Any] = {
    "model": ModelRecord("sd1", "benchmark"),
    "policy": PolicyRecord("benchmark", "1.0.0", "sha256:" + "4f" * 32, "enforce"),
    "inputs": (),
    "hits": (),
    "verdict": VerdictRecord("match", "rule-0", "high"),
    "action": ActionRecord("erase", True),
    "attest": AttestRecord(48, 48),
    "truncated_tokens": 0,
}


def write_record(log: AuditLog, turn: int, prompt: str = PROMPT) -> Record:
    """Writes one `gated` record of twenty membranes, about 4 kB."""
    request, membranes = RequestRecord(f"req-{turn}"), _READY[turn % MEMBRANES]
    return log.write("gated", request=request, prompt=log.prompt(prompt), membranes=membranes, **_FIXED)


def _peer(folder: Path, *, durable: bool) -> Callable[[int], object]:
    with AuditLog.open(folder / "sample", key=KEY, durable=False) as log:
        write_record(log, 0)
    record: dict[str, Any] = json.loads(log.path.read_bytes().splitlines()[1])
    fd = os.open(folder / f"{os.getpid()}.ndjson", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    lock = threading.Lock()

    def write(turn: int) -> None:
        line = json.dumps({**record, "seq": turn}).encode() + b"\n"
        with lock:
            os.write(fd, line)
            if durable:
                os.fdatasync(fd)

    return write


def main(folder: str, kind: str, sync: str, records: str, threads: str) -> None:
    """Writes."""
    durable, count, workers = sync == "durable", int(records), int(threads)
    if kind == "peer":
        write: Callable[[int], object] = _peer(Path(folder), durable=durable)
    else:
        log = AuditLog.open(folder, key=KEY, durable=durable, options=AuditOptions(signer=SIGNER))

        write = partial(write_record, log)
        if not count:
            _write_on(log, workers)
    for turn in range(20):
        write(turn)
    print("ready", flush=True)
    sys.stdin.readline()
    begin, spent = time.monotonic(), time.process_time()
    running = [
        threading.Thread(target=lambda: [write(turn) for turn in range(count // workers)]) for _ in range(workers)
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    end, spent = time.monotonic(), time.process_time() - spent
    print(json.dumps({"begin": begin, "end": end, "cpu": spent, "records": count // workers * workers}), flush=True)


def _write_on(log: AuditLog, workers: int) -> None:
    """Writes and acknowledges until it is killed."""

    def run() -> None:
        turn = 0
        while True:
            record = write_record(log, turn)
            os.write(1, record.event_id.encode() + b"\n")  # in one piece, whatever other threads print
            turn += 1

    threads = [threading.Thread(target=run) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
