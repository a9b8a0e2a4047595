"""`resource-server dev` starts the whole system and leaves no process, however it ends."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import httpx
import pytest

import backend
from backend import migrations
from backend.dev import DevError
from backend.dev.api_process import reason
from backend.dev.people import People
from backend.dev.up import up
from backend.settings import Settings
from tests.conftest import create_database
from tests.dev.conftest import copy_data
from tests.dev.processes import await_end, children, family

PROGRAM = Path(sys.executable).with_name("resource-server")


class Terminal:
    """Collects the lines printed at the terminal; `then` maps the start of a line to a reaction."""

    def __init__(self, **then: Callable[[str], Any]) -> None:
        self.lines: list[str] = []
        self._then = then

    def __call__(self, text: str) -> None:
        self.lines.append(text.strip())
        for start, act in self._then.items():
            if text.strip().startswith(start):
                act(text)


def run(place: Path, terminal: Terminal) -> int:
    return up(port=0, issuer_port=0, data_dir=place / "data", settings=Settings(), say=terminal)


def press_ctrl_c(_: str = "") -> None:
    os.kill(os.getpid(), signal.SIGINT)


def example_command(welcome: str) -> str:
    """The curl command in the start message."""
    found = re.search(r"Try +(curl .+)", welcome)
    assert found, welcome
    return found[1]


def tasks(welcome: str) -> str:
    """The same command for the list of tasks."""
    return example_command(welcome).replace("/users/me", "/tasks")


async def check_sign_out_revokes_the_token(api: str, issuer: str) -> None:
    """The issuer sends its security events to the API, which then rejects the token."""
    async with People(f"{issuer}/api/auth") as people, httpx.AsyncClient(trust_env=False) as client:
        session = await people.sign_up("leaving@example.com")
        bearer = {"Authorization": f"Bearer {await people.token(session)}"}
        assert (await client.get(f"{api}/api/v1/users/me", headers=bearer)).status_code == 200
        await people.sign_out(session)
        with anyio.fail_after(30):
            while (await client.get(f"{api}/api/v1/users/me", headers=bearer)).status_code != 401:
                pass


def shell(command: str, place: Path) -> str:
    """The output of a shell command."""
    done = subprocess.run(["/bin/sh", "-c", command], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def new_processes() -> Callable[[], list[Any]]:
    """The running processes that this test has started, with their descendants, without those of shared fixtures."""
    before = children(os.getpid())
    return lambda: [each for child in children(os.getpid()) if child not in before for each in family(child.pid)]


@pytest.fixture
def own_servers(no_settings: Path, postgres: str) -> Path:
    """A `.env` that names an existing database and Better Auth."""
    url = create_database(postgres, f"dev_{uuid4().hex[:8]}")
    (no_settings / ".env").write_text(f"DATABASE_URL={url}\nBETTER_AUTH_URL=http://localhost:9\n")
    return no_settings


@pytest.fixture
def used_data(place: Path, initialized_data: Path) -> Path:
    """The data directory of an earlier run."""
    copy_data(initialized_data, place / "data" / "postgres")
    return place / "data"


@pytest.fixture
def start(no_settings: Path) -> Iterator[Callable[..., tuple["subprocess.Popen[str]", str]]]:
    """Run the command in a process group of its own; return it with its start message."""
    started = []

    def run(*options: str, command: str = "dev") -> tuple["subprocess.Popen[str]", str]:
        words = [str(PROGRAM), command, "--port=0", *options]
        process = subprocess.Popen(words, cwd=no_settings, stderr=subprocess.PIPE, text=True, process_group=0)
        started.append(process)
        assert process.stderr
        said = ""
        while "Ctrl-C\n" not in said:
            line = process.stderr.readline()
            assert line, f"it ended:\n{said}"
            said += line
        return process, said

    yield run
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr
        process.stderr.close()


def stop_with_ctrl_c(process: "subprocess.Popen[str]", timeout: float = 0) -> None:
    processes = family(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, rest = process.communicate()
    assert process.returncode == 0
    assert rest.endswith("\nstopped\n")
    assert await_end(processes, timeout) == []


def test_dev_runs_the_system_and_leaves_no_process(place: Path, used_data: Path, start: Any) -> None:
    process, welcome = start("--issuer-port=0", f"--data-dir={used_data}")
    assert len(family(process.pid)) > 8
    assert '"email":"demo@example.com"' in shell(example_command(welcome), place)
    anyio.run(check_sign_out_revokes_the_token, *re.findall(r"(http://\S+:\d+) \(", welcome))
    stop_with_ctrl_c(process)


@pytest.mark.full
def test_dev_keeps_the_data_and_leaves_no_process_after_sigkill(place: Path, start: Any) -> None:
    process, welcome = start("--issuer-port=0")
    body = """-H 'Content-Type: application/json' -d '{"title": "kept"}'"""
    assert '"title":"kept"' in shell(f"{tasks(welcome)} {body}", place)
    stop_with_ctrl_c(process)
    (port,) = re.findall(r"Better Auth +http://localhost:(\d+)", welcome)
    process, welcome = start(f"--issuer-port={port}")
    assert '"title":"kept"' in shell(tasks(welcome), place)
    processes = family(process.pid)
    process.kill()
    assert await_end(processes) == []


@pytest.mark.usefixtures("used_data")
@pytest.mark.parametrize(
    ("program", "component", "elsewhere"),
    [
        pytest.param("postgres -D", "PostgreSQL", "BETTER_AUTH_URL", id="postgres", marks=pytest.mark.full),
        pytest.param("better-auth/server.ts", "the issuer", "DATABASE_URL", id="issuer", marks=pytest.mark.full),
        pytest.param("backend.cli serve", "the API", "", id="api"),
    ],
)
def test_a_crashed_component_is_named_and_the_others_stop(
    own_servers: Path, new_processes: Any, program: str, component: str, elsewhere: str
) -> None:
    place = own_servers
    servers = (place / ".env").read_text().splitlines()
    (place / ".env").write_text("\n".join(line for line in servers if not elsewhere or line.startswith(elsewhere)))
    processes: list[Any] = []

    def crash(_: str) -> None:
        processes.extend(new_processes())
        commands = {process: " ".join(process.cmdline()) for process in processes}
        next(process for process, line in commands.items() if program in line and "parent_watchdog" not in line).kill()

    terminal = Terminal(API=crash)
    assert run(place, terminal) == 1
    assert re.fullmatch(
        f"{component} ended unexpectedly \\(exit code -?\\d+\\): stopping all components", terminal.lines[-1]
    )
    assert await_end(processes, timeout=0) == []


@pytest.mark.usefixtures("no_settings")
@pytest.mark.parametrize("option", ["--port", "--issuer-port"])
def test_a_port_in_use_is_named_before_anything_starts(place: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        ports = {"port": 0, "issuer_port": 0, option.strip("-").replace("-", "_"): taken}
        with pytest.raises(DevError, match=f"^port {taken} is in use .*: choose another with {option}$"):
            up(**ports, data_dir=place / "data", settings=Settings(), say=Terminal())
    assert not (place / "data").exists()


@pytest.mark.usefixtures("no_settings", "used_data")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_start_leaves_no_process(
    place: Path, new_processes: Any, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    processes: list[Any] = []

    def migrate(_: Any) -> None:
        processes.extend(new_processes())
        os.kill(os.getpid(), number)

    monkeypatch.setattr("backend.dev.up._migrate", migrate)
    before = signal.getsignal(number)
    terminal = Terminal()
    assert run(place, terminal) == 0
    assert terminal.lines == ["stopped"]
    assert len(processes) > 4
    assert await_end(processes, timeout=0) == []
    assert signal.getsignal(number) is before


def test_servers_named_in_the_settings_are_not_started(own_servers: Path, new_processes: Any) -> None:
    def look(welcome: str) -> None:
        assert len(new_processes()) == 2, "the API and its watchdog"
        assert "http://localhost:9 (yours)" in welcome
        assert "$TOKEN" in example_command(welcome)
        press_ctrl_c()

    assert run(own_servers, Terminal(API=look)) == 0
    assert not (own_servers / "data").exists()


def test_a_failed_migration_is_reported_in_one_line(own_servers: Path) -> None:
    (own_servers / ".env").write_text("DATABASE_URL=postgresql:///?host=/nowhere\nBETTER_AUTH_URL=http://localhost:9\n")
    with pytest.raises(DevError, match=r"^the migrations failed: cannot connect to the database: .*$"):
        run(own_servers, Terminal())


class Copy:
    """A copy of the package, so that the running tests keep their sources. Steps of a test follow lines of `up`."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for part in "backend", "pyproject.toml":
            source, target = Path(backend.__file__).parents[1] / part, place / part
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        self.place = place
        self.folder = place / "backend"
        self.port = 0
        monkeypatch.setattr("backend.dev.up._PACKAGE", self.folder)
        monkeypatch.setenv("PYTHONPATH", str(place))

    def started(self, welcome: str) -> None:
        self.port = int(re.findall(r"http://127\.0\.0\.1:(\d+)", welcome)[0])

    def get(self, path: str, method: str = "GET", **options: Any) -> tuple[int, Any]:
        """The status and body of a response. A request during a start waits."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, **options)
        response = connection.getresponse()
        status, body = response.status, response.read()
        connection.close()
        return status, json.loads(body) if body else None


@pytest.fixture
def package(own_servers: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    return Copy(own_servers, monkeypatch)


def test_a_reload_fails_no_request(own_servers: Path, package: Copy) -> None:
    source = package.folder / "__init__.py"
    text = source.read_text()
    versions: list[str] = []
    clients: list[threading.Thread] = []

    def change(welcome: str) -> None:
        package.started(welcome)
        versions.append(package.get("/")[1]["version"])
        source.write_text(text.replace(backend.__version__, "9.9.9"))

    def ask(_: str) -> None:
        def await_the_new_version() -> None:
            while versions[-1] == backend.__version__:  # until the old process has stopped
                versions.append(package.get("/")[1]["version"])
            press_ctrl_c()

        clients.append(threading.Thread(target=await_the_new_version))
        clients[0].start()

    terminal = Terminal(**{"API": change, "reload:": ask})
    assert run(own_servers, terminal) == 0
    clients[0].join()
    assert set(versions) == {backend.__version__, "9.9.9"}
    assert terminal.lines.count("reload: backend/__init__.py") == 1


def test_an_api_that_cannot_start_answers_503_until_it_is_repaired(own_servers: Path, package: Copy) -> None:
    source = package.folder / "__init__.py"
    text, answers = source.read_text(), []

    def break_source(welcome: str) -> None:
        package.started(welcome)
        source.write_text("this is no Python")

    def ask(_: str) -> None:
        answers.append(package.get("/api/v1/tasks", "POST", body=b"x" * 200_000))
        answers.append(package.get("/livez", "HEAD"))
        source.write_text(text)

    def repaired(_: str) -> None:
        def await_the_api() -> None:
            while (answer := package.get("/livez"))[0] == 503:
                pass
            answers.append(answer)
            press_ctrl_c()

        if answers:
            threading.Thread(target=await_the_api).start()

    terminal = Terminal(**{"API": break_source, "the API cannot start": ask, "reload:": repaired})
    assert run(own_servers, terminal) == 0
    (refused, problem), head, (status, _) = answers
    assert (refused, head, status) == (503, (503, None), 200)
    assert problem == {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "The API cannot start: SyntaxError: invalid syntax (backend/__init__.py, line 1)",
        "code": "unavailable",
        "request_id": None,
    }


TABLE = """
from fastapi import APIRouter

from backend.resources.models import Owned

router = APIRouter()


class Gadget(Owned, table=True):
    __tablename__ = "gadgets"


@router.get("/gadgets")
async def list_gadgets() -> list[str]:
    return [Gadget.__tablename__]
"""


def test_a_new_migration_is_applied_on_reload(own_servers: Path, package: Copy) -> None:
    """A new table makes the API refuse to start until it has a migration."""
    application, details = package.folder / "app.py", []
    (package.folder / "gadgets").mkdir()

    def add_table(welcome: str) -> None:
        package.started(welcome)
        (package.folder / "gadgets/__init__.py").write_text("")
        (package.folder / "gadgets/router.py").write_text(TABLE)
        application.write_text(
            application.read_text().replace("ROUTERS = (", 'ROUTERS = (\n    "backend.gadgets.router:router",')
        )

    def add_migration(_: str) -> None:
        details.append(package.get("/gadgets")[1]["detail"])
        if len(details) > 1:  # a reload between two of the writes
            return
        command = [sys.executable, "-m", "alembic", "revision", "--autogenerate", "-m", "gadgets"]
        done = subprocess.run(command, cwd=own_servers, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

        def await_the_table() -> None:
            while (answer := package.get("/gadgets"))[0] == 503:
                pass
            details.append(answer)
            press_ctrl_c()

        threading.Thread(target=await_the_table).start()

    assert run(own_servers, Terminal(**{"API": add_table, "the API cannot start": add_migration})) == 0
    reason = "no migration for table gadgets: run `alembic revision --autogenerate -m <message>`"
    assert details[0] == f"The API cannot start: {reason}"
    assert details[-1] == (200, ["gadgets"])


ROUTER = """
from fastapi import APIRouter

from backend.users.caller import CallerRoute

router = APIRouter(route_class=CallerRoute)


@router.get("/gadgets")
async def list_gadgets() -> list[str]:
    return []
"""
COLUMN = """
from sqlmodel import SQLModel

import backend.users.models

SQLModel.metadata.tables["users"].c["body"]
"""
MIGRATION = """
from alembic import op

revision, down_revision = "9999", "{head}"


def upgrade() -> None:
    op.execute("SELECT 1 / 0")
"""


@pytest.mark.parametrize("log_format", ["json", pytest.param("console", marks=pytest.mark.full)])
def test_the_reason_of_a_failed_start_is_the_error_in_this_project(
    own_servers: Path, package: Copy, monkeypatch: pytest.MonkeyPatch, log_format: str
) -> None:
    monkeypatch.setenv("LOG_FORMAT", log_format)
    application, router = package.folder / "app.py", package.folder / "gadgets/router.py"
    migration = package.folder / "migrations/versions/9999_gadgets.py"
    reasons: list[str] = []

    def add_route_without_a_caller(_: str) -> None:
        router.parent.mkdir()
        router.with_name("__init__.py").write_text("")
        router.write_text(ROUTER)
        application.write_text(
            application.read_text().replace("ROUTERS = (", 'ROUTERS = (\n    "backend.gadgets.router:router",')
        )

    def continue_with_another_error(reason: str) -> None:
        reasons.append(reason.removeprefix("the API cannot start: "))
        if len(reasons) == 1:
            router.write_text(COLUMN)
        elif len(reasons) == 2:
            migration.write_text(MIGRATION.format(head=migrations.head()))
        else:
            press_ctrl_c()

    then = {"API": add_route_without_a_caller, "the API cannot start": continue_with_another_error}
    assert run(own_servers, Terminal(**then)) == 0
    assert reasons[0].startswith(
        "no permission in the signature of GET /gadgets (backend.gadgets.router.list_gadgets): "
    )
    assert reasons[1].startswith("KeyError: 'body' (backend/gadgets/router.py, line 6); ")
    division = "sqlalchemy.exc.DataError: (psycopg.errors.DivisionByZero) division by zero"
    assert reasons[2].startswith(f"{division} (backend/migrations/versions/9999_gadgets.py, line 8); ")
    with pytest.raises(DevError, match=f"^the migrations failed: {re.escape(division)} "):
        run(own_servers, Terminal())


def test_the_reason_of_a_group_of_errors_is_the_last_of_them() -> None:
    errors: list[Exception] = []
    try:
        int("x")
    except ValueError as error:
        errors.append(error)
    lines = "".join(traceback.format_exception(ExceptionGroup("several", errors))).splitlines()
    assert reason(lines).startswith("ValueError: invalid literal for int() with base 10: 'x' (")
    assert reason(lines[:3])
    assert reason([]) == "it wrote no error"


# Builds the web app. In the gate, the tests of its build and those in a browser cover it.
@pytest.mark.full
def test_the_web_app_is_the_issuer_and_its_pages_can_call_the_api(used_data: Path, start: Any) -> None:
    process, welcome = start("--issuer-port=0", f"--data-dir={used_data}", command="web")
    app, api = re.search(r"Open +(\S+)", welcome), re.search(r"API +(\S+)", welcome)
    assert app
    assert api
    signed_out = httpx.get(app[1], trust_env=False)
    assert (signed_out.status_code, signed_out.headers["location"]) == (307, "/sign-in")
    assert "<h1>Sign in</h1>" in httpx.get(f"{app[1]}/sign-in", trust_env=False).text
    preflight = {"Origin": app[1], "Access-Control-Request-Method": "GET"}
    allowed = httpx.options(f"{api[1]}/api/v1/tasks", headers=preflight, trust_env=False)
    assert allowed.headers["access-control-allow-origin"] == app[1]
    anyio.run(check_sign_out_revokes_the_token, api[1], app[1])
    stop_with_ctrl_c(process, timeout=20)


def test_the_web_app_with_another_issuer_is_refused(own_servers: Path) -> None:
    del own_servers
    with pytest.raises(DevError, match=r"^BETTER_AUTH_URL is set, but the web app contains its own issuer: unset it$"):
        up(port=0, issuer_port=0, data_dir=Path("data"), settings=Settings(), say=Terminal(), web=True)
