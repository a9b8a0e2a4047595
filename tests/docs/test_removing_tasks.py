"""A fork without tasks: a copy of the checkout, changed as docs/removing-tasks.md says."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import httpx
import psycopg
import pytest

from backend import migrations
from backend.auth.testing import LocalIssuer
from backend.users.security_events.schemas import EventType
from tests.conftest import create_database
from tests.web.test_server import connect
from tests.web.test_websockets import HANDSHAKE, check_echo

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/removing-tasks.md").read_text()
NOT_COPIED = shutil.ignore_patterns(".*_cache", "__pycache__", "node_modules", "results", ".next", "dist")
ME = "/api/v1/users/me"
PURGE = """
import asyncio, sys
from backend.app import app
from backend.database import Pool
from backend.resources.retention import expiring_tables, purge

async def main():
    async with Pool(sys.argv[1], size=5, prepare=True) as pool:
        print(await purge(pool), *(table.name for table in expiring_tables()))

asyncio.run(main())
"""


class Fork:
    """A copy without tasks, in which programs run as in a checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in "backend", "benchmarks", "docs", "tests":
            shutil.copytree(ROOT / part, folder / part, ignore=NOT_COPIED)
        for file in ROOT.iterdir():
            if file.is_file():
                shutil.copy(file, folder)
        numbers = {"NEXT": f"{int(migrations.head()) + 1:04}", "NEWEST": migrations.head()}
        guide = re.sub("NEXT|NEWEST", lambda match: numbers[match[0]], GUIDE)
        ((changed, diff),) = re.findall(r"^```diff (\S+)\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
        ((added, code),) = re.findall(r"^```python (\S+)\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
        removed = "".join(line[1:] for line in diff.splitlines(keepends=True))
        before = (folder / changed).read_text()
        assert removed in before
        (folder / changed).write_text(before.replace(removed, ""))
        (folder / added).write_text(code)
        shutil.rmtree(folder / "backend/tasks")

    def run(self, *command: str, **environment: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    @contextmanager
    def serving(self, **environment: str) -> Iterator[str]:
        """Run `resource-server serve` and yield its address."""
        command = [sys.executable, "-m", "backend.cli", "serve", "--port", "0", "--migrate"]
        variables = os.environ | environment | {"DRAIN_SECONDS": "0"}
        with subprocess.Popen(command, cwd=self.folder, env=variables, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            for line in server.stderr:
                if listening := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                    try:
                        yield listening[1]
                    finally:
                        server.terminate()
                        server.stderr.read()
                    return
            raise AssertionError("the server has ended")


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Fork:
    return Fork(tmp_path_factory.mktemp("fork"))


@pytest.fixture
def environment(postgres: str, jwks_url: str, issuer: LocalIssuer) -> dict[str, str]:
    url = create_database(postgres, f"fork_{uuid4().hex[:8]}")
    return {"DATABASE_URL": url, "BETTER_AUTH_URL": issuer.issuers[0], "BETTER_AUTH_JWKS_URL": jwks_url}


def test_users_and_security_events_work(fork: Fork, environment: dict[str, str], issuer: LocalIssuer) -> None:
    ada, bob = ({"Authorization": f"Bearer {issuer.token(sub=name)}"} for name in ("ada", "bob"))
    with fork.serving(**environment) as address, httpx.Client(base_url=address, trust_env=False) as http:
        assert http.get("/readyz").status_code == 200
        assert http.get("/api/v1/tasks", headers=ada).status_code == 404
        assert http.get(ME, headers=ada).json()["subject"] == "ada"
        changed = http.patch(ME, json={"time_zone": "Europe/Berlin"}, headers=ada)
        assert changed.json()["time_zone"] == "Europe/Berlin"
        exported = [json.loads(line) for line in http.get(f"{ME}/export", headers=ada).text.splitlines()]
        assert [line["kind"] for line in exported] == ["export", "users", "end"]
        assert http.delete(ME, headers=ada).status_code == 204
        assert http.get(ME, headers=bob).status_code == 200
        event = issuer.security_event("bob", EventType.account_disabled)
        answer = http.post(
            "/api/v1/security-events", content=event, headers={"Content-Type": "application/secevent+jwt"}
        )
        assert answer.status_code == 202, answer.text
        assert http.get(ME, headers=bob).json()["code"] == "account_suspended"
        tags = {tag["name"] for tag in http.get("/openapi.json").json()["tags"]}
        assert tags == {"users", "service"}


def test_the_purge_removes_what_has_expired(fork: Fork, environment: dict[str, str]) -> None:
    url = environment["DATABASE_URL"]
    fork.run(sys.executable, "-m", "backend.cli", "migrate", **environment)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO erasures (issuer, subject, roles, erased_at) VALUES ('i', 's', '{}', '2020-01-01')"
        )
    purged = fork.run(sys.executable, "-c", PURGE, url)
    assert purged.split() == ["1", "idempotency_keys", "security_events", "erasures"]


@pytest.mark.needs("websockets")
async def test_a_websocket_route_stays_open_under_serve(
    fork: Fork, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A route that is added to the application itself, as FastAPI's documentation shows it."""
    monkeypatch.setattr(fork, "folder", Path(shutil.copytree(fork.folder, tmp_path / "fork")))
    with (fork.folder / "backend/app.py").open("a") as module:
        module.write(
            "\n\n@app.websocket('/ws')\nasync def echo(websocket: WebSocket) -> None:\n    await websocket.accept()\n"
            "    async for text in websocket.iter_text():\n        await websocket.send_text(text)\n"
        )
    source = (fork.folder / "backend/app.py").read_text()
    (fork.folder / "backend/app.py").write_text(source.replace("import FastAPI", "import FastAPI, WebSocket", 1))
    server = fork.folder / "backend/web/server.py"
    server.write_text(server.read_text().replace("HEAD_SECONDS: Final = 10.0", "HEAD_SECONDS: Final = 0.2"))
    with fork.serving(**environment) as address:
        reader, writer = await connect(int(address.rpartition(":")[2]))
        writer.write(HANDSHAKE)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        for number in range(3):
            await check_echo(reader, writer, str(number))
            await asyncio.sleep(0.2)
        writer.close()


@pytest.mark.full
def test_the_tests_that_remain_pass(fork: Fork, postgres: str) -> None:
    """Of the packages of the API: the files of tests that use neither tasks nor the installed package."""
    tests = fork.folder / "tests"
    files = [
        str(file)
        for folder in ("auth", "database", "operations", "resources", "sync", "users", "web")
        for file in (tests / folder).glob("test_*.py")
        if not re.search(r"(?i)tasks|\.task\(|tests\.contract", file.read_text())
    ]
    architecture = str(tests / "test_architecture.py")
    arguments = ["-m", "not full", "-p", "no:cacheprovider", "-q", architecture, *files]
    output = fork.run(sys.executable, "-m", "pytest", *arguments, TEST_DATABASE_URL=postgres)
    assert int(re.findall(r"(\d+) passed", output)[0]) > 500
