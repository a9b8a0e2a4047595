"""The schema: its history, its roles, and what no table may lack."""

import asyncio
import subprocess
import sys
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
from backend.migrations import MigrationError
from tests.conftest import create_database

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


def upgrade_to(url: str, revision: str) -> None:
    config = migrations._config()
    with engine_of(url).connect() as connection, connection.begin():
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def engine_of(url: str) -> Engine:
    return create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=NullPool)


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
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    assert "newer than this version" in str(migrations.pending(empty))


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


def test_indexes_may_be_built_before_the_migration_without_holding_up_writes(empty: str) -> None:
    """One that is there is taken as it is, unless building it failed: then no query would use it."""
    upgrade_to(empty, "0008")
    with psycopg.connect(empty, autocommit=True) as connection:
        build = "CREATE INDEX CONCURRENTLY idempotency_keys_to_purge ON idempotency_keys (created_at)"
        connection.execute(build)
        (built,) = connection.execute("SELECT 'idempotency_keys_to_purge'::regclass::oid").fetchone() or ()
        connection.execute("INSERT INTO erasures (issuer, subject, roles) VALUES ('i', 's', '{}'), ('i', 't', '{}')")
        with pytest.raises(psycopg.errors.UniqueViolation):
            connection.execute("CREATE UNIQUE INDEX CONCURRENTLY erasures_by_age ON erasures (issuer)")
        with pytest.raises(MigrationError, match="index erasures_by_age is not valid"):
            migrations.upgrade(empty)
        connection.execute("DROP INDEX erasures_by_age")
        migrations.upgrade(empty)
        again = connection.execute("SELECT 'idempotency_keys_to_purge'::regclass::oid").fetchone()
    assert again == (built,)


# What is noted of somebody, the oldest first: source, action, and for events how many minutes ago it happened there.
Noted = list[tuple[str, str, int | None]]


@pytest.mark.parametrize(
    ("status", "noted", "suspended", "banned"),
    [
        ("suspended", [("admin", "suspend", None)], True, False),
        ("suspended", [("event", "account-disabled", 9)], False, True),
        ("suspended", [("event", "account-disabled", 9), ("admin", "suspend", None)], True, True),
        ("suspended", [("admin", "suspend", None), ("event", "account-disabled", 9)], True, True),
        # It came late, and was older than what was known: the ban is the last word.
        ("suspended", [("event", "account-disabled", 8), ("event", "account-enabled", 9)], False, True),
        ("suspended", [("event", "account-enabled", 9), ("admin", "suspend", None)], True, False),
        # Lifted here, though Better Auth has never unbanned; then suspended here.
        (
            "suspended",
            [("event", "account-disabled", 9), ("admin", "reinstate", None), ("admin", "suspend", None)],
            True,
            True,
        ),
        ("suspended", [("admin", "suspend", None), ("admin", "reinstate", None)], True, False),
        ("suspended", [], True, False),
        ("active", [("event", "account-disabled", 9), ("admin", "reinstate", None)], False, False),
        ("active", [], False, False),
        ("purged", [("event", "account-disabled", 9)], False, False),
    ],
)
def test_who_was_suspended_stays_so_by_whose_word_it_was(
    empty: str, status: str, noted: Noted, suspended: bool, banned: bool
) -> None:
    """By a login that is no superuser, from whom the policies hide the rows."""
    login = ordinary_login(empty)
    upgrade_to(login, "0008")
    with psycopg.connect(empty, autocommit=True) as connection:
        insert = "INSERT INTO users (issuer, subject, status, status_at) VALUES ('i', 's', %s, now()) RETURNING id"
        (id,) = connection.execute(insert, (status,)).fetchone() or ()
        connection.execute("INSERT INTO users (issuer, subject, status) VALUES ('i', 'other', 'active')")
        for source, action, minutes in noted:
            connection.execute(
                "INSERT INTO audit_log (source, action, subject, user_id, details) VALUES (%s, %s, 's', %s,"
                " jsonb_build_object('toe', now() - make_interval(mins => %s)))",
                (source, action, id, minutes),
            )
        migrations.upgrade(login)
        found = connection.execute(
            "SELECT status, suspended_here, banned, banned_at < now() - interval '7 minutes' FROM users WHERE id = %s",
            (id,),
        ).fetchone()
        others = connection.execute("SELECT status FROM users WHERE subject = 'other'").fetchall()
    ordered = {"active": False, "purged": None}.get(status, True if any(m for *_, m in noted) else None)
    assert found == (status, suspended, banned, ordered)
    assert others == [("active",)]


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
