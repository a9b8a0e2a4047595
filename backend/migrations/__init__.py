"""Migrations of the schema (Alembic), as part of the package and so of the wheel."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import Connection, NullPool, create_engine

from backend.database import NOTICE_DEAD_CLIENT, with_keepalives

if TYPE_CHECKING:
    # Imported only for a migration: it takes 11 MB and 0.1 s.
    from alembic.config import Config
    from sqlalchemy import MetaData

OLDEST_POSTGRES = 18

# Any constant, the same in all processes.
_LOCK = 0x6261_7273

_LINK = Path(__file__).with_name("link.sql")

_COLUMNS = """
SELECT c.relname, a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relnamespace = current_schema()::regnamespace
  AND a.attnum > 0 AND NOT a.attisdropped
"""


class MigrationError(Exception):
    """The database does not have the schema of this version, or cannot be migrated to it, as the message says."""


def _config() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "backend:migrations")
    return config


def revisions() -> list[str]:
    """The revisions of this version, from the file names, oldest first."""
    return sorted(file.name.partition("_")[0] for file in Path(__file__).with_name("versions").glob("[0-9]*.py"))


def head() -> str:
    """The revision that this version needs."""
    return revisions()[-1]


def isolate(table: str) -> str:
    """SQL for a migration: only their owner and the system see the rows of a new table with an `owner_id`.

    The text never changes, because migrations that have run contain it. Another rule is another function.
    """
    return f"""
GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO api_system, api_user;
ALTER TABLE {table} ENABLE ROW LEVEL SECURITY;
ALTER TABLE {table} FORCE ROW LEVEL SECURITY;
CREATE POLICY owner ON {table} TO api_user
  USING (owner_id = nullif(current_setting('app.caller', true), '')::uuid);
CREATE POLICY system ON {table} TO api_system USING (true);
"""


def unisolate(table: str) -> str:
    """SQL for a downgrade: undo `isolate`."""
    return f"""
DROP POLICY system ON {table};
DROP POLICY owner ON {table};
ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY;
ALTER TABLE {table} DISABLE ROW LEVEL SECURITY;
REVOKE ALL ON {table} FROM api_system, api_user;
"""


def number(table: str, *, generated: Sequence[str] = ()) -> str:
    """SQL for a migration: each write of a table with `n` and `deleted_at` gets a change number, for delta sync.

    `generated`: its generated columns. The text never changes, as that of `isolate`.
    """
    arguments = ", ".join(f"'{column}'" for column in generated)
    return f"""
CREATE TRIGGER await_turn BEFORE UPDATE OR DELETE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION await_turn();
CREATE TRIGGER number_change BEFORE INSERT OR UPDATE ON {table}
  FOR EACH ROW EXECUTE FUNCTION number_change({arguments});
CREATE TRIGGER forget_changes AFTER DELETE ON {table} REFERENCING OLD TABLE AS gone
  FOR EACH STATEMENT EXECUTE FUNCTION forget_changes();
"""


def link(table: str, *, names: str, suffix: str | None = None, **ends: str) -> str:
    """SQL for a migration: rows show the names of linked labels, such as `task="tasks", tag="tags", names="tag_names"`.

    If labels or links change, rows with other names get a new version. The ends name the columns `task_id` and
    `tag_id`; they must not be key words of SQL. `suffix`: of the names of the functions. The text never changes, as
    that of `isolate`.
    """
    (row, rows), (label, labels) = ends.items()
    return _LINK.read_text().format(
        table=table,
        row=row,
        rows=rows,
        label=label,
        labels=labels,
        names=names,
        suffix=f"_in_{table}" if suffix is None else suffix,
    )


def unlink(table: str, *, labels: str) -> str:
    """SQL for a downgrade: undo `link`. The functions would otherwise keep the table from being dropped."""
    names = f"names_of_{labels}", f"show_{labels}", "show_links", "show_new_names", "unlink"
    return f"DROP FUNCTION {', '.join(f'{name}_in_{table}' for name in names)} CASCADE"


def unnumber(table: str) -> str:
    """SQL for a downgrade: undo `number`."""
    return f"""
DROP TRIGGER forget_changes ON {table};
DROP TRIGGER number_change ON {table};
DROP TRIGGER await_turn ON {table};
"""


def upgrade(url: str) -> None:
    """Migrate the database at `url` (libpq) to the newest revision, in one transaction. Raises `MigrationError`.

    An advisory lock, which ends with the transaction, lets several machines call it at once, also behind a transaction
    pooler.
    """
    from alembic import command

    with _connect(url) as connection, connection.begin():
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        if reason := _unsupported(_current(driver)):
            raise MigrationError(reason)
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def pending(url: str) -> str | None:
    """The reason why this version cannot run on the database at `url`, or None. Raises `MigrationError`."""
    with _open(url) as connection:
        current = _current(connection)
    if current == head():
        return None
    if current is None:
        return "the database is empty: run `resource-server migrate`"
    if reason := _unsupported(current):
        return reason
    return f"the database is at revision {current}, this version needs {head()}: run `resource-server migrate`"


def missing(url: str, models: "MetaData") -> str | None:
    """The tables and columns of these models that no migration has made in the database at `url`, or None.

    Raises `MigrationError`.
    """
    with _open(url) as connection:
        columns = set(connection.execute(_COLUMNS).fetchall())
    existing = {table for table, _ in columns}
    lacks = []
    for table in models.sorted_tables:
        if table.schema is None and table.name not in existing:
            lacks.append(f"table {table.name}")
        elif table.schema is None:
            absent = [column.name for column in table.c if (table.name, column.name) not in columns]
            lacks += [f"column {table.name}.{name}" for name in absent]
    if not lacks:
        return None
    return f"no migration for {', '.join(lacks)}: run `alembic revision --autogenerate -m <message>`"


def _unsupported(current: str | None) -> str | None:
    """The reason why this version cannot migrate a database at `current` (None: an empty one), or None if it can."""
    if current is None or current in revisions():
        return None
    if current < revisions()[0]:
        return (
            f"the database is at revision {current}, which is older than {revisions()[0]}, the first that this version "
            "can migrate: migrate with an earlier version first"
        )
    return f"the database is at revision {current}, which is newer than this version: deploy a newer one"


def _current(connection: psycopg.Connection) -> str | None:
    table = connection.execute("SELECT to_regclass('alembic_version')").fetchone()
    if table is None or table[0] is None:
        return None
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])


def _connect(url: str) -> Connection:
    raw = _open(url)
    return create_engine("postgresql+psycopg://", creator=lambda: raw, poolclass=NullPool).connect()


def _open(url: str) -> psycopg.Connection:
    try:
        raw = psycopg.connect(with_keepalives(url), connect_timeout=10)
        # No time limits: a migration may take long. Only a dead client must not keep its locks.
        raw.execute(NOTICE_DEAD_CLIENT, (raw.info.backend_pid,))
        raw.commit()
    except psycopg.Error as error:
        raise MigrationError(f"cannot connect to the database: {' '.join(str(error).split())}") from error
    version = raw.info.server_version // 10000
    if version < OLDEST_POSTGRES:
        raw.close()
        raise MigrationError(f"PostgreSQL {OLDEST_POSTGRES} or newer is required; this is {version}")
    return raw
