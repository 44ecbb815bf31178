"""Sends the spans of a log that was written before to an OpenTelemetry collector."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from safegen._version import __version__
from safegen.audit.otel import SEMCONV, emit
from safegen.audit.read import Line
from safegen.errors import AuditError, UsageError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_BATCH = 512  # spans in one message


def exporter_to(url: str) -> SpanExporter:
    """Returns an exporter to a collector that speaks OTLP over HTTP.

    Args:
        url: Where it takes traces, such as `http://localhost:4318/v1/traces`.

    Raises:
        UsageError: The exporter is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise UsageError(
            "this needs the OTLP exporter of OpenTelemetry, which is not installed; run: pip install 'safegen[otel]'"
        ) from error
    return OTLPSpanExporter(endpoint=url)


def send(lines: Iterable[Line], exporter: SpanExporter) -> int:
    """Sends a span for each record that has one, in batches; each batch has arrived before the next is made.

    Returns:
        How many spans.

    Raises:
        AuditError: The collector did not take a batch.
    """
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExportResult

    ended: list[ReadableSpan] = []

    class Collector(SpanProcessor):  # not the SDK's own batches: a full queue drops spans
        def on_end(self, span: ReadableSpan) -> None:
            ended.append(span)

    resource = Resource.create({"service.name": "safegen", "safegen.semconv": SEMCONV})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(Collector())
    tracer, sent = provider.get_tracer("safegen", __version__), 0

    def flush() -> None:
        nonlocal sent
        if ended and exporter.export(ended) is not SpanExportResult.SUCCESS:
            raise AuditError(f"the collector did not take the spans after the first {sent}; see its message above")
        sent += len(ended)
        ended.clear()

    try:
        for line in lines:
            emit(line.values, tracer)
            if len(ended) >= _BATCH:
                flush()
        flush()
    finally:
        exporter.shutdown()
    return sent
