"""What happens to accounts: told to every worker, noted for good, and in the order in which it happened."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"

POLICIES = """
GRANT SELECT, INSERT, UPDATE, DELETE ON erasures TO api_system;
GRANT SELECT, INSERT, DELETE ON security_events TO api_system;
GRANT SELECT, INSERT ON audit_log TO api_system;

ALTER TABLE erasures ENABLE ROW LEVEL SECURITY;
ALTER TABLE erasures FORCE ROW LEVEL SECURITY;
CREATE POLICY system ON erasures TO api_system USING (true);

ALTER TABLE security_events ENABLE ROW LEVEL SECURITY;
ALTER TABLE security_events FORCE ROW LEVEL SECURITY;
CREATE POLICY system ON security_events TO api_system USING (true);

ALTER TABLE audit_log ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit_log FORCE ROW LEVEL SECURITY;
CREATE POLICY system ON audit_log TO api_system USING (true);
"""

# Whoever changes the row, a DBA by hand, too. The condition of a trigger for DELETE cannot name the new row.
TOLD = """
CREATE FUNCTION tell_of_user() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_notify('users', old.subject);
  RETURN NULL;
END $$;
CREATE TRIGGER users_changed AFTER UPDATE ON users FOR EACH ROW
  WHEN ((old.id, old.issuer, old.subject, old.status, old.roles, old.tokens_valid_after) IS DISTINCT FROM
        (new.id, new.issuer, new.subject, new.status, new.roles, new.tokens_valid_after))
  EXECUTE FUNCTION tell_of_user();
CREATE TRIGGER users_gone AFTER DELETE ON users FOR EACH ROW EXECUTE FUNCTION tell_of_user();
"""

# What was said before an erasure stays older than what was known then.
REMEMBERED = """
CREATE FUNCTION remember_erasure() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE known erasures;
BEGIN
  SELECT * INTO known FROM erasures WHERE issuer = new.issuer AND subject = new.subject;
  IF FOUND THEN
    IF known.claims_at IS NOT NULL AND new.claims_at >= known.claims_at IS NOT TRUE THEN
      new.roles := known.roles;
      new.claims_at := known.claims_at;
    END IF;
    new.tokens_valid_after := greatest(new.tokens_valid_after, known.tokens_valid_after);
    new.status_at := greatest(new.status_at, known.status_at);
  END IF;
  RETURN new;
END $$;
CREATE TRIGGER users_known_before BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION remember_erasure();
"""

WRITTEN_ONCE = """
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION '% is written once', tg_table_name USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER audit_log_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
  FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
"""


def timestamp(name: str, default: str | None = None) -> sa.Column[object]:
    return sa.Column(
        name, sa.DateTime(timezone=True), nullable=default is None, server_default=sa.text(default) if default else None
    )


def upgrade() -> None:
    op.add_column("users", timestamp("status_at"))
    op.create_index("users_by_creation", "users", ["created_at", "id"])
    op.create_table(
        "erasures",
        sa.Column("issuer", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("roles", postgresql.ARRAY(sa.Text()), nullable=False),
        timestamp("claims_at"),
        timestamp("tokens_valid_after"),
        timestamp("status_at"),
        timestamp("erased_at", "now()"),
        sa.PrimaryKeyConstraint("issuer", "subject"),
    )
    op.create_table(
        "security_events",
        sa.Column("issuer", sa.Text(), nullable=False),
        sa.Column("jti", sa.Text(), nullable=False),
        timestamp("received_at", "now()"),
        sa.PrimaryKeyConstraint("issuer", "jti"),
    )
    op.create_index("security_events_by_age", "security_events", ["received_at"])
    op.create_table(
        "audit_log",
        sa.Column("id", sa.Uuid(), server_default=sa.text("uuidv7()"), nullable=False),
        timestamp("at", "clock_timestamp()"),
        sa.Column("actor", sa.Uuid()),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("user_id", sa.Uuid()),
        sa.Column("details", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("request_id", sa.Text()),
        sa.PrimaryKeyConstraint("id"),
        sa.CheckConstraint("source in ('admin', 'event', 'self')", name="audit_log_source"),
    )
    op.create_index("audit_log_by_time", "audit_log", ["at", "id"])
    op.create_index("audit_log_by_user", "audit_log", ["user_id", "at", "id"])
    for statements in POLICIES, TOLD, REMEMBERED, WRITTEN_ONCE:
        op.execute(statements)


def downgrade() -> None:
    op.execute("DROP TRIGGER users_changed ON users")
    op.execute("DROP TRIGGER users_gone ON users")
    op.execute("DROP TRIGGER users_known_before ON users")
    for table in "audit_log", "security_events", "erasures":
        op.drop_table(table)
    for function in "tell_of_user", "remember_erasure", "refuse_change":
        op.execute(f"DROP FUNCTION {function}")
    op.drop_index("users_by_creation")
    op.drop_column("users", "status_at")
