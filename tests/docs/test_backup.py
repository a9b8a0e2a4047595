"""Backup and restore with the commands of docs/run-in-production.md."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from backend import migrations
from backend.dev import postgres_binaries
from backend.dev.postgres import EmbeddedPostgresError
from tests.conftest import create_database
from tests.database.test_migrations import as_login

GUIDE = (Path(__file__).parents[2] / "docs/run-in-production.md").read_text()


def run(program: str, url: str, dump: Path) -> subprocess.CompletedProcess[str]:
    """Run the guide's command of this name with another database and another file."""
    (line,) = re.findall(rf"^{program} .+$", GUIDE, re.MULTILINE)
    command = shlex.split(re.sub(r"postgresql://\S+(?=\")", url, line).replace("api.dump", str(dump)))
    try:
        command[0] = str(postgres_binaries.installed() / program)
    except EmbeddedPostgresError:
        command[0] = str(shutil.which(program))
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def owner(postgres: str, database_url: str) -> str:
    """The URL of a database for the login that owns it, created as in the guide."""
    assert database_url  # its migration has created the roles
    login = f"owner_{uuid4().hex[:8]}"
    url = create_database(postgres, login)
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in (
            f"CREATE ROLE {login} LOGIN",
            f"ALTER DATABASE {login} OWNER TO {login}",
            f"GRANT api_user, api_system TO {login} WITH INHERIT FALSE, SET TRUE",
        ):
            connection.execute(statement.encode())
    migrations.upgrade(as_login(url, login))
    return as_login(url, login)


def test_only_the_backup_login_can_make_a_complete_dump(owner: str, postgres: str, tmp_path: Path) -> None:
    backup = f"backup_{uuid4().hex[:8]}"
    (make,) = re.findall(r"^CREATE ROLE backup (.+) PASSWORD '...' (.+);$", GUIDE, re.MULTILINE)
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {backup} {make[0]} {make[1]}".encode())
    with psycopg.connect(owner) as connection:
        connection.execute("SET LOCAL ROLE api_system")
        connection.execute("INSERT INTO users (issuer, subject) VALUES ('i', 's')")

    failed = run("pg_dump", owner, tmp_path / "owners.dump")
    assert failed.returncode != 0
    assert "row-level security" in failed.stderr

    login = re.sub(r"//\w+@", f"//{backup}@", owner)
    done = run("pg_dump", login, tmp_path / "complete.dump")
    assert done.returncode == 0, done.stderr
    restored = create_database(postgres, f"restored_{uuid4().hex[:8]}")
    done = run("pg_restore", restored, tmp_path / "complete.dump")
    assert done.returncode == 0, done.stderr
    assert migrations.pending(restored) is None
    with psycopg.connect(restored) as connection:
        assert connection.execute("SELECT subject FROM users").fetchall() == [("s",)]
        connection.execute("SET LOCAL ROLE api_user")
        assert connection.execute("SELECT subject FROM users").fetchall() == [], "the dump contains the policies"
