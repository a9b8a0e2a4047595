"""The schema: its history, its roles, and what no table may lack."""

import asyncio
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, NullPool, create_engine
from sqlmodel import SQLModel

from backend import migrations
from backend.app import create_app
from backend.dev import postgres_binaries
from backend.dev.postgres import EmbeddedPostgresError
from backend.migrations import MigrationError
from tests.conftest import create_database

ROOT = Path(__file__).parents[2]

# What PostgreSQL itself makes of indexes and constraints.
DEFINITIONS = """
SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index
WHERE indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)
  AND indrelid::regclass::text <> 'alembic_version'
UNION ALL
SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'alembic_version'
ORDER BY 1, 2
"""


@pytest.fixture
def empty(postgres: str) -> str:
    return create_database(postgres, f"empty_{uuid4().hex[:8]}")


@pytest.fixture
def every_table() -> None:
    """Create the application, which imports every feature and so declares its tables."""
    create_app()


def engine_of(url: str) -> Engine:
    return create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=NullPool)


@pytest.mark.usefixtures("every_table")
def test_the_tables_are_what_the_migrations_make(database_url: str, empty: str) -> None:
    options = {
        "compare_type": True,
        "compare_server_default": True,
        # Alembic cannot compare expressions that PostgreSQL has laid out anew.
        "include_object": lambda _, __, kind, *___: kind != "index",
    }
    with engine_of(database_url).connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, SQLModel.metadata) == []
        migrated = connection.exec_driver_sql(DEFINITIONS).fetchall()
    with engine_of(empty).connect() as connection:
        SQLModel.metadata.create_all(connection)
        assert connection.exec_driver_sql(DEFINITIONS).fetchall() == migrated


@pytest.mark.usefixtures("every_table")
def test_a_new_revision_would_be_empty(database_url: str) -> None:
    """Alembic knows every table, and takes no index for another one."""
    config = migrations._config()
    with engine_of(database_url).connect() as connection:
        config.attributes["connection"] = connection
        command.check(config)


def test_an_empty_database_and_a_current_one(empty: str) -> None:
    assert migrations.pending(empty) == "the database is empty: run `resource-server migrate`"
    migrations.upgrade(empty)
    assert migrations.pending(empty) is None
    migrations.upgrade(empty)
    with psycopg.connect(empty, autocommit=True) as connection:
        for number, words in ("9999", "newer than this version"), ("0008", "older than 0010, the first that this"):
            connection.execute("UPDATE alembic_version SET version_num = %s", (number,))
            assert words in str(migrations.pending(empty))
            with pytest.raises(MigrationError, match=words):
                migrations.upgrade(empty)


def test_the_schema_is_that_of_the_migrations_before_they_were_made_one(empty: str) -> None:
    """`tests/database/schema.sql` is a dump of the database that the revisions 0001 to 0010 made."""
    migrations.upgrade(empty)
    program = "pg_dump"
    with suppress(EmbeddedPostgresError):
        program = str(postgres_binaries.installed() / program)
    command = [program, "--schema-only", "--no-owner", empty]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kept = [line for line in dump.splitlines() if line and not line.startswith(("\\", "--", "SET ", "SELECT "))]
    assert kept == [line for line in (ROOT / "tests/database/schema.sql").read_text().splitlines() if line]


def test_the_revisions_are_those_that_alembic_finds() -> None:
    scripts = ScriptDirectory.from_config(migrations._config())
    assert migrations.revisions() == [script.revision for script in scripts.walk_revisions()][::-1]
    assert [migrations.head()] == scripts.get_heads()


def test_a_server_that_finds_its_schema_does_not_load_alembic(database_url: str) -> None:
    code = (
        "import sys; from backend import app, cli, migrations; app.create_app();"
        " assert migrations.pending(sys.argv[1]) is None; assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, database_url], check=True)


async def upgrade_elsewhere(url: str) -> int | None:
    """In a process of its own, as on another machine."""
    code = "import sys; from backend import migrations; migrations.upgrade(sys.argv[1])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, url)
    return await process.wait()


async def test_many_may_start_at_once(postgres: str) -> None:
    """On one database, and on several of one cluster, whose two roles are the cluster's."""
    urls = [create_database(postgres, f"at_once_{uuid4().hex[:8]}") for _ in range(2)]
    assert set(await asyncio.gather(*(upgrade_elsewhere(url) for url in urls * 3))) == {0}
    assert [migrations.pending(url) for url in urls] == [None, None]


def test_a_database_that_is_not_there_is_one_clear_line() -> None:
    for work in migrations.upgrade, migrations.pending:
        with pytest.raises(MigrationError, match="cannot connect to the database"):
            work("postgresql://nobody@127.0.0.1:9/nothing")


def as_login(url: str, name: str) -> str:
    return url.replace("postgresql://postgres@", f"postgresql://{name}@", 1)


def ordinary_login(url: str) -> str:
    """The URL for a new login that may make tables and speak as both roles: no superuser."""
    login = f"owner_{uuid4().hex[:8]}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {login} LOGIN".encode())
        connection.execute(f"GRANT ALL ON SCHEMA public TO {login}".encode())
        connection.execute(f"GRANT api_user, api_system TO {login} WITH INHERIT FALSE, SET TRUE".encode())
    return as_login(url, login)


def test_an_ordinary_login_migrates_and_serves(empty: str) -> None:
    """CREATEROLE is enough, for a login that owns its database: no superuser is needed."""
    login = ordinary_login(empty)
    migrations.upgrade(login)
    with psycopg.connect(login) as connection:
        connection.execute("INSERT INTO users (issuer, subject) SELECT 'i', 's' WHERE false")
        assert connection.execute("SELECT count(*) FROM tasks").fetchone() == (0,), (
            "forced policies bind the owner, too"
        )
        connection.execute("SET LOCAL ROLE api_system")
        connection.execute("INSERT INTO users (issuer, subject) VALUES ('i', 's')")


def test_a_login_that_may_not_make_roles_is_told_what_a_dba_must_do(empty: str) -> None:
    login = f"plain_{uuid4().hex[:8]}"
    with psycopg.connect(empty, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {login} LOGIN".encode())
        connection.execute(f"GRANT ALL ON SCHEMA public TO {login}".encode())
    with pytest.raises(MigrationError, match="GRANT api_user, api_system TO"):
        migrations.upgrade(as_login(empty, login))
    assert migrations.pending(empty) == "the database is empty: run `resource-server migrate`"


class TestCatalogue:
    """Read from PostgreSQL's own tables, so that a new table cannot be forgotten."""

    @pytest.fixture
    def catalogue(self, database_url: str) -> psycopg.Connection:
        return psycopg.connect(database_url)

    def test_every_table_has_forced_policies(self, catalogue: psycopg.Connection) -> None:
        with catalogue:
            tables = catalogue.execute(
                """
                SELECT c.relname, c.relrowsecurity AND c.relforcerowsecurity,
                       array(SELECT r.rolname || ': ' || pg_get_expr(p.polqual, p.polrelid) FROM pg_policy p
                             JOIN pg_roles r ON r.oid = ANY (p.polroles) WHERE p.polrelid = c.oid ORDER BY 1),
                       EXISTS (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attname = 'owner_id'),
                       has_any_column_privilege('api_user', c.oid, 'SELECT, INSERT, UPDATE, REFERENCES')
                FROM pg_class c WHERE c.relkind IN ('r', 'p') AND c.relnamespace = 'public'::regnamespace
                  AND c.relname <> 'alembic_version'
                """
            ).fetchall()
        caller = "(NULLIF(current_setting('app.caller'::text, true), ''::text))::uuid"
        assert {name for name, *_ in tables} >= {"users", "tasks", "audit_log"}
        for name, forced, policies, has_owner, reachable in tables:
            key = "id" if name == "users" else "owner_id"
            assert forced, name
            assert reachable is (has_owner or name == "users"), name
            assert policies == ["api_system: true", *[f"api_user: ({key} = {caller})"] * reachable], name

    def test_every_key_and_index_leads_with_the_owner(self, catalogue: psycopg.Connection) -> None:
        with catalogue:
            indexes = catalogue.execute(
                """
                SELECT i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid, 1, false) FROM pg_index i
                JOIN pg_class c ON c.oid = i.indrelid WHERE c.relnamespace = 'public'::regnamespace
                  AND EXISTS (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attname = 'owner_id')
                """
            ).fetchall()
        # The purge alone reads everybody's rows: of each table the oldest.
        leading = {name: first for name, first in indexes if not name.endswith("_to_purge")}
        assert leading
        assert set(leading.values()) == {"owner_id"}, leading

    def test_no_constraint_waits_for_the_commit(self, catalogue: psycopg.Connection) -> None:
        with catalogue:
            assert catalogue.execute("SELECT conname FROM pg_constraint WHERE condeferrable").fetchall() == []

    def test_the_roles_can_do_nothing_but_their_work(self, catalogue: psycopg.Connection) -> None:
        with catalogue:
            roles = catalogue.execute(
                "SELECT rolname, rolcanlogin OR rolsuper OR rolcreaterole OR rolcreatedb OR rolbypassrls"
                " FROM pg_roles WHERE rolname LIKE 'api\\_%' ORDER BY 1"
            ).fetchall()
            columns = catalogue.execute(
                "SELECT column_name FROM information_schema.column_privileges"
                " WHERE grantee = 'api_user' AND table_name = 'users' AND privilege_type = 'UPDATE' ORDER BY 1"
            ).fetchall()
        assert roles == [("api_system", False), ("api_user", False)]
        assert columns == [("locale",), ("time_zone",), ("updated_at",)]
