"""The names of its tags are kept with each task, so that a listing does not look for them task by task."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

FUNCTIONS = """
CREATE FUNCTION names_of_tags(owner uuid, task uuid) RETURNS text[] LANGUAGE sql STABLE
RETURN array(
  SELECT tags.name FROM task_tags JOIN tags ON tags.owner_id = task_tags.owner_id AND tags.id = task_tags.tag_id
  WHERE task_tags.owner_id = owner AND task_tags.task_id = task ORDER BY tags.folded
);

-- Whoever holds one of the tasks commits first, and then it is seen what they did. Those that are gone show nothing.
-- What shows other names is a new version, unless this transaction has made one already.
CREATE FUNCTION show_tags(owners uuid[], changed uuid[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM FROM tasks WHERE (owner_id, id) IN (SELECT * FROM unnest(owners, changed)) ORDER BY owner_id, id
  FOR NO KEY UPDATE;
  IF FOUND THEN
    WITH told AS MATERIALIZED (
      SELECT owner, task, names_of_tags(owner, task) AS names FROM unnest(owners, changed) AS one (owner, task)
    )
    UPDATE tasks SET
      tag_names = told.names,
      version = version + CASE WHEN tasks.xmin = pg_current_xact_id()::xid THEN 0 ELSE 1 END,
      updated_at = CASE WHEN tasks.xmin = pg_current_xact_id()::xid THEN updated_at ELSE greatest(updated_at, now()) END
    FROM told WHERE owner_id = told.owner AND id = told.task AND tag_names <> told.names;
  END IF;
END $$;

CREATE FUNCTION show_links() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM show_tags(array_agg(owner_id), array_agg(task_id)) FROM (SELECT DISTINCT owner_id, task_id FROM links) one;
  RETURN NULL;
END $$;

CREATE FUNCTION show_new_names() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM show_tags(array_agg(owner_id), array_agg(task_id))
  FROM (SELECT DISTINCT link.owner_id, task_id FROM renamed JOIN task_tags link
        ON link.owner_id = renamed.owner_id AND link.tag_id = renamed.id) one;
  RETURN NULL;
END $$;

-- A cascade would delete them as the owner of the tables, from whom row-level security hides the tasks.
CREATE FUNCTION unlink() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  DELETE FROM task_tags WHERE owner_id = old.owner_id AND tag_id = old.id;
  RETURN old;
END $$;
"""

# What is shown stays the same, so no task takes a new number.
FILLED = """
ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY, DISABLE TRIGGER USER;
ALTER TABLE tags NO FORCE ROW LEVEL SECURITY;
ALTER TABLE task_tags NO FORCE ROW LEVEL SECURITY;
UPDATE tasks SET tag_names = names_of_tags(owner_id, id)
WHERE (owner_id, id) IN (SELECT owner_id, task_id FROM task_tags);
ALTER TABLE tasks FORCE ROW LEVEL SECURITY, ENABLE TRIGGER USER;
ALTER TABLE tags FORCE ROW LEVEL SECURITY;
ALTER TABLE task_tags FORCE ROW LEVEL SECURITY;
"""

TRIGGERS = {
    "show_new_links": "AFTER INSERT ON task_tags REFERENCING NEW TABLE AS links",
    "show_old_links": "AFTER DELETE ON task_tags REFERENCING OLD TABLE AS links",
    "show_links_as_they_are": "AFTER UPDATE ON task_tags REFERENCING NEW TABLE AS links",
    "show_links_as_they_were": "AFTER UPDATE ON task_tags REFERENCING OLD TABLE AS links",
}


def upgrade() -> None:
    op.add_column("tasks", sa.Column("tag_names", sa.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False))
    op.execute(FUNCTIONS)
    op.execute(FILLED)
    for name, when in TRIGGERS.items():
        op.execute(f"CREATE TRIGGER {name} {when} FOR EACH STATEMENT EXECUTE FUNCTION show_links()")
    op.execute(
        "CREATE TRIGGER show_new_names AFTER UPDATE ON tags REFERENCING NEW TABLE AS renamed"
        " FOR EACH STATEMENT EXECUTE FUNCTION show_new_names()"
    )
    op.execute("CREATE TRIGGER unlink BEFORE DELETE ON tags FOR EACH ROW EXECUTE FUNCTION unlink()")


def downgrade() -> None:
    op.execute("DROP FUNCTION show_links, show_new_names, unlink CASCADE")
    op.execute("DROP FUNCTION show_tags")
    op.drop_column("tasks", "tag_names")
    op.execute("DROP FUNCTION names_of_tags")
