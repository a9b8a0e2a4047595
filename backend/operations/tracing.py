"""OpenTelemetry, where the standard's OTEL_* variables ask for it; no span tells what a client sent."""

import importlib.util
import os
from typing import Any

from fastapi.telemetry import TelemetryConfig
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Tracer, TracerProvider
from opentelemetry.util.types import Attributes

_ENDPOINTS = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
)

# Written by the client as it likes. The route says where it went.
PRIVATE = frozenset({"url.path", "url.query", "url.full", "http.request.method_original"})


class NotInstalled(Exception):
    """OTEL_EXPORTER_OTLP_ENDPOINT is set, and OpenTelemetry is not installed: the extra `otel` brings it."""


def is_wanted() -> bool:
    """Whether the environment names a collector. Raises NotInstalled."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not any(map(os.environ.get, _ENDPOINTS)):
        return False
    if not importlib.util.find_spec("opentelemetry.exporter"):
        raise NotInstalled(NotInstalled.__doc__)
    return True


def from_environment() -> TelemetryConfig | None:
    """What FastAPI is to trace and measure; None when nobody asks. Raises NotInstalled."""
    if not is_wanted():
        return None
    from opentelemetry.sdk.trace import TracerProvider as SDKTracerProvider

    # FastAPI adds the exporters that the environment names. Its events for a log would quote exceptions.
    return {"tracer_provider": Discreet(SDKTracerProvider()), "logs": False, "auto_configure": True}


class Discreet(TracerProvider):
    """A provider whose spans never get the attributes that a client writes."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def get_tracer(self, *names: Any, **options: Any) -> Tracer:
        return _DiscreetTracer(self._provider.get_tracer(*names, **options))

    def add_span_processor(self, processor: Any) -> None:
        """As the SDK's, for FastAPI to add an exporter."""
        self._provider.add_span_processor(processor)


class _DiscreetTracer(Tracer):
    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        *others: Any,
        **options: Any,
    ) -> Span:
        return self._tracer.start_span(name, context, kind, _public(attributes), *others, **options)

    def start_as_current_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        *others: Any,
        **options: Any,
    ) -> Any:
        return self._tracer.start_as_current_span(name, context, kind, _public(attributes), *others, **options)


def _public(attributes: Attributes) -> Attributes:
    return {name: value for name, value in (attributes or {}).items() if name not in PRIVATE}
