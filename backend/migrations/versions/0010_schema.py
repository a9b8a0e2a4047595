"""The schema: tables and indexes, the two roles, row-level security, and triggers."""

from pathlib import Path

import sqlalchemy as sa
from alembic import op
from psycopg.errors import InsufficientPrivilege

from backend.migrations import MigrationError, isolate, number

revision = "0010"
down_revision = None

SQL = Path(__file__).with_name(revision)

# Rows of owned tables are visible to their owner. Rows of system tables are visible to `api_system` alone.
OWNED = ("tasks", "tags", "task_tags", "idempotency_keys", "change_counters")
SYSTEM = {
    "erasures": "SELECT, INSERT, UPDATE, DELETE",
    "security_events": "SELECT, INSERT, DELETE",
    "audit_log": "SELECT, INSERT",
}

ROLES = """
DO $$
DECLARE name text;
BEGIN
  FOREACH name IN ARRAY ARRAY['api_user', 'api_system'] LOOP
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
      BEGIN
        EXECUTE format('CREATE ROLE %I NOLOGIN', name);
      EXCEPTION WHEN duplicate_object OR unique_violation THEN
        NULL;  -- another database of this cluster was migrated at the same moment
      END;
    END IF;
    IF NOT pg_has_role(current_user, name, 'SET') THEN
      -- PostgreSQL does not grant SET to the creator of a role.
      EXECUTE format('GRANT %I TO CURRENT_USER WITH INHERIT FALSE, SET TRUE', name);
    END IF;
  END LOOP;
END $$
"""

ROLES_BY_A_DBA = """CREATE ROLE api_user NOLOGIN;
CREATE ROLE api_system NOLOGIN;
GRANT api_user, api_system TO <this login> WITH INHERIT FALSE, SET TRUE;"""


def upgrade() -> None:
    create_roles()
    create_tables()
    create_policies()
    create_triggers()


def create_roles() -> None:
    """Create the roles that every statement runs as. Raises MigrationError, with the SQL for a DBA, if not allowed."""
    try:
        op.execute(ROLES)
    except sa.exc.ProgrammingError as error:
        if isinstance(error.orig, InsufficientPrivilege):
            raise MigrationError(f"this login may not create roles; a DBA must run:\n{ROLES_BY_A_DBA}") from error
        raise


def create_tables() -> None:
    for name in "users", "tasks":
        op.execute((SQL / f"{name}.sql").read_text())


def create_policies() -> None:
    """Force row-level security on every table, so that it also applies to the owner of the tables."""
    op.execute(
        """
        GRANT SELECT, INSERT, UPDATE, DELETE ON users TO api_system;
        GRANT SELECT, UPDATE (time_zone, locale, updated_at) ON users TO api_user;
        CREATE POLICY owner ON users TO api_user USING (id = nullif(current_setting('app.caller', true), '')::uuid);
        """
    )
    for table, rights in SYSTEM.items():
        op.execute(f"GRANT {rights} ON {table} TO api_system")
    for table in ("users", *SYSTEM):
        op.execute(
            f"""
            ALTER TABLE {table} ENABLE ROW LEVEL SECURITY;
            ALTER TABLE {table} FORCE ROW LEVEL SECURITY;
            CREATE POLICY system ON {table} TO api_system USING (true);
            """
        )
    for table in OWNED:
        op.execute(isolate(table))


def create_triggers() -> None:
    op.execute((SQL / "triggers.sql").read_text())
    op.execute(number("tasks", generated=["folded"]))


def downgrade() -> None:
    raise MigrationError("there is no earlier schema: restore a backup")
