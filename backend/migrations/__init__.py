"""The schema's history (Alembic), carried inside the package so that the wheel has it."""

from collections.abc import Sequence

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool, create_engine

OLDEST_POSTGRES = 18

# Any constant will do, if it is the same for all who start at once.
_LOCK = 0x6261_7273


class MigrationError(Exception):
    """The database cannot be brought, or has not been brought, to this version; the message says what to do."""


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "backend:migrations")
    return config


def head() -> str:
    """The revision that this version of the package needs."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def isolate(table: str) -> str:
    """For a migration: SQL that leaves the rows of a new table with an `owner_id` to their owner, and to the system.

    Migrations that have run somewhere have said this, so it does not change: another rule is another function.
    """
    return f"""
GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO api_system, api_user;
ALTER TABLE {table} ENABLE ROW LEVEL SECURITY;
ALTER TABLE {table} FORCE ROW LEVEL SECURITY;
CREATE POLICY owner ON {table} TO api_user
  USING (owner_id = nullif(current_setting('app.caller', true), '')::uuid);
CREATE POLICY system ON {table} TO api_system USING (true);
"""


def number(table: str, *, generated: Sequence[str] = ()) -> str:
    """For a migration: SQL that numbers every write of a table with `n` and `deleted_at`, for its feed of changes.

    `generated`: its generated columns. From 0006 on; it changes as little as `isolate`.
    """
    arguments = ", ".join(f"'{column}'" for column in generated)
    return f"""
CREATE TRIGGER await_turn BEFORE UPDATE OR DELETE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION await_turn();
CREATE TRIGGER number_change BEFORE INSERT OR UPDATE ON {table}
  FOR EACH ROW EXECUTE FUNCTION number_change({arguments});
CREATE TRIGGER forget_changes AFTER DELETE ON {table} REFERENCING OLD TABLE AS gone
  FOR EACH STATEMENT EXECUTE FUNCTION forget_changes();
"""


def upgrade(url: str) -> None:
    """Bring the database at `url` (libpq) to the newest revision.

    Under an advisory lock that ends with the transaction, so any number of machines may start at once, through a
    transaction pooler, too. All or nothing. Raises `MigrationError`.
    """
    with _connect(url) as connection, connection.begin():
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def pending(url: str) -> str | None:
    """What keeps this version from running on the database at `url`, in one line, or None. Raises `MigrationError`."""
    with _connect(url) as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    if current == head():
        return None
    if current is None:
        return "the database is empty: run `resource-server migrate`"
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if current not in known:
        return f"the database is at revision {current}, which is newer than this version: deploy a newer one"
    return f"the database is at revision {current}, this version needs {head()}: run `resource-server migrate`"


def _connect(url: str) -> Connection:
    try:
        raw = psycopg.connect(url, connect_timeout=10)
    except psycopg.Error as error:
        raise MigrationError(f"cannot connect to the database: {' '.join(str(error).split())}") from error
    version = raw.info.server_version // 10000
    if version < OLDEST_POSTGRES:
        raw.close()
        raise MigrationError(f"PostgreSQL {OLDEST_POSTGRES} or newer is needed, this is {version}")
    return create_engine("postgresql+psycopg://", creator=lambda: raw, poolclass=NullPool).connect()
