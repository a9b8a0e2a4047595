"""Searches read texts from an index, with all that a listing is narrowed and sorted by; few are too long for it."""

from alembic import op

revision = "0007"
down_revision = "0006"

INDEXES = """
CREATE INDEX tasks_by_text ON tasks (owner_id, id)
  INCLUDE (folded, title, status, priority, due_at, created_at, updated_at)
  WHERE deleted_at IS NULL AND octet_length(folded) <= 1500;
CREATE INDEX tasks_by_long_text ON tasks (owner_id, id) WHERE deleted_at IS NULL AND octet_length(folded) > 1500;

-- What an index says counts without a look at the table only where a vacuum has been since the last write.
ALTER TABLE tasks SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.02);
"""


def upgrade() -> None:
    op.execute(INDEXES)


def downgrade() -> None:
    op.execute("ALTER TABLE tasks RESET (autovacuum_vacuum_scale_factor, autovacuum_vacuum_insert_scale_factor)")
    for name in "tasks_by_text", "tasks_by_long_text":
        op.execute(f"DROP INDEX {name}")
