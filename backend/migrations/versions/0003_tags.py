"""Tags, and which tasks have them."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

POLICIES = """
GRANT SELECT, INSERT, UPDATE, DELETE ON tags, task_tags TO api_system, api_user;

ALTER TABLE tags ENABLE ROW LEVEL SECURITY;
ALTER TABLE tags FORCE ROW LEVEL SECURITY;
CREATE POLICY owner ON tags TO api_user
  USING (owner_id = nullif(current_setting('app.caller', true), '')::uuid);
CREATE POLICY system ON tags TO api_system USING (true);

ALTER TABLE task_tags ENABLE ROW LEVEL SECURITY;
ALTER TABLE task_tags FORCE ROW LEVEL SECURITY;
CREATE POLICY owner ON task_tags TO api_user
  USING (owner_id = nullif(current_setting('app.caller', true), '')::uuid);
CREATE POLICY system ON task_tags TO api_system USING (true);
"""


def upgrade() -> None:
    op.create_table(
        "tags",
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), server_default=sa.text("uuidv7()"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "folded",
            sa.Text(collation="C"),
            sa.Computed("casefold(name COLLATE pg_unicode_fast)", persisted=True),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("owner_id", "id"),
        sa.UniqueConstraint("owner_id", "folded", name="tags_name"),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], ondelete="CASCADE"),
        sa.CheckConstraint("char_length(name) between 1 and 50", name="tags_name_length"),
    )
    op.create_table(
        "task_tags",
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("tag_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("owner_id", "task_id", "tag_id"),
        sa.ForeignKeyConstraint(["owner_id", "task_id"], ["tasks.owner_id", "tasks.id"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["owner_id", "tag_id"], ["tags.owner_id", "tags.id"], ondelete="CASCADE"),
    )
    op.create_index("task_tags_by_tag", "task_tags", ["owner_id", "tag_id", "task_id"])
    op.execute(POLICIES)


def downgrade() -> None:
    op.drop_table("task_tags")
    op.drop_table("tags")
