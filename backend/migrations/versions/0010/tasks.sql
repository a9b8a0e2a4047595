-- The example domain, and what is kept for all owned rows.
--
-- `priority` is text: comparisons of an enum type are not leakproof, and row-level security would keep them from every
-- index. `folded`: no folded text has a capital letter, so a search cannot match across the X between the two texts.

CREATE TABLE tasks (
  owner_id uuid NOT NULL,
  id uuid DEFAULT uuidv7() NOT NULL,
  title text COLLATE "C" NOT NULL,
  description text,
  status text NOT NULL,
  priority text NOT NULL,
  due_at timestamptz,
  completed_at timestamptz,
  version integer DEFAULT 1 NOT NULL,
  created_at timestamptz DEFAULT now() NOT NULL,
  updated_at timestamptz DEFAULT now() NOT NULL,
  deleted_at timestamptz,
  folded text GENERATED ALWAYS AS (
    (casefold(title COLLATE pg_unicode_fast) || 'X'::text)
    || casefold(COALESCE(description, ''::text) COLLATE pg_unicode_fast)
  ) STORED NOT NULL,
  n bigint NOT NULL,
  tag_names text[] DEFAULT '{}' NOT NULL,
  PRIMARY KEY (owner_id, id),
  FOREIGN KEY (owner_id) REFERENCES users (id) ON DELETE CASCADE,
  CONSTRAINT tasks_title_length CHECK (char_length(title) BETWEEN 1 AND 200),
  CONSTRAINT tasks_description_length CHECK (char_length(description) <= 10000),
  CONSTRAINT tasks_status CHECK (status IN ('todo', 'in_progress', 'done')),
  CONSTRAINT tasks_priority CHECK (priority IN ('low', 'normal', 'high', 'urgent')),
  CONSTRAINT tasks_completed_when_done CHECK ((status = 'done') = (completed_at IS NOT NULL))
);
-- Index-only scans need a recent vacuum.
ALTER TABLE tasks SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.02);

CREATE TABLE tags (
  owner_id uuid NOT NULL,
  id uuid DEFAULT uuidv7() NOT NULL,
  name text NOT NULL,
  folded text COLLATE "C" GENERATED ALWAYS AS (casefold(name COLLATE pg_unicode_fast)) STORED NOT NULL,
  PRIMARY KEY (owner_id, id),
  CONSTRAINT tags_name UNIQUE (owner_id, folded),
  FOREIGN KEY (owner_id) REFERENCES users (id) ON DELETE CASCADE,
  CONSTRAINT tags_name_length CHECK (char_length(name) BETWEEN 1 AND 50)
);

CREATE TABLE task_tags (
  owner_id uuid NOT NULL,
  task_id uuid NOT NULL,
  tag_id uuid NOT NULL,
  PRIMARY KEY (owner_id, task_id, tag_id),
  FOREIGN KEY (owner_id, task_id) REFERENCES tasks (owner_id, id) ON DELETE CASCADE,
  FOREIGN KEY (owner_id, tag_id) REFERENCES tags (owner_id, id) ON DELETE CASCADE
);
CREATE INDEX task_tags_by_tag ON task_tags (owner_id, tag_id, task_id);

CREATE TABLE idempotency_keys (
  owner_id uuid NOT NULL,
  key text NOT NULL,
  fingerprint bytea NOT NULL,
  status integer NOT NULL,
  headers json NOT NULL,
  body text NOT NULL,
  created_at timestamptz DEFAULT now() NOT NULL,
  PRIMARY KEY (owner_id, key),
  FOREIGN KEY (owner_id) REFERENCES users (id) ON DELETE CASCADE,
  CONSTRAINT idempotency_keys_length CHECK (char_length(key) BETWEEN 1 AND 255)
);
CREATE INDEX idempotency_keys_to_purge ON idempotency_keys (created_at);

-- `n`: the last change number of an owner. `purged`: changes up to this one may lack tombstones.
CREATE TABLE change_counters (
  owner_id uuid NOT NULL,
  n bigint DEFAULT 0 NOT NULL,
  purged bigint DEFAULT 0 NOT NULL,
  PRIMARY KEY (owner_id),
  FOREIGN KEY (owner_id) REFERENCES users (id) ON DELETE CASCADE
);

-- One index per sort order of the list. The text indexes cover search with all sorts and filters; texts that are too
-- long for an index entry have one of their own.
CREATE INDEX tasks_by_creation ON tasks (owner_id, created_at, id) WHERE deleted_at IS NULL;
CREATE INDEX tasks_by_change ON tasks (owner_id, updated_at, id) WHERE deleted_at IS NULL;
CREATE INDEX tasks_by_due_date
  ON tasks (owner_id, (CASE WHEN due_at IS NULL THEN 'infinity'::timestamptz ELSE due_at END), id)
  WHERE deleted_at IS NULL;
CREATE INDEX tasks_by_due_date_descending
  ON tasks (owner_id, (CASE WHEN due_at IS NULL THEN '-infinity'::timestamptz ELSE due_at END), id)
  WHERE deleted_at IS NULL;
CREATE INDEX tasks_by_priority ON tasks (owner_id, (CASE
    WHEN priority = 'low' THEN 0
    WHEN priority = 'normal' THEN 1
    WHEN priority = 'high' THEN 2
    WHEN priority = 'urgent' THEN 3
  END), id) WHERE deleted_at IS NULL;
CREATE INDEX tasks_by_title ON tasks (owner_id, title, id) WHERE deleted_at IS NULL;
CREATE INDEX tasks_by_number ON tasks (owner_id, n, id);
CREATE INDEX tasks_in_the_bin ON tasks (owner_id, deleted_at) WHERE deleted_at IS NOT NULL;
CREATE INDEX tasks_to_purge ON tasks (deleted_at, owner_id, id) WHERE deleted_at IS NOT NULL;
CREATE INDEX tasks_by_text ON tasks (owner_id, id)
  INCLUDE (folded, title, status, priority, due_at, created_at, updated_at)
  WHERE deleted_at IS NULL AND octet_length(folded) <= 1500;
CREATE INDEX tasks_by_long_text ON tasks (owner_id, id) WHERE deleted_at IS NULL AND octet_length(folded) > 1500;
