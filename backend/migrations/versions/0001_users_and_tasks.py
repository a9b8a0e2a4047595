"""Users, tasks, and the two roles that every statement runs as."""

import sqlalchemy as sa
from alembic import op
from psycopg.errors import InsufficientPrivilege
from sqlalchemy.dialects import postgresql

from backend.migrations import MigrationError

revision = "0001"
down_revision = None

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
      -- PostgreSQL gives the creator of a role no right to SET it.
      EXECUTE format('GRANT %I TO CURRENT_USER WITH INHERIT FALSE, SET TRUE', name);
    END IF;
  END LOOP;
END $$
"""

FOR_A_DBA = """CREATE ROLE api_user NOLOGIN;
CREATE ROLE api_system NOLOGIN;
GRANT api_user, api_system TO <this login> WITH INHERIT FALSE, SET TRUE;"""

POLICIES = """
GRANT SELECT, INSERT, UPDATE, DELETE ON users, tasks TO api_system;
GRANT SELECT, INSERT, UPDATE, DELETE ON tasks TO api_user;
GRANT SELECT, UPDATE (time_zone, locale, updated_at) ON users TO api_user;

ALTER TABLE users ENABLE ROW LEVEL SECURITY;
ALTER TABLE users FORCE ROW LEVEL SECURITY;
CREATE POLICY owner ON users TO api_user
  USING (id = nullif(current_setting('app.caller', true), '')::uuid);
CREATE POLICY system ON users TO api_system USING (true);

ALTER TABLE tasks ENABLE ROW LEVEL SECURITY;
ALTER TABLE tasks FORCE ROW LEVEL SECURITY;
CREATE POLICY owner ON tasks TO api_user
  USING (owner_id = nullif(current_setting('app.caller', true), '')::uuid);
CREATE POLICY system ON tasks TO api_system USING (true);
"""


def timestamp(name: str, *, now: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=not now, server_default=sa.func.now() if now else None)


def upgrade() -> None:
    try:
        op.execute(ROLES)
    except sa.exc.ProgrammingError as error:
        if isinstance(error.orig, InsufficientPrivilege):
            raise MigrationError(f"this login may not create roles; a DBA must run:\n{FOR_A_DBA}") from error
        raise
    op.create_table(
        "users",
        sa.Column("id", sa.Uuid(), server_default=sa.text("uuidv7()"), nullable=False),
        sa.Column("issuer", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("email", sa.Text()),
        sa.Column("email_verified", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("name", sa.Text()),
        sa.Column("image", sa.Text()),
        sa.Column("roles", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("is_anonymous", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        timestamp("claims_at"),
        sa.Column("status", sa.Text(), server_default="active", nullable=False),
        timestamp("tokens_valid_after"),
        sa.Column("time_zone", sa.Text()),
        sa.Column("locale", sa.Text()),
        timestamp("created_at", now=True),
        timestamp("updated_at", now=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("issuer", "subject"),
        sa.CheckConstraint("char_length(subject) between 1 and 255", name="users_subject_length"),
        sa.CheckConstraint("status in ('active', 'suspended', 'purged')", name="users_status"),
    )
    op.create_table(
        "tasks",
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), server_default=sa.text("uuidv7()"), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("description", sa.Text()),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("priority", sa.Enum("low", "normal", "high", "urgent", name="task_priority"), nullable=False),
        timestamp("due_at"),
        timestamp("completed_at"),
        sa.Column("version", sa.Integer(), server_default=sa.text("1"), nullable=False),
        timestamp("created_at", now=True),
        timestamp("updated_at", now=True),
        timestamp("deleted_at"),
        sa.PrimaryKeyConstraint("owner_id", "id"),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], ondelete="CASCADE"),
        sa.CheckConstraint("char_length(title) between 1 and 200", name="tasks_title_length"),
        sa.CheckConstraint("char_length(description) <= 10000", name="tasks_description_length"),
        sa.CheckConstraint("status in ('todo', 'in_progress', 'done')", name="tasks_status"),
        sa.CheckConstraint("(status = 'done') = (completed_at is not null)", name="tasks_completed_when_done"),
    )
    op.create_index(
        "tasks_by_creation",
        "tasks",
        ["owner_id", "created_at", "id"],
        postgresql_where=sa.text("deleted_at is null"),
    )
    op.execute(POLICIES)


def downgrade() -> None:
    op.drop_table("tasks")
    op.drop_table("users")
    op.execute("DROP TYPE task_priority")
