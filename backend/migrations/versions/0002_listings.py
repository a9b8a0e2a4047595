"""What listings need: an index for each sort, one for the bin, and the text that searches look through."""

from alembic import op

revision = "0002"
down_revision = "0001"

# No folded text has a capital letter, so what is searched for cannot reach from the title into the description.
FOLDED = (
    "((casefold(title COLLATE pg_unicode_fast) || 'X'::text)"
    " || casefold(COALESCE(description, ''::text) COLLATE pg_unicode_fast))"
)

PRIORITIES = "low", "normal", "high", "urgent"
RANK = f"CASE {' '.join(f'WHEN priority = {name!r} THEN {rank}' for rank, name in enumerate(PRIORITIES))} END"
SORTS = {
    "tasks_by_change": "updated_at",
    "tasks_by_due_date": "CASE WHEN due_at IS NULL THEN 'infinity'::timestamptz ELSE due_at END",
    "tasks_by_due_date_descending": "CASE WHEN due_at IS NULL THEN '-infinity'::timestamptz ELSE due_at END",
    "tasks_by_priority": RANK,
    "tasks_by_title": "title",
}


def upgrade() -> None:
    op.execute('ALTER TABLE tasks ALTER COLUMN title TYPE text COLLATE "C"')  # sorted by code point
    # No enum: its comparisons are not leakproof, so that row-level security keeps them from every index.
    op.execute("ALTER TABLE tasks ALTER COLUMN priority TYPE text USING priority::text")
    op.execute("DROP TYPE task_priority")
    op.create_check_constraint("tasks_priority", "tasks", f"priority IN {PRIORITIES}")
    op.execute(f"ALTER TABLE tasks ADD COLUMN folded text NOT NULL GENERATED ALWAYS AS ({FOLDED}) STORED")
    for name, key in SORTS.items():
        op.execute(f"CREATE INDEX {name} ON tasks (owner_id, ({key}), id) WHERE deleted_at IS NULL")
    op.execute("CREATE INDEX tasks_in_the_bin ON tasks (owner_id, deleted_at) WHERE deleted_at IS NOT NULL")


def downgrade() -> None:
    op.execute("DROP INDEX tasks_in_the_bin")
    for name in SORTS:
        op.execute(f"DROP INDEX {name}")
    op.execute("ALTER TABLE tasks DROP COLUMN folded")
    op.drop_constraint("tasks_priority", "tasks")
    op.execute(f"CREATE TYPE task_priority AS ENUM {PRIORITIES}")
    op.execute("ALTER TABLE tasks ALTER COLUMN priority TYPE task_priority USING priority::task_priority")
    op.execute('ALTER TABLE tasks ALTER COLUMN title TYPE text COLLATE "default"')
