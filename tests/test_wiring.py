"""The effect of each setting on the whole application, and the log of requests."""

import asyncio
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest

from backend import migrations
from backend.auth.testing import LocalIssuer
from backend.cli import main
from backend.operations import access_log, health
from backend.operations.log_lines import Console, JsonLines, configure_logging
from backend.settings import Settings
from tests.conftest import Api, create_database, running

ME = "/api/v1/users/me"
TASKS = "/api/v1/tasks"
PROGRAM = str(Path(sys.executable).with_name("resource-server"))


def changed(settings: Settings, **values: Any) -> Settings:
    return settings.model_copy(update=values)


async def test_the_maximum_token_lifetime_also_bounds_stale_keys(settings: Settings, issuer: LocalIssuer) -> None:
    async with running(changed(settings, token_max_lifetime=600), issuer) as api:
        ada = api.person()
        refused = await ada.get(TASKS)
        assert (refused.status_code, refused.json()["detail"]) == (401, "The token lives longer than is accepted here.")
        accepted = {"Authorization": f"Bearer {ada.token(expires_in=600)}"}
        assert (await ada.get(TASKS, headers=accepted)).status_code == 200
        assert api.state["keys"]._cache._max_stale == 600


async def test_tokens_are_checked_against_the_configured_issuers_and_audiences(
    settings: Settings, issuer: LocalIssuer
) -> None:
    config = changed(settings, better_auth_issuers=("https://a.example",), better_auth_audiences=("tasks",))
    async with running(config, issuer) as api:
        for claims, status in (
            ({"iss": "https://a.example", "aud": "tasks"}, 200),
            ({"iss": "https://a.example"}, 401),
            ({"aud": "tasks"}, 401),
        ):
            assert (await api.person(**claims).get(TASKS)).status_code == status
        metadata = (await api.http.get("/.well-known/oauth-protected-resource")).json()
        assert metadata["authorization_servers"] == ["https://a.example"]


async def test_metadata_of_a_public_url_with_a_path_is_where_challenges_say(
    settings: Settings, issuer: LocalIssuer
) -> None:
    async with running(changed(settings, public_url="https://api.example.com/base"), issuer) as api:
        challenge = (await api.http.get(TASKS)).headers["www-authenticate"]
        address = "https://api.example.com/.well-known/oauth-protected-resource/base"
        assert f'resource_metadata="{address}"' in challenge
        found = await api.http.get(address.removeprefix("https://api.example.com"))
        assert found.json()["resource"] == "https://api.example.com/base"
        assert (await api.http.get("/.well-known/oauth-protected-resource/other")).status_code == 404


@pytest.mark.parametrize("prepare", ["on", "off"])
async def test_the_pool_follows_the_settings(settings: Settings, issuer: LocalIssuer, prepare: str) -> None:
    async with running(changed(settings, database_prepare=prepare, database_pool_size=5), issuer) as api:
        pool = api.state["pool"]
        assert pool.prepare is (prepare == "on")
        assert (pool._pool.min_size, pool._pool.max_size) == (1, 1)
        lanes = pool.lanes.readers, pool.lanes.writing.connections, pool.lanes.searching.connections
        assert [len(connections) for connections in lanes] == [1, 2, 1]


async def test_cached_users_are_bounded_in_age_and_number(api: Api) -> None:
    users = api.state["users"]
    assert (users._ttl, users._cached.maxsize) == (60, 10_000)


async def test_readiness_reports_a_schema_of_another_version(
    postgres: str, settings: Settings, issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MAX_AGE", 0)
    url = create_database(postgres, f"ready_{uuid4().hex[:8]}")
    async with running(changed(settings, database_url=url), issuer) as api:
        await api.person().get(ME)  # fetches the keys

        async def readiness() -> tuple[int, str]:
            response = await api.http.get("/readyz")
            return response.status_code, response.json()["checks"]["database"]

        assert await readiness() == (503, "not migrated")
        migrations.upgrade(url)
        assert await readiness() == (200, "ok")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
            assert await readiness() == (200, "ok")  # a newer version is being rolled out
            for other in "0000", "other":
                connection.execute("UPDATE alembic_version SET version_num = %s", (other,))
                assert await readiness() == (503, "schema revision does not match this version")
        api.state["stopping"].set()
        response = await api.http.get("/readyz")
        assert (response.status_code, response.json()["checks"]) == (503, {"process": "shutting down"})


def test_migrations_use_the_direct_url(
    postgres: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = create_database(postgres, f"direct_{uuid4().hex[:8]}")
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:9/pooler")
    monkeypatch.setenv("DATABASE_DIRECT_URL", url)
    assert main(["migrate"]) == 0
    assert migrations.head() in capsys.readouterr().err
    assert migrations.pending(url) is None


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, whose handlers and level are restored after the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:], root.level = handlers, level


@pytest.mark.parametrize(
    ("format", "terminal", "formatter"),
    [("json", True, JsonLines), ("console", False, Console), (None, True, Console), (None, False, JsonLines)],
)
def test_the_log_format_follows_the_setting_or_the_terminal(
    root_logger: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
    format: Any,
    terminal: bool,
    formatter: type[logging.Formatter],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    configure_logging("warning", format)
    assert [type(handler.formatter) for handler in root_logger.handlers] == [formatter]
    assert root_logger.level == logging.WARNING
    assert logging.getLogger("httpx").level == logging.WARNING


class Recorder(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


async def test_a_request_is_logged_alike_with_and_without_a_log_record(
    api: Api, root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LogRecord is created only if a further handler or a filter, of any logger involved, could use it."""
    ada, lines = api.person(), []
    records: list[logging.LogRecord] = []
    task = await ada.task()
    await asyncio.sleep(0)  # lines are written in the next iteration of the event loop

    def recorded(record: logging.LogRecord) -> bool:
        records.append(record)
        return True

    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    configure_logging("info", "json")
    recorder = Recorder(records)
    places: list[tuple[str, Any]] = [
        ("handlers", root_logger),
        ("handlers", logging.getLogger("backend")),
        ("handlers", access_log.access),
        ("filters", access_log.access),
        ("filters", root_logger.handlers[0]),
    ]
    for name, place in [("", None), *places]:
        with monkeypatch.context() as patch:
            if place is not None:
                patch.setattr(place, name, [*getattr(place, name), recorder if name == "handlers" else recorded])
            records.clear()
            for path in f"{TASKS}/{task['id']}", "/nowhere":
                await ada.get(path, headers={"X-Request-ID": "same"})
            await asyncio.sleep(0)
            assert [record.name for record in records] == ["backend.access"] * (0 if place is None else 2)
        written = [json.loads(line) for line in stream.getvalue().splitlines()]
        stream.seek(stream.truncate(0))
        lines.append([{**line, "time": 0, "ms": 0} for line in written])
    assert all(each == lines[0] for each in lines)
    assert [(line["logger"], line["status"], line.get("subject")) for line in lines[0]] == [
        ("backend.access", 200, ada.subject),
        ("backend.access", 404, None),
    ]
    assert all(list(line)[:4] == ["time", "level", "logger", "message"] for line in lines[0])


async def test_requests_that_end_together_are_logged_in_one_write(
    api: Api, root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(io.StringIO):
        flushes = 0

        def flush(self) -> None:
            self.flushes += 1

    monkeypatch.setattr(sys, "stderr", stream := Counted())
    configure_logging("info", "json")
    assert len(root_logger.handlers) == 1
    for number in range(3):
        await api.http.get("/nowhere", headers={"X-Request-ID": str(number)})
    assert (stream.getvalue(), stream.flushes) == ("", 0)
    await asyncio.sleep(0)
    assert [json.loads(line)["request_id"] for line in stream.getvalue().splitlines()] == ["0", "1", "2"]
    assert stream.flushes == 1
    await api.http.get("/nowhere")
    await asyncio.sleep(0)
    assert (len(stream.getvalue().splitlines()), stream.flushes) == (4, 2)


def test_a_closed_log_stream_fails_no_request(root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", stream := Closed())
    configure_logging("info", "json")
    assert len(root_logger.handlers) == 1
    access_log._write([{"status": 200}])
    assert '"status":200' in stream.getvalue()


def test_a_server_logs_one_line_per_request(database_url: str, jwks_url: str) -> None:
    """`serve` runs as in production, without uvicorn's access log and `Server` header."""
    environment = {
        **os.environ,
        "DATABASE_URL": database_url,
        "BETTER_AUTH_JWKS_URL": jwks_url,
        "LOG_FORMAT": "json",
        "PYTHONUNBUFFERED": "1",
        "DRAIN_SECONDS": "0",
    }
    command = [PROGRAM, "serve", "--port", "0"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines: list[str] = []
        for line in iter(server.stderr.readline, ""):
            lines.append(line)
            if listening := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                break
        assert listening is not None
        response = httpx.get(f"{listening[1]}/livez", headers={"X-Forwarded-For": "6.6.6.6"}, trust_env=False)
        assert response.status_code == 200
        assert "server" not in response.headers
        server.terminate()
        lines += server.stderr.readlines()
        assert server.wait() in (0, -signal.SIGTERM)
    assert "Finished server process" in lines[-1]
    (request_line,) = [line for line in lines if "/livez" in line]
    assert '"logger":"backend.access"' in request_line
    assert "6.6.6.6" not in "".join(lines)
