"""Changes: every write of a task takes a number, in the order of commits."""

import sqlalchemy as sa
from alembic import op

from backend.migrations import isolate, number

revision = "0006"
down_revision = "0005"

FUNCTIONS = """
-- The writers of one owner work one after another: who has this lock commits before the next one takes a number.
CREATE FUNCTION lock_changes(owner uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('changes of ' || owner, 0));
END $$;

-- Before any row is locked, so that nobody waits in a circle. Whose rows the system changes is seen row by row.
CREATE FUNCTION await_turn() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE caller text := current_setting('app.caller', true);
BEGIN
  IF caller <> '' THEN
    PERFORM pg_advisory_xact_lock(hashtextextended('changes of ' || caller, 0));
  END IF;
  RETURN NULL;
END $$;

-- One number for all that a transaction changes of one owner; it is remembered until the transaction ends.
-- Arguments: the generated columns, which are not known yet.
CREATE FUNCTION number_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  taken text := current_setting('app.change', true);
  generated text[] := coalesce(tg_argv, '{}');  -- null when there are none
BEGIN
  IF tg_op = 'UPDATE' THEN
    new.n := old.n;
    IF new.version = old.version AND to_jsonb(new) - generated = to_jsonb(old) - generated THEN
      RETURN new;
    END IF;
  END IF;
  IF split_part(taken, ' ', 1) = new.owner_id::text THEN
    new.n := split_part(taken, ' ', 2);
    RETURN new;
  END IF;
  PERFORM pg_advisory_xact_lock(hashtextextended('changes of ' || new.owner_id, 0));
  UPDATE change_counters SET n = n + 1 WHERE owner_id = new.owner_id RETURNING n INTO new.n;
  IF NOT FOUND THEN
    INSERT INTO change_counters (owner_id, n) VALUES (new.owner_id, 1);
    new.n := 1;
  END IF;
  IF tg_op = 'UPDATE' AND new.owner_id <> old.owner_id THEN
    RAISE EXCEPTION 'a row keeps its owner: insert it for the other one, and delete it';
  END IF;
  PERFORM set_config('app.change', concat(new.owner_id, ' ', new.n), true);
  RETURN new;
END $$;

-- What is gone cannot be listed: who has not heard of it yet must start anew. A live row nobody has heard of.
CREATE FUNCTION forget_changes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  UPDATE change_counters counter
  SET n = counter.n + lost.live, purged = greatest(counter.purged, lost.n, lost.live * (counter.n + 1))
  FROM (SELECT owner_id, max(n) AS n, max((deleted_at IS NULL)::int) AS live FROM gone GROUP BY owner_id) lost
  WHERE counter.owner_id = lost.owner_id;
  RETURN NULL;
END $$;
"""

# Of what there is, in the order in which it was changed last.
NUMBERED = """
ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY;
ALTER TABLE change_counters NO FORCE ROW LEVEL SECURITY;
UPDATE tasks SET n = numbered.n
FROM (SELECT owner_id, id, row_number() OVER (PARTITION BY owner_id ORDER BY updated_at, id) AS n FROM tasks) numbered
WHERE tasks.owner_id = numbered.owner_id AND tasks.id = numbered.id;
INSERT INTO change_counters (owner_id, n) SELECT owner_id, max(n) FROM tasks GROUP BY owner_id;
ALTER TABLE tasks FORCE ROW LEVEL SECURITY;
ALTER TABLE change_counters FORCE ROW LEVEL SECURITY;
"""


def upgrade() -> None:
    op.create_table(
        "change_counters",
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("n", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("purged", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("owner_id"),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], ondelete="CASCADE"),
    )
    op.execute(isolate("change_counters"))
    op.add_column("tasks", sa.Column("n", sa.BigInteger()))
    op.execute(NUMBERED)
    op.alter_column("tasks", "n", nullable=False)
    op.create_index("tasks_by_number", "tasks", ["owner_id", "n", "id"])
    op.execute(FUNCTIONS)
    op.execute(number("tasks", generated=["folded"]))


def downgrade() -> None:
    for trigger in "await_turn", "number_change", "forget_changes":
        op.execute(f"DROP TRIGGER {trigger} ON tasks")
        op.execute(f"DROP FUNCTION {trigger}")
    op.execute("DROP FUNCTION lock_changes")
    op.drop_column("tasks", "n")
    op.drop_table("change_counters")
