"""Records as OpenTelemetry spans and events, in the SDK's in-memory exporter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from audit_samples import KEY, PROMPT, signed_log, write_gated, write_run
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from safegen.audit import AuditLog, AuditOptions, RequestRecord
from safegen.audit.otel import ATTRIBUTES, Telemetry
from safegen.audit.otlp import send
from safegen.audit.read import merged
from safegen.errors import AuditError


@pytest.fixture
def spans() -> tuple[TracerProvider, InMemorySpanExporter]:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


def test_each_decision_and_image_is_a_span(tmp_path: Path, spans: tuple[TracerProvider, InMemorySpanExporter]) -> None:
    provider, exporter = spans
    options = AuditOptions(sinks=(Telemetry(provider.get_tracer("test")),))
    with AuditLog.open(tmp_path, key=KEY, text="full", durable=False, options=options) as log:
        records = write_run(log)
    found = exporter.get_finished_spans()
    assert [span.name for span in found] == [
        "run_guardrail strict",
        "generate_content strict",
        "run_guardrail strict",
        "run_guardrail strict",
    ]
    gated, generated, refused, failed = found
    assert gated.attributes is not None
    expected = {
        "gen_ai.operation.name": "run_guardrail",
        "gen_ai.security.guardrail.name": "safegen",
        "gen_ai.security.policy.id": "strict",
        "gen_ai.security.policy.version": "1.4.0",
        "gen_ai.security.policy.rule.id": "nudity",
        "gen_ai.security.risk.severity": "critical",
        "gen_ai.security.verdict.type": "match",
        "gen_ai.security.action.type": "erase",
        "safegen.action.enforced": True,
        "safegen.prompt.hmac": KEY.hmac(PROMPT),
        "safegen.event_id": records[1].event_id,
        "safegen.hash": records[1].hash,
        "safegen.policy.mode": "enforce",
        "gen_ai.request.model": "/models/mini",
    }
    assert expected.items() <= dict(gated.attributes).items()
    assert set(gated.attributes) <= set(ATTRIBUTES) | {"gen_ai.operation.name", "gen_ai.security.guardrail.name"}
    finding, opened = gated.events
    assert finding.name == "gen_ai.security.finding"
    assert dict(finding.attributes or {}) == {"gen_ai.security.policy.rule.id": "nudity", "safegen.concept": "nudity"}
    assert opened.name == "gen_ai.evaluation.result"
    assert (opened.attributes or {})["gen_ai.evaluation.score.value"] == 1.0
    assert (opened.attributes or {})["safegen.score.clipcos"] == pytest.approx(0.412346)
    assert (generated.attributes or {})["gen_ai.output.type"] == "image"
    assert generated.end_time is not None
    assert generated.start_time is not None
    assert (generated.end_time - generated.start_time) / 1e6 == pytest.approx(812)
    assert (refused.attributes or {})["gen_ai.security.action.type"] == "refuse"
    assert failed.status.status_code is StatusCode.ERROR
    assert (failed.attributes or {})["error.type"] == "run.oom"
    assert PROMPT not in repr(
        [(dict(span.attributes or {}), [dict(e.attributes or {}) for e in span.events]) for span in found]
    )


def test_the_hosts_span_is_the_parent(tmp_path: Path, spans: tuple[TracerProvider, InMemorySpanExporter]) -> None:
    provider, exporter = spans
    tracer = provider.get_tracer("host")
    options = AuditOptions(sinks=(Telemetry(provider.get_tracer("test")),))
    with (
        AuditLog.open(tmp_path, key=KEY, durable=False, options=options) as log,
        tracer.start_as_current_span("request") as host,
    ):
        context = host.get_span_context()
        record = write_gated(log)
        request = RequestRecord("req-2", f"{context.trace_id:032x}", f"{context.span_id:016x}")
        assert record.policy is not None
        log.write("run.failed", request=request, policy=record.policy, error=log.failure("x", ValueError()))
    by_sink, named, _ = exporter.get_finished_spans()
    for span in (by_sink, named):
        assert span.parent is not None
        assert (span.parent.span_id, span.parent.trace_id) == (context.span_id, context.trace_id)


class Refusing(InMemorySpanExporter):
    """A collector that takes nothing."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.FAILURE


def test_a_log_is_sent_afterwards_as_it_would_have_been(tmp_path: Path) -> None:
    signed_log(tmp_path, runs=150, max_bytes=1 << 20)
    exporter = InMemorySpanExporter()
    assert send(merged([tmp_path]), exporter) == 600
    found = exporter.get_finished_spans()
    assert len(found) == 600
    assert all(span.resource.attributes["service.name"] == "safegen" for span in found)
    with pytest.raises(AuditError, match="did not take the spans after the first 0"):
        send(merged([tmp_path]), Refusing())
