"""The schema: tables and indexes, the two roles, row-level security, and triggers."""

from pathlib import Path

import sqlalchemy as sa
from alembic import op
from psycopg.errors import InsufficientPrivilege

from backend.migrations import MigrationError, isolate, link, number

revision = "0010"
down_revision = None

SQL = Path(__file__).with_name(revision)

# Their rows are visible to their owner alone; `isolate` makes the policies of any owned table.
OWNED = ("tasks", "tags", "task_tags", "idempotency_keys", "change_counters")

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
        op.execute((SQL / "roles.sql").read_text())
    except sa.exc.ProgrammingError as error:
        if isinstance(error.orig, InsufficientPrivilege):
            raise MigrationError(f"this login may not create roles; a DBA must run:\n{ROLES_BY_A_DBA}") from error
        raise


def create_tables() -> None:
    for name in "users", "tasks":
        op.execute((SQL / f"{name}.sql").read_text())


def create_policies() -> None:
    op.execute((SQL / "policies.sql").read_text())
    for table in OWNED:
        op.execute(isolate(table))


def create_triggers() -> None:
    op.execute((SQL / "triggers.sql").read_text())
    op.execute(number("tasks", generated=["folded"]))
    op.execute(link("task_tags", task="tasks", tag="tags", names="tag_names", suffix=""))


def downgrade() -> None:
    raise MigrationError("there is no earlier schema: restore a backup")
