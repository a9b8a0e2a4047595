"""Answers to requests that a client may send again."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

POLICIES = """
GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_keys TO api_system, api_user;

ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE idempotency_keys FORCE ROW LEVEL SECURITY;
CREATE POLICY owner ON idempotency_keys TO api_user
  USING (owner_id = nullif(current_setting('app.caller', true), '')::uuid);
CREATE POLICY system ON idempotency_keys TO api_system USING (true);
"""


def upgrade() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("headers", sa.JSON(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("owner_id", "key"),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], ondelete="CASCADE"),
        sa.CheckConstraint("char_length(key) between 1 and 255", name="idempotency_keys_length"),
    )
    op.create_index("idempotency_keys_by_age", "idempotency_keys", ["owner_id", "created_at"])
    op.execute(POLICIES)


def downgrade() -> None:
    op.drop_table("idempotency_keys")
