"""Audit records as OpenTelemetry spans and events: the one place that knows their names.

Each decision (`gated`, `refused`) is a span `run_guardrail`, with an event `gen_ai.security.finding` for each rule that
was touched; each drawn prompt (`generated`) and each run that safegen stopped (`run.failed`) is a span too. Attributes
of the `gen_ai` namespace follow the draft of the GenAI semantic conventions that `SEMCONV` names, which is not final:
names may change here, and nowhere else. What it has no name for is in the namespace `safegen`. Prompts appear as their
HMAC only, whatever the log keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from safegen.audit.chain import parse_ts
from safegen.audit.events import Record
from safegen.audit.plain import as_dict

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer

SEMCONV = "open-telemetry/semantic-conventions-genai, pull request 427 (August 2026, draft)"
FINDING = "gen_ai.security.finding"
EVALUATION = "gen_ai.evaluation.result"
OPERATIONS = {
    "gated": "run_guardrail",
    "refused": "run_guardrail",
    "generated": "generate_content",
    "run.failed": "run_guardrail",
}

# Attribute of a span: where its value stands in a record.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "gen_ai.security.policy.id": ("policy", "id"),
    "gen_ai.security.policy.version": ("policy", "version"),
    "gen_ai.security.policy.rule.id": ("verdict", "rule"),
    "gen_ai.security.risk.severity": ("verdict", "severity"),
    "gen_ai.security.verdict.type": ("verdict", "decision"),
    "gen_ai.security.action.type": ("action", "type"),
    "gen_ai.request.model": ("runtime", "model", "source"),
    "error.type": ("error", "code"),
    "safegen.event_id": ("event_id",),
    "safegen.hash": ("hash",),
    "safegen.request.id": ("request", "id"),
    "safegen.policy.digest": ("policy", "digest"),
    "safegen.policy.mode": ("policy", "mode"),
    "safegen.action.enforced": ("action", "enforced"),
    "safegen.action.would": ("action", "would"),
    "safegen.prompt.hmac": ("prompt", "hmac"),
    "safegen.prompt.key_id": ("prompt", "key_id"),
    "safegen.prompt.chars": ("prompt", "chars"),
    "safegen.truncated_tokens": ("truncated_tokens",),
    "safegen.inputs": ("inputs",),
    "safegen.output.sha256": ("output", "sha256"),
    "safegen.output.seed": ("output", "seed"),
    "safegen.attest.calls": ("attest", "calls"),
    "safegen.version": ("runtime", "safegen"),
    "safegen.model.family": ("runtime", "model", "family"),
}
# Attribute of the event of one membrane: its field.
MEMBRANE: dict[str, str] = {
    "safegen.rule": "rule",
    "safegen.concept": "concept",
    "safegen.membrane.sha256": "sha256",
    "safegen.strength": "strength",
    "safegen.permeability": "permeability",
    "safegen.effect": "effect",
}


def emit(record: Mapping[str, Any], tracer: Tracer) -> bool:
    """Emits the span of one record, as plain values; the span that the record names, if any, is its parent.

    Returns:
        Whether the record has a span: those that open, close and apply have none.
    """
    from opentelemetry.trace import SpanKind, Status, StatusCode

    operation = OPERATIONS.get(record["kind"])
    if operation is None:
        return False
    end = parse_ts(record["ts"])
    start = end - timedelta(milliseconds=float(record.get("timing_ms") or 0))
    policy = str((record.get("policy") or {}).get("id", ""))
    name = f"{operation} {policy}".strip()
    span = tracer.start_span(name, _context(record), SpanKind.INTERNAL, start_time=_nanoseconds(start))
    span.set_attribute("gen_ai.operation.name", operation)
    span.set_attribute("gen_ai.security.guardrail.name", "safegen")
    if record["kind"] == "generated":
        span.set_attribute("gen_ai.output.type", "image")
    span.set_attributes(_found(record, ATTRIBUTES))
    for name, values in _events(record):
        span.add_event(name, values, timestamp=_nanoseconds(end))
    if record["kind"] == "run.failed":
        span.set_status(Status(StatusCode.ERROR))
    span.end(end_time=_nanoseconds(end))
    return True


def _context(record: Mapping[str, Any]) -> Context | None:
    """Returns the context of the host's span that the record was written in."""
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    request = record.get("request") or {}
    if not request.get("trace_id"):
        return None
    parent = SpanContext(
        int(request["trace_id"], 16), int(request["span_id"], 16), True, TraceFlags(TraceFlags.SAMPLED)
    )
    return set_span_in_context(NonRecordingSpan(parent))


class Telemetry:
    """A sink of `AuditOptions` that emits each record's span as it is written, below the host's current span."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        """Takes a tracer; by default that of the provider which the host has set up.

        Raises:
            UsageError: OpenTelemetry is not installed.
        """
        self._tracer = tracer or _tracer()

    def __call__(self, record: Record) -> None:
        """Emits the span of one record."""
        emit(as_dict(record), self._tracer)


def _tracer() -> Tracer:
    from safegen._version import __version__
    from safegen.errors import UsageError

    try:
        from opentelemetry.trace import get_tracer
    except ImportError as error:
        raise UsageError(
            "this needs OpenTelemetry, which is not installed; run: pip install 'safegen[otel]'"
        ) from error
    return get_tracer("safegen", __version__)


def _found(values: Mapping[str, Any], places: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attribute, path in places.items():
        value: Any = values
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            found[attribute] = value
    return found


def _events(record: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns an event for each rule that the words touch, and one for each membrane that opened."""
    events: list[tuple[str, dict[str, Any]]] = []
    if record["kind"] in ("gated", "refused"):
        for hit in record.get("hits") or ():
            events.append((FINDING, {"gen_ai.security.policy.rule.id": hit["rule"], "safegen.concept": hit["concept"]}))
    for membrane in record.get("membranes") or ():
        if membrane.get("opened") or membrane.get("permeability"):
            values = {name: membrane[field] for name, field in MEMBRANE.items() if membrane.get(field) is not None}
            values |= {f"safegen.score.{name}": value for name, value in (membrane.get("score") or {}).items()}
            score = {"gen_ai.evaluation.name": membrane["concept"]}
            score["gen_ai.evaluation.score.value"] = float(membrane.get("permeability") or 0)
            events.append((EVALUATION, score | values))
    return events


def _nanoseconds(when: datetime) -> int:
    return round(when.timestamp() * 1000) * 1_000_000
