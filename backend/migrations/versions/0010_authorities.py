"""Two authorities refuse a person, each in a column of its own: administrators of this API, and Better Auth."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

SOURCES = "source in ('admin', 'cli', 'event', 'self')"

# A row that is suspended belongs to the authority whose last entry in the audit log refuses the person, or to both.
# Every event has its entry, so a suspension without one is not Better Auth's: it was set with SQL, and stays until an
# administrator lifts it. The time that ordered both authorities' acts still orders the events of an active person.
DERIVED = """
ALTER TABLE users NO FORCE ROW LEVEL SECURITY;
ALTER TABLE erasures NO FORCE ROW LEVEL SECURITY;
ALTER TABLE audit_log NO FORCE ROW LEVEL SECURITY;
UPDATE erasures SET banned_at = status_at WHERE status_at IS NOT NULL;
UPDATE users SET banned_at = status_at WHERE status = 'active' AND status_at IS NOT NULL;
UPDATE users SET
  banned = coalesce(event.refuses, false),
  banned_at = event.toe,
  suspended_here = coalesce(administrator.refuses, false) OR NOT coalesce(event.refuses, false)
FROM users AS one
LEFT JOIN LATERAL (
  SELECT action = 'account-disabled' AS refuses, (details->>'toe')::timestamptz AS toe FROM audit_log
  WHERE user_id = one.id AND source = 'event' AND action IN ('account-disabled', 'account-enabled')
  ORDER BY toe DESC, at DESC, audit_log.id DESC LIMIT 1
) event ON true
LEFT JOIN LATERAL (
  SELECT action = 'suspend' AS refuses FROM audit_log
  WHERE user_id = one.id AND source = 'admin' AND action IN ('suspend', 'reinstate')
  ORDER BY at DESC, audit_log.id DESC LIMIT 1
) administrator ON true
WHERE users.id = one.id AND one.status = 'suspended';
ALTER TABLE users FORCE ROW LEVEL SECURITY;
ALTER TABLE erasures FORCE ROW LEVEL SECURITY;
ALTER TABLE audit_log FORCE ROW LEVEL SECURITY;
"""

# `status` follows from the two columns. A status that is written alone comes from a worker of an older version, or from
# SQL: to suspend is an act of this API's administrators, and to activate lifts both.
FOLLOWS = """
CREATE FUNCTION follow_authorities() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF new.status = 'purged' THEN
    RETURN new;
  END IF;
  IF new.status IS DISTINCT FROM old.status
     AND new.suspended_here = coalesce(old.suspended_here, false) AND new.banned = coalesce(old.banned, false) THEN
    new.suspended_here := new.status = 'suspended';
    new.banned := new.banned AND new.status = 'suspended';
  END IF;
  new.status := CASE WHEN new.suspended_here OR new.banned THEN 'suspended' ELSE 'active' END;
  IF new.status <> old.status AND new.status_at IS NOT DISTINCT FROM old.status_at THEN
    new.status_at := now();
  END IF;
  RETURN new;
END $$;
CREATE TRIGGER users_made_with_status BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION follow_authorities();
CREATE TRIGGER users_status BEFORE UPDATE ON users FOR EACH ROW
  WHEN ((old.status, old.suspended_here, old.banned) IS DISTINCT FROM (new.status, new.suspended_here, new.banned))
  EXECUTE FUNCTION follow_authorities();
"""

TOLD = """
DROP TRIGGER users_changed ON users;
CREATE TRIGGER users_changed AFTER UPDATE ON users FOR EACH ROW
  WHEN ((old.id, old.issuer, old.subject, old.status, {columns}old.roles, old.tokens_valid_after) IS DISTINCT FROM
        (new.id, new.issuer, new.subject, new.status, {others}new.roles, new.tokens_valid_after))
  EXECUTE FUNCTION tell_of_user();
"""

# As in 0005, and the time of Better Auth's last word.
REMEMBERED = """
CREATE OR REPLACE FUNCTION remember_erasure() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE known erasures;
BEGIN
  SELECT * INTO known FROM erasures WHERE issuer = new.issuer AND subject = new.subject;
  IF FOUND THEN
    IF known.claims_at IS NOT NULL AND new.claims_at >= known.claims_at IS NOT TRUE THEN
      new.roles := known.roles;
      new.claims_at := known.claims_at;
    END IF;
    new.tokens_valid_after := greatest(new.tokens_valid_after, known.tokens_valid_after);
    new.status_at := greatest(new.status_at, known.status_at);{more}
  END IF;
  RETURN new;
END $$;
"""


def upgrade() -> None:
    op.drop_constraint("audit_log_source", "audit_log")
    op.create_check_constraint("audit_log_source", "audit_log", SOURCES)
    op.add_column("erasures", sa.Column("banned_at", sa.DateTime(timezone=True)))
    for name in "suspended_here", "banned":
        op.add_column("users", sa.Column(name, sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.add_column("users", sa.Column("banned_at", sa.DateTime(timezone=True)))
    op.execute(DERIVED)
    op.execute(FOLLOWS)
    op.execute(TOLD.format(columns="old.suspended_here, old.banned, ", others="new.suspended_here, new.banned, "))
    op.execute(REMEMBERED.format(more="\n    new.banned_at := greatest(new.banned_at, known.banned_at);"))


def downgrade() -> None:
    op.execute(REMEMBERED.format(more=""))
    op.execute(TOLD.format(columns="", others=""))
    op.execute("DROP TRIGGER users_made_with_status ON users")
    op.execute("DROP TRIGGER users_status ON users")
    op.execute("DROP FUNCTION follow_authorities")
    for name in "suspended_here", "banned", "banned_at":
        op.drop_column("users", name)
    op.drop_column("erasures", "banned_at")
