"""An index for each kind of rows that the purge removes, which lead with the time instead of the owner."""

import sqlalchemy as sa
from alembic import op

from backend.migrations import MigrationError

revision = "0009"
down_revision = "0008"

# `migrate` is one transaction, in which no index can be built CONCURRENTLY: writes to a table wait while its index is
# built. On a large database these can be built with CONCURRENTLY before the migration, which then finds them.
INDEXES = {
    "tasks_to_purge": "tasks (deleted_at, owner_id, id) WHERE deleted_at IS NOT NULL",
    "erasures_by_age": "erasures (erased_at)",
    "idempotency_keys_to_purge": "idempotency_keys (created_at)",
}


def upgrade() -> None:
    # A CREATE INDEX CONCURRENTLY that failed leaves an index that no query uses, and that IF NOT EXISTS accepts.
    unfinished = sa.text(
        "SELECT name FROM unnest(CAST(:names AS text[])) name JOIN pg_index ON indexrelid = to_regclass(name)"
        " WHERE NOT indisvalid"
    )
    name = op.get_bind().scalar(unfinished, {"names": list(INDEXES)})
    if name is not None:
        raise MigrationError(f"the index {name} is not valid: wait until it is built, or DROP INDEX {name}")
    for name, definition in INDEXES.items():
        op.execute(f"CREATE INDEX IF NOT EXISTS {name} ON {definition}")
    op.execute("DROP INDEX IF EXISTS idempotency_keys_by_age")


def downgrade() -> None:
    op.execute("CREATE INDEX idempotency_keys_by_age ON idempotency_keys (owner_id, created_at)")
    for name in INDEXES:
        op.execute(f"DROP INDEX {name}")
