"""`backend.app.app` under a server that the project does not configure, and without its lifespan."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, WebSocket

from backend.app import app, create_app
from backend.auth.testing import LocalIssuer
from backend.cli import main
from backend.operations.log_lines import configure_own_logging
from backend.settings import Settings
from backend.web.start_up import LifespanNotRun

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Starlette prefers another HTTP client
    from fastapi.testclient import TestClient

ROOT = Path(__file__).parents[1]
TASKS = "/api/v1/tasks"
# `resource-server` of a fork that adds routes in a module of its own.
SERVE = "import sys, fork; from backend.cli import main; sys.exit(main(sys.argv[1:]))"


async def hello() -> str:
    return "hello"


@pytest.fixture
def environment(database_url: str, jwks_url: str, issuer: LocalIssuer) -> dict[str, str]:
    values = {
        "DATABASE_URL": database_url,
        "BETTER_AUTH_URL": issuer.issuers[0],
        "BETTER_AUTH_JWKS_URL": jwks_url,
        "DRAIN_SECONDS": "0",
    }
    return {**os.environ, **values}


@contextmanager
def uvicorn(environment: dict[str, str], *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `uvicorn backend.app:app` with its own logging. Yields its address and process."""
    command = [sys.executable, "-m", "uvicorn", "backend.app:app", "--port", "0", *options]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if listening := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                try:
                    yield listening[1], process
                finally:
                    process.terminate()
                return
        raise AssertionError("the server has ended")


def test_any_server_runs_the_application(environment: dict[str, str], issuer: LocalIssuer) -> None:
    bearer = {"Authorization": f"Bearer {issuer.token(sub='served')}"}
    with uvicorn(environment) as (address, process), httpx.Client(base_url=address, trust_env=False) as http:
        answers = [
            http.get("/livez?secret"),
            http.get(TASKS, headers=bearer),
            http.post(TASKS, json={"title": "a"}, headers=bearer),
            http.head("/openapi.json"),
        ]
        process.terminate()
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
    assert [answer.status_code for answer in answers] == [200, 200, 201, 200]
    requests = [json.loads(line) for line in lines if '"backend.access"' in line]
    assert [line["status"] for line in requests] == [200, 200, 201, 200]
    assert "secret" not in "".join(lines)
    assert not [line for line in lines if "HTTP/1.1" in line]  # uvicorn's line for a request
    assert "Finished server process" in lines[-1]


def test_invalid_settings_stop_the_start_with_one_line_each(environment: dict[str, str]) -> None:
    wrong = {"DATABASE_URL": "mysql://user:secret@host/db", "PUBLIC_URL": "ftp://example.com"}
    command = [sys.executable, "-m", "uvicorn", "backend.app:app", "--port", "0"]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, **wrong}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    assert [line.split()[-2:] for line in done.stderr.splitlines() if line.startswith("ERROR")] == [
        ["with", "postgresql://"],
        ["failed.", "Exiting."],
    ]
    assert "PUBLIC_URL: must be an http(s) address" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize("server", ["uvicorn", "serve"])
def test_an_unprotected_route_stops_the_start_with_one_line(
    tmp_path: Path, environment: dict[str, str], server: str
) -> None:
    (tmp_path / "fork.py").write_text(
        "from fastapi import APIRouter\nfrom backend.app import app\nfrom backend.users.caller import CallerRoute\n"
        "router = APIRouter(route_class=CallerRoute)\n\n@router.get('/unprotected')\nasync def unprotected(): ...\n\n"
        "app.include_router(router)\n"
    )
    commands = {
        "uvicorn": ["-m", "uvicorn", "fork:app", "--port", "0"],
        "serve": ["-c", SERVE, "serve", "--port", "0"],
    }
    done = subprocess.run(
        [sys.executable, *commands[server]],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "no permission in the signature" in line]
    assert len(lines) == 1
    assert "GET /unprotected (fork.unprotected)" in lines[0]


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("DATABASE_URL", "", "DATABASE_URL: is not set"), ("LOG_LEVEL", "loud", "LOG_LEVEL: ")],
)
async def test_the_server_gets_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)  # without an .env
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:9/nothing")
    monkeypatch.setenv(variable, value)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "lifespan", "state": {}}, receive, send)
    (message,) = sent
    assert message["type"] == "lifespan.startup.failed"
    assert message["message"].startswith(reason)
    assert len(message["message"].splitlines()) == 1


def test_another_error_at_start_up_is_raised(settings: Settings) -> None:
    @asynccontextmanager
    async def fail(app: FastAPI) -> AsyncIterator[dict[str, object]]:
        yield {"mine": app.state.missing}

    broken = create_app(settings)
    broken.include_router(APIRouter(lifespan=fail))
    with pytest.raises(AttributeError), TestClient(broken):
        pass


def test_an_import_reads_no_settings(tmp_path: Path) -> None:
    script = "from backend.app import app; import logging; print(len(app.routes) > 0, logging.getLogger().handlers)"
    wrong = {**os.environ, "DATABASE_URL": "mysql://", "LOG_LEVEL": "loud", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=wrong, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("True []\n", "")


def test_logging_that_a_server_has_configured_stays() -> None:
    """pytest has configured the root logger here."""
    logger = logging.getLogger("backend")
    before = (logger.handlers[:], logger.level, logging.getLogger("uvicorn.access").disabled)
    configure_own_logging("debug", "json")
    assert (logger.handlers, logger.level, logging.getLogger("uvicorn.access").disabled) == before


class TestWithoutLifespan:
    """A test client that is not entered, or a server with the lifespan protocol off."""

    def test_liveness_needs_none(self) -> None:
        answer = TestClient(create_app()).get("/livez")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        assert answer.headers["x-content-type-options"] == "nosniff"

    @pytest.mark.parametrize("path", ["/", "/readyz", TASKS, "/docs", "/metrics", "/nowhere", "/hello"])
    def test_a_request_raises_a_clear_error(self, path: str) -> None:
        app = create_app()
        app.add_api_route("/hello", hello)
        with pytest.raises(LifespanNotRun, match=r"with TestClient\(app\)"):
            TestClient(app).get(path)

    def test_a_server_answers_with_a_problem(self) -> None:
        answer = TestClient(create_app(), raise_server_exceptions=False).get(TASKS)
        assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")

    def test_a_websocket_raises_it_too(self) -> None:
        app = create_app()

        @app.websocket("/ws")
        async def accept(websocket: WebSocket) -> None:
            await websocket.accept()

        with pytest.raises(LifespanNotRun), TestClient(app).websocket_connect("/ws"):
            pass

    def test_it_holds_after_a_lifespan_has_ended(self, settings: Settings) -> None:
        client = TestClient(create_app(settings))
        with client:
            assert client.get("/").status_code == 200
        with pytest.raises(LifespanNotRun):
            TestClient(client.app).get("/")


def test_each_lifespan_has_its_own_settings(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Allowed hosts and origins follow the settings of the lifespan that runs."""
    for name in "DATABASE_URL", "BETTER_AUTH_JWKS_URL":
        monkeypatch.setenv(name, environment[name])
    for hosts, status in ("testserver", 200), ("api.example.com", 400), ("*", 200):
        monkeypatch.setenv("TRUSTED_HOSTS", hosts)
        with TestClient(app) as client:
            assert client.get("/livez").status_code == status


def test_commands_describe_the_application_that_servers_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fork = create_app()
    fork.add_api_route("/hello", hello)
    monkeypatch.setattr("backend.app.app", fork)
    for command in "openapi", "routes":
        assert main([command]) == 0
        assert "/hello" in capsys.readouterr().out
