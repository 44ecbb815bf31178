"""Sample values and a complete sample run, shared by the tests of the audit layer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rfc8785

import safegen
from safegen.audit import (
    ActionRecord,
    AttestRecord,
    AuditLog,
    AuditOptions,
    HmacKey,
    MembraneRecord,
    ModelRecord,
    OutputRecord,
    PolicyRecord,
    Record,
    RequestRecord,
    ScoreRecord,
    Signer,
    VerdictRecord,
)
from safegen.audit.chain import GENESIS, record_hash
from safegen.audit.files import segment_files

KEY = HmacKey(bytes(range(32)))
PROMPT = "a portrait of Zoë, 水彩"
NEGATIVE = "blurry"
POLICY = PolicyRecord(id="strict", version="1.4.0", digest="sha256:" + "4f" * 32, mode="enforce")
MODEL = ModelRecord(family="sd1", source="/models/mini")
REQUEST = RequestRecord("req-1")
ATTEST = AttestRecord(modules_expected=48, modules_seen=48)
ATTACHED = MembraneRecord(rule="nudity", concept="nudity", sha256="77" * 32, strength=2.0)
GATED = MembraneRecord(
    rule="nudity",
    concept="nudity",
    sha256="77" * 32,
    strength=2.0,
    score=ScoreRecord(clipcos=0.4123456789, token=1.0),
    permeability=1.0,
    opened=True,
)
MATCH = VerdictRecord(decision="match", rule="nudity", severity="critical")
ERASE = ActionRecord(type="erase", enforced=True)


def write_gated(log: AuditLog, prompt: str = PROMPT) -> Record:
    return log.write(
        "gated",
        model=MODEL,
        request=REQUEST,
        policy=POLICY,
        prompt=log.prompt(prompt),
        negative=log.prompt(NEGATIVE),
        inputs=(),
        membranes=(GATED,),
        hits=(log.hit("nudity", "nudity", prompt),),
        verdict=MATCH,
        action=ERASE,
        attest=ATTEST,
        timing_ms=1.25,
    )


def write_run(log: AuditLog, prompt: str = PROMPT) -> list[Record]:
    """Writes one record of every kind that the guard writes."""
    attest = AttestRecord(modules_expected=48, modules_seen=48, calls=960)
    gate: dict[str, Any] = {"membranes": (GATED,), "hits": (log.hit("nudity", "nudity", prompt),), "verdict": MATCH}
    return [
        log.write("policy.applied", model=MODEL, policy=POLICY, membranes=(ATTACHED,), attest=ATTEST),
        write_gated(log, prompt),
        log.write(
            "generated",
            model=MODEL,
            request=REQUEST,
            policy=POLICY,
            membranes=(GATED,),
            attest=attest,
            output=OutputRecord(n=1, sha256=("ab" * 32,), seed=str(2**64 - 1)),
            timing_ms=812.0000004,
        ),
        log.write("refused", request=REQUEST, policy=POLICY, action=ActionRecord("refuse", True), **gate),
        log.write(
            "run.failed",
            request=REQUEST,
            policy=POLICY,
            error=log.failure("run.oom", MemoryError(f"while drawing {prompt}")),
        ),
        log.write("policy.removed", policy=POLICY),
    ]


def sample_bytes(folder: Path) -> bytes:
    """Returns a closed segment with eight records."""
    with AuditLog.open(folder, key=KEY, durable=False) as log:
        write_run(log)
    return log.path.read_bytes()


def as_objects(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def resealed(objects: Iterable[dict[str, Any]]) -> bytes:
    """Returns a segment whose chain is right, whatever the objects hold: what someone who recomputes it can make."""
    prev, lines = GENESIS, list[bytes]()
    for item in objects:
        if "footer" in item and item["footer"]["head"] == item["prev"]:
            item = {**item, "footer": {**item["footer"], "head": prev}}
        item = {**item, "prev": prev}
        prev = record_hash(item)
        lines.append(rfc8785.dumps({**item, "hash": prev}) + b"\n")
    return b"".join(lines)


def child_env() -> dict[str, str]:
    """Returns the environment in which a Python child finds safegen and this module."""
    roots = [str(Path(safegen.__file__).parents[1]), str(Path(__file__).parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "PYTHONDONTWRITEBYTECODE": "1"}


SIGNER = Signer(bytes(range(50, 82)))


def signed_log(folder: Path, *, runs: int = 3, **options: Any) -> list[Path]:
    """Writes a signed log of one process in several segments, closed; returns the segments in order."""
    chosen: dict[str, Any] = {"signer": SIGNER, "heartbeat_records": 3, "max_bytes": 5000} | options
    with AuditLog.open(folder, key=KEY, durable=False, options=AuditOptions(**chosen)) as log:
        for _ in range(runs):
            write_run(log)
    return segment_files(folder)
