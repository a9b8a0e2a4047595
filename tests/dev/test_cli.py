"""The commands: output, exit codes, and errors in one line."""

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import jwt
import psycopg
import pytest

from backend import __version__, migrations
from backend.app import create_app
from backend.cli import main
from backend.dev.issuer import Issuer
from backend.dev.people import demo_token
from backend.docs_pages import settings_page
from tests.conftest import ISSUER, create_database
from tests.dev.processes import await_end, family

pytestmark = pytest.mark.usefixtures("no_settings")


@pytest.fixture
def empty_database(postgres: str) -> str:
    return create_database(postgres, f"cli_{uuid4().hex[:8]}")


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on standard error."""
    return capsys.readouterr().err.splitlines()


def test_version_prints_the_version_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["dev", "--port", "70000"], "70000 is not a port"),
        (["serve", "--port", "http"], "http is not a port"),
    ],
)
def test_a_wrong_command_line_is_explained(
    capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert reason in lines(capsys)[-1]


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys, backend.cli; print({'fastapi', 'pydantic', 'sqlalchemy', 'httpx', 'uvicorn'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("command", ["dev", "serve", "migrate", "reinstate u", "doctor", "token"])
def test_a_wrong_setting_is_named_and_its_value_is_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", "mysql://user:secret@host/db")
    assert main(command.split()) == 2
    assert lines(capsys) == ["DATABASE_URL: must start with postgresql://"]


@pytest.mark.parametrize("command", ["serve", "migrate", "reinstate u"])
def test_a_missing_database_is_named(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main(command.split()) == 2
    assert [line.partition(":")[0] for line in lines(capsys)] == ["DATABASE_URL"]


@pytest.mark.parametrize("command", ["serve", "migrate", "reinstate u"])
def test_a_database_that_does_not_answer_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:secret@/db?host=/nowhere")
    assert main(command.split()) == 1
    (line,) = lines(capsys)
    assert line.startswith("cannot connect to the database: ")
    assert "secret" not in line


@pytest.mark.parametrize("command", ["serve", "reinstate u"])
def test_a_database_that_has_not_been_migrated_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, empty_database: str, command: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", empty_database)
    assert main(command.split()) == 1
    assert lines(capsys) == ["the database is empty: run `resource-server migrate`"]


def test_migrate_may_run_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, empty_database: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", empty_database)
    for _ in range(2):
        assert main(["migrate"]) == 0
        assert lines(capsys) == [f"the database is at revision {migrations.head()}"]
    assert migrations.pending(empty_database) is None


class TestReinstate:
    """`reinstate` ends a suspension made here, also when no administrator is left."""

    @pytest.fixture
    def database(self, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[psycopg.Connection]:
        monkeypatch.setenv("DATABASE_URL", database_url)
        monkeypatch.setenv("BETTER_AUTH_URL", ISSUER)
        monkeypatch.setenv("BETTER_AUTH_JWKS_URL", "http://127.0.0.1:9/jwks")
        with psycopg.connect(database_url, autocommit=True) as connection:
            yield connection

    def suspended(self, database: psycopg.Connection, change: str = "", issuer: str = ISSUER) -> tuple[str, str]:
        """Add a suspended user; return the local id and the id at Better Auth."""
        subject = uuid4().hex
        insert = "INSERT INTO users (issuer, subject, suspended_here) VALUES (%s, %s, true) RETURNING id"
        (id,) = database.execute(insert, (issuer, subject)).fetchone() or ()
        if change:
            database.execute(f"UPDATE users SET {change} WHERE id = %s".encode(), (id,))  # noqa: S608  # constant
        return str(id), subject

    def status(self, database: psycopg.Connection, id: str) -> str:
        (status,) = database.execute("SELECT status FROM users WHERE id = %s", (id,)).fetchone() or ("",)
        return str(status)

    @pytest.mark.parametrize("index", [0, 1], ids=["here", "at Better Auth"])
    def test_a_user_is_found_by_either_id(
        self, capsys: pytest.CaptureFixture[str], database: psycopg.Connection, index: int
    ) -> None:
        both = self.suspended(database)
        for _ in range(2):  # each call is recorded
            assert main(["reinstate", both[index]]) == 0
            assert lines(capsys) == [f"{both[1]} is active"]
        assert self.status(database, both[0]) == "active"
        audit = database.execute(
            "SELECT source, action, actor, user_id::text FROM audit_log WHERE subject = %s", both[1:]
        ).fetchall()
        assert audit == [("cli", "reinstate", None, both[0])] * 2

    def test_a_ban_at_better_auth_remains(
        self, capsys: pytest.CaptureFixture[str], database: psycopg.Connection
    ) -> None:
        id, subject = self.suspended(database, "banned = true")
        assert main(["reinstate", id]) == 0
        assert lines(capsys) == [f"{subject} is suspended: banned at Better Auth; unban them there"]
        assert self.status(database, id) == "suspended"

    def test_an_unknown_deleted_or_ambiguous_user_is_refused(
        self, capsys: pytest.CaptureFixture[str], database: psycopg.Connection
    ) -> None:
        purged, _ = self.suspended(database, "status = 'purged'")
        elsewhere, _ = self.suspended(database, issuer="https://elsewhere.example")
        id, _ = self.suspended(database)
        self.suspended(database, f"subject = '{id}'")
        for user, reason in {
            uuid4().hex: "is not the id of a user",
            "": "is not the id of a user",
            elsewhere: "is not the id of a user",
            purged: "was deleted at Better Auth",
            id: "is ambiguous: the local id of one user and the Better Auth id of another",
        }.items():
            assert main(["reinstate", user]) == 1
            assert lines(capsys) == [f"{user} {reason}"]
        assert self.status(database, id) == "suspended"


def test_settings_prints_no_values(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:secret@host/db")
    monkeypatch.setenv("METRICS_TOKEN", "secret")
    assert main(["settings"]) == 0
    text = capsys.readouterr().out
    assert text == settings_page()
    assert ":secret@" not in text


def test_openapi_prints_sorted_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["openapi"]) == 0
    text = capsys.readouterr().out
    document = json.loads(text)
    assert document == json.loads(json.dumps(create_app().openapi()))
    assert text == json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def test_token_prints_a_token_of_the_given_user(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, better_auth: Issuer
) -> None:
    monkeypatch.setenv("BETTER_AUTH_URL", better_auth.url)
    subjects = set()
    for _ in range(2):
        assert main(["token", "--email", "cli@example.com"]) == 0
        claims = jwt.decode(capsys.readouterr().out.strip(), options={"verify_signature": False})
        assert claims["email"] == "cli@example.com"
        subjects.add(claims["sub"])
    assert len(subjects) == 1


def test_token_without_an_issuer_names_the_command_to_start_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://localhost:{unused.getsockname()[1]}"
        monkeypatch.setenv("BETTER_AUTH_URL", url)
        assert main(["token"]) == 1
    assert lines(capsys) == [f"no issuer at {url}; start one with `make dev`"]


def test_the_exit_code_of_doctor_is_1_after_a_failed_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, better_auth: Issuer
) -> None:
    monkeypatch.setenv("BETTER_AUTH_URL", better_auth.url)
    assert main(["doctor"]) == 0
    assert "ok    keys " in capsys.readouterr().out
    monkeypatch.setenv("BETTER_AUTH_URL", f"{better_auth.url}/elsewhere")
    assert main(["doctor"]) == 1
    assert f"set BETTER_AUTH_URL to {better_auth.url}\n" in capsys.readouterr().out


def test_doctor_reads_a_token_from_standard_input_and_prints_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, better_auth: Issuer
) -> None:
    monkeypatch.setenv("BETTER_AUTH_URL", better_auth.url)
    jwt = demo_token(better_auth.base_url, "stdin@example.com")
    for arguments, given in (["--token", jwt], ""), (["--token", "-"], f"{jwt}\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        assert main(["doctor", *arguments]) == 0
        output = capsys.readouterr()
        assert "ok    signature " in output.out
        assert jwt[-20:] not in output.out + output.err
    assert main(["doctor", "--token", f"{jwt[:-30]}{'A' * 30}"]) == 1
    assert "FAIL  signature " in capsys.readouterr().out


def test_token_works_only_with_a_local_issuer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BETTER_AUTH_URL", "https://auth.example.com")
    assert main(["token"]) == 1
    (line,) = lines(capsys)
    assert "loopback" in line


def test_serve_migrates_on_request_and_its_workers_share_the_port(no_settings: Path, empty_database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [
            sys.executable,
            "-m",
            "backend.cli",
            "serve",
            "--migrate",
            "--workers=2",
            f"--fd={listener.fileno()}",
        ]
        log = no_settings / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                command,
                env={**os.environ, "DATABASE_URL": empty_database, "LOG_FORMAT": "json", "DRAIN_SECONDS": "0"},
                pass_fds=[listener.fileno()],
                stderr=errors,
            )
        try:
            host, port = listener.getsockname()
            connection = http.client.HTTPConnection(host, port, timeout=30)
            connection.request("GET", "/livez", headers={"X-Request-ID": "the-first"})
            assert connection.getresponse().status == 200
            connection.close()
            processes = family(process.pid)
            assert len(processes) >= 3
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0, log.read_text()
    assert await_end(processes) == []
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["route"] for record in records if record.get("request_id") == "the-first"] == ["/livez"]
