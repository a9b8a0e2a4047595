"""The migrations, the database roles, and the properties that every table must have."""

import asyncio
import os
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

# Indexes and constraints, as PostgreSQL prints them.
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
def test_the_models_declare_the_migrated_schema(database_url: str, empty: str) -> None:
    options = {
        "compare_type": True,
        "compare_server_default": True,
        # Alembic cannot compare expressions, which PostgreSQL prints in another form; DEFINITIONS contains the indexes.
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
def test_autogenerate_finds_no_difference(database_url: str) -> None:
    """With the configuration of `alembic revision --autogenerate`."""
    config = migrations._config()
    with engine_of(database_url).connect() as connection:
        config.attributes["connection"] = connection
        command.check(config)


def test_an_empty_older_or_newer_schema_is_reported(empty: str) -> None:
    assert migrations.pending(empty) == "the database is empty: run `resource-server migrate`"
    migrations.upgrade(empty)
    assert migrations.pending(empty) is None
    migrations.upgrade(empty)
    with psycopg.connect(empty, autocommit=True) as connection:
        for revision, message in ("9999", "newer than this version"), ("0008", "older than 0010, the first that this"):
            connection.execute("UPDATE alembic_version SET version_num = %s", (revision,))
            assert message in str(migrations.pending(empty))
            with pytest.raises(MigrationError, match=message):
                migrations.upgrade(empty)


def test_the_first_migration_creates_the_schema_of_the_revisions_it_replaced(empty: str) -> None:
    """`tests/database/schema.sql` is a dump of a database that the former revisions 0001 to 0010 created."""
    alembic = [sys.executable, "-m", "alembic", "upgrade", "0010"]
    environment = {**os.environ, "DATABASE_URL": empty, "DATABASE_DIRECT_URL": empty}
    subprocess.run(alembic, cwd=ROOT, env=environment, check=True)
    program = "pg_dump"
    with suppress(EmbeddedPostgresError):
        program = str(postgres_binaries.installed() / program)
    command = [program, "--schema-only", "--no-owner", empty]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kept = [line for line in dump.splitlines() if line and not line.startswith(("\\", "--", "SET ", "SELECT "))]
    assert kept == [line for line in (ROOT / "tests/database/schema.sql").read_text().splitlines() if line]


def test_the_revisions_are_those_of_alembic() -> None:
    scripts = ScriptDirectory.from_config(migrations._config())
    assert migrations.revisions() == [script.revision for script in scripts.walk_revisions()][::-1]
    assert [migrations.head()] == scripts.get_heads()


def test_a_server_with_a_current_schema_does_not_import_alembic(database_url: str) -> None:
    code = (
        "import sys; from backend import app, cli, migrations; app.create_app();"
        " assert migrations.pending(sys.argv[1]) is None; assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, database_url], check=True)


async def upgrade_elsewhere(url: str) -> int | None:
    """Migrate in another process, as on another machine; its exit status."""
    code = "import sys; from backend import migrations; migrations.upgrade(sys.argv[1])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, url)
    return await process.wait()


async def test_concurrent_migrations_succeed(postgres: str) -> None:
    """On one database, and on two databases of a cluster, which share the roles."""
    first, second = (create_database(postgres, f"concurrent_{uuid4().hex[:8]}") for _ in range(2))
    assert await asyncio.gather(*map(upgrade_elsewhere, (first, first, second))) == [0, 0, 0]
    assert migrations.pending(first) is migrations.pending(second) is None


def test_an_unreachable_database_is_a_migration_error() -> None:
    for work in migrations.upgrade, migrations.pending:
        with pytest.raises(MigrationError, match="cannot connect to the database"):
            work("postgresql://nobody@127.0.0.1:9/nothing")


def as_login(url: str, name: str) -> str:
    return url.replace("postgresql://postgres@", f"postgresql://{name}@", 1)


def ordinary_login(url: str) -> str:
    """The URL of a new login that may create tables and switch to both roles, and is no superuser."""
    login = f"owner_{uuid4().hex[:8]}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {login} LOGIN".encode())
        connection.execute(f"GRANT ALL ON SCHEMA public TO {login}".encode())
        connection.execute(f"GRANT api_user, api_system TO {login} WITH INHERIT FALSE, SET TRUE".encode())
    return as_login(url, login)


def test_a_login_that_is_no_superuser_migrates_and_serves(empty: str) -> None:
    login = ordinary_login(empty)
    migrations.upgrade(login)
    with psycopg.connect(login) as connection:
        connection.execute("INSERT INTO users (issuer, subject) SELECT 'i', 's' WHERE false")
        assert connection.execute("SELECT count(*) FROM tasks").fetchone() == (0,)
        connection.execute("SET LOCAL ROLE api_system")
        connection.execute("INSERT INTO users (issuer, subject) VALUES ('i', 's')")


def test_a_login_without_the_roles_is_shown_the_sql_for_a_dba(empty: str) -> None:
    login = f"plain_{uuid4().hex[:8]}"
    with psycopg.connect(empty, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {login} LOGIN".encode())
        connection.execute(f"GRANT ALL ON SCHEMA public TO {login}".encode())
    with pytest.raises(MigrationError, match="GRANT api_user, api_system TO"):
        migrations.upgrade(as_login(empty, login))
    assert migrations.pending(empty) == "the database is empty: run `resource-server migrate`"


class TestCatalogue:
    """Properties read from PostgreSQL's catalogue, so that new tables are included."""

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
        # Only the purge reads the oldest rows of all users.
        leading = {name: first for name, first in indexes if not name.endswith("_to_purge")}
        assert leading
        assert set(leading.values()) == {"owner_id"}, leading

    @pytest.mark.usefixtures("every_table")
    def test_every_link_has_the_triggers_that_show_names(self, catalogue: psycopg.Connection) -> None:
        with catalogue:
            found = catalogue.execute("SELECT tgrelid::regclass::text FROM pg_trigger WHERE tgname = 'show_new_links'")
            linked = {name for (name,) in found}
        assert linked
        assert linked == {link.table.name for link in SQLModel.metadata.info["links"]}

    def test_no_constraint_is_deferrable(self, catalogue: psycopg.Connection) -> None:
        with catalogue:
            assert catalogue.execute("SELECT conname FROM pg_constraint WHERE condeferrable").fetchall() == []

    def test_the_roles_have_only_the_privileges_they_need(self, catalogue: psycopg.Connection) -> None:
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
