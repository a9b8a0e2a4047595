-- The caller's row, and what is recorded about accounts.

CREATE TABLE users (
  id uuid DEFAULT uuidv7() NOT NULL,
  issuer text NOT NULL,
  subject text NOT NULL,
  email text,
  email_verified boolean DEFAULT false NOT NULL,
  name text,
  image text,
  roles text[] DEFAULT '{}' NOT NULL,
  is_anonymous boolean DEFAULT false NOT NULL,
  claims_at timestamptz,
  status text DEFAULT 'active' NOT NULL,
  tokens_valid_after timestamptz,
  time_zone text,
  locale text,
  created_at timestamptz DEFAULT now() NOT NULL,
  updated_at timestamptz DEFAULT now() NOT NULL,
  status_at timestamptz,
  suspended_here boolean DEFAULT false NOT NULL,
  banned boolean DEFAULT false NOT NULL,
  banned_at timestamptz,
  PRIMARY KEY (id),
  UNIQUE (issuer, subject),
  CONSTRAINT users_subject_length CHECK (char_length(subject) BETWEEN 1 AND 255),
  CONSTRAINT users_status CHECK (status IN ('active', 'suspended', 'purged'))
);
CREATE INDEX users_by_creation ON users (created_at, id);

-- The order of claims and events of an erased account: older ones must not take effect on a new row.
CREATE TABLE erasures (
  issuer text NOT NULL,
  subject text NOT NULL,
  roles text[] NOT NULL,
  claims_at timestamptz,
  tokens_valid_after timestamptz,
  status_at timestamptz,
  erased_at timestamptz DEFAULT now() NOT NULL,
  banned_at timestamptz,
  PRIMARY KEY (issuer, subject)
);
CREATE INDEX erasures_by_age ON erasures (erased_at);

CREATE TABLE security_events (
  issuer text NOT NULL,
  jti text NOT NULL,
  received_at timestamptz DEFAULT now() NOT NULL,
  PRIMARY KEY (issuer, jti)
);
CREATE INDEX security_events_by_age ON security_events (received_at);

CREATE TABLE audit_log (
  id uuid DEFAULT uuidv7() NOT NULL,
  at timestamptz DEFAULT clock_timestamp() NOT NULL,
  actor uuid,
  source text NOT NULL,
  action text NOT NULL,
  subject text NOT NULL,
  user_id uuid,
  details jsonb DEFAULT '{}' NOT NULL,
  request_id text,
  PRIMARY KEY (id),
  CONSTRAINT audit_log_source CHECK (source IN ('admin', 'cli', 'event', 'self'))
);
CREATE INDEX audit_log_by_time ON audit_log (at, id);
CREATE INDEX audit_log_by_user ON audit_log (user_id, at, id);
