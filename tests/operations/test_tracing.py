"""OpenTelemetry traces: route, status and trace id, and no data of the client."""

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanContext, use_span

from backend.auth.testing import LocalIssuer
from backend.cli import main
from backend.operations import tracing
from backend.operations.log_lines import JsonLines
from backend.operations.tracing import PrivateTracerProvider
from backend.settings import Settings
from tests.conftest import Api, running

TASKS = "/api/v1/tasks"
PROGRAM = str(Path(sys.executable).with_name("resource-server"))
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def traced(settings: Settings, issuer: LocalIssuer, exporter: InMemorySpanExporter) -> Any:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with running(settings, issuer, {"tracer_provider": PrivateTracerProvider(provider), "logs": False}) as api:
        yield api


async def send_secrets(http: httpx.AsyncClient, token: str) -> list[int]:
    """Send a secret in each part of a request."""
    bearer = {"Authorization": f"Bearer {token}", "X-Secret": "s3cret", "Cookie": "s3cret=1", **PARENT}
    requests = [
        await http.get(TASKS, params={"q": "s3cret", "cursor": "s3cret"}, headers=bearer),
        await http.get(TASKS, params={"s3cret": "1"}, headers={"Authorization": "Bearer s3cret", **PARENT}),
        await http.get(f"{TASKS}/s3cret", headers=bearer),
        await http.get("/s3cret", headers=bearer),
        await http.post(TASKS, json={"title": "s3cret"}, headers=bearer),
        await http.post(TASKS, json={"title": "s3cret", "status": "s3cret"}, headers=bearer),
        await http.request("S3CRET", TASKS, headers=bearer),
    ]
    return [request.status_code for request in requests]


async def test_spans_contain_no_data_of_the_client(
    traced: Api, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = traced.person().token()
    assert await send_secrets(traced.http, token) == [422, 401, 404, 404, 201, 422, 405]

    async def fail(*_: object, **__: object) -> None:
        raise LookupError("s3cret")

    monkeypatch.setattr("backend.tasks.service.TaskService.list", fail, raising=True)
    assert (await traced.http.get(TASKS, headers={"Authorization": f"Bearer {token}"})).status_code == 500
    spans = exporter.get_finished_spans()
    exported = "".join(span.to_json() for span in spans)
    assert "s3cret" not in exported.lower()
    assert not any(part in exported for part in token.split("."))
    assert {span.name for span in spans} >= {f"GET {TASKS}", f"POST {TASKS}", "GET", "fastapi.endpoint"}


async def test_a_span_has_route_status_and_the_trace_of_the_caller(
    traced: Api, exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "backend.access")
    ada = traced.person()
    await ada.get(f"{TASKS}/019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f", headers=PARENT)
    await asyncio.sleep(0)  # the access log is written in the next iteration of the loop

    def is_first(span: ReadableSpan) -> bool:
        return span.name == f"GET {TASKS}/{{id}}"

    (span,) = filter(is_first, exporter.get_finished_spans())
    assert span.attributes is not None
    assert span.attributes["http.route"] == f"{TASKS}/{{id}}"
    assert span.attributes["http.response.status_code"] == 404
    assert f"{span.context.trace_id:032x}" == TRACE
    assert json.loads(JsonLines().format(caplog.records[-1]))["trace_id"] == TRACE


async def test_the_access_log_has_the_trace_of_another_tracer(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracer that the server added around the application."""
    monkeypatch.setattr("backend.operations.access_log.get_tracer_provider", TracerProvider)
    caplog.set_level(logging.INFO, "backend.access")
    context = SpanContext(int(TRACE, 16), 1, is_remote=True)
    with use_span(NonRecordingSpan(context)):
        await api.http.get(TASKS)
    await asyncio.sleep(0)
    assert json.loads(JsonLines().format(caplog.records[-1]))["trace_id"] == TRACE


def test_tracing_is_off_without_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    assert tracing.from_environment() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing.from_environment() is None


def test_a_missing_extra_is_named_in_one_line(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("DATABASE_URL", database_url)
    assert main(["serve", "--port", "0"]) == 1
    assert "the extra `otel`" in capsys.readouterr().err


@contextmanager
def collector() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Run an OTLP collector; yield its address and the received bytes by path."""
    received: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received[self.path] = received.get(self.path, b"") + body
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            thread.join()


async def test_a_server_exports_traces_and_metrics_to_the_collector(
    database_url: str, jwks_url: str, issuer: LocalIssuer
) -> None:
    with collector() as (endpoint, received):
        environment = {
            **os.environ,
            "DATABASE_URL": database_url,
            "BETTER_AUTH_URL": issuer.issuers[0],
            "BETTER_AUTH_JWKS_URL": jwks_url,
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_SERVICE_NAME": "tasks-api",
        }
        command = [PROGRAM, "serve", "--port", "0"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:  # noqa: ASYNC220 - nothing else runs
            assert server.stderr is not None
            for line in server.stderr:
                if listening := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                    break
            assert listening
            async with httpx.AsyncClient(base_url=listening[1], trust_env=False) as http:
                await send_secrets(http, issuer.token(sub="traced"))
            server.terminate()
            server.stderr.read()
    traces = received["/v1/traces"]
    assert b"tasks-api" in traces
    assert f"GET {TASKS}".encode() in traces
    assert b"s3cret" not in b"".join(received.values()).lower()
    assert received.keys() == {"/v1/traces", "/v1/metrics"}
