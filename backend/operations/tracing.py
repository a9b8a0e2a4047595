"""OpenTelemetry, configured by the standard OTEL_* variables; spans contain no data chosen by clients."""

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

# Attributes chosen by the client. The route is recorded instead.
PRIVATE = frozenset({"url.path", "url.query", "url.full", "http.request.method_original"})


class NotInstalled(Exception):
    """OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry is not installed: install the extra `otel`."""


def is_wanted() -> bool:
    """Whether the environment names a collector. Raises NotInstalled."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not any(map(os.environ.get, _ENDPOINTS)):
        return False
    if not importlib.util.find_spec("opentelemetry.exporter"):
        raise NotInstalled(NotInstalled.__doc__)
    return True


def from_environment() -> TelemetryConfig | None:
    """FastAPI's telemetry configuration; None without a collector. Raises NotInstalled."""
    if not is_wanted():
        return None
    from opentelemetry.sdk.trace import TracerProvider as SDKTracerProvider

    # FastAPI adds the exporters of the environment. Its log events are off, since they would quote exceptions.
    return {"tracer_provider": PrivateTracerProvider(SDKTracerProvider()), "logs": False, "auto_configure": True}


class PrivateTracerProvider(TracerProvider):
    """A provider that removes the attributes PRIVATE from spans."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def get_tracer(self, *names: Any, **options: Any) -> Tracer:
        return _PrivateTracer(self._provider.get_tracer(*names, **options))

    def add_span_processor(self, processor: Any) -> None:
        """Pass on to the SDK; FastAPI adds its exporter here."""
        self._provider.add_span_processor(processor)


class _PrivateTracer(Tracer):
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
        return self._tracer.start_span(name, context, kind, _without_private(attributes), *others, **options)

    def start_as_current_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        *others: Any,
        **options: Any,
    ) -> Any:
        return self._tracer.start_as_current_span(name, context, kind, _without_private(attributes), *others, **options)


def _without_private(attributes: Attributes) -> Attributes:
    return {name: value for name, value in (attributes or {}).items() if name not in PRIVATE}
