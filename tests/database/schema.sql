CREATE FUNCTION public.await_turn() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
DECLARE caller text := current_setting('app.caller', true);
BEGIN
  IF caller <> '' THEN
    PERFORM pg_advisory_xact_lock(hashtextextended('changes of ' || caller, 0));
  END IF;
  RETURN NULL;
END $$;

CREATE FUNCTION public.follow_authorities() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION public.forget_changes() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
  UPDATE change_counters counter
  SET n = counter.n + lost.live, purged = greatest(counter.purged, lost.n, lost.live * (counter.n + 1))
  FROM (SELECT owner_id, max(n) AS n, max((deleted_at IS NULL)::int) AS live FROM gone GROUP BY owner_id) lost
  WHERE counter.owner_id = lost.owner_id;
  RETURN NULL;
END $$;

CREATE FUNCTION public.lock_changes(owner uuid) RETURNS void
    LANGUAGE plpgsql
    AS $$
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('changes of ' || owner, 0));
END $$;

CREATE TABLE public.tags (
    owner_id uuid NOT NULL,
    id uuid DEFAULT uuidv7() NOT NULL,
    name text NOT NULL,
    folded text GENERATED ALWAYS AS (casefold((name COLLATE pg_unicode_fast))) STORED NOT NULL COLLATE pg_catalog."C",
    CONSTRAINT tags_name_length CHECK (((char_length(name) >= 1) AND (char_length(name) <= 50)))
);

ALTER TABLE ONLY public.tags FORCE ROW LEVEL SECURITY;

CREATE TABLE public.task_tags (
    owner_id uuid NOT NULL,
    task_id uuid NOT NULL,
    tag_id uuid NOT NULL
);

ALTER TABLE ONLY public.task_tags FORCE ROW LEVEL SECURITY;

CREATE FUNCTION public.names_of_tags(owner uuid, task uuid) RETURNS text[]
    LANGUAGE sql STABLE
    RETURN ARRAY(SELECT tags.name FROM (public.task_tags JOIN public.tags ON (((tags.owner_id = task_tags.owner_id) AND (tags.id = task_tags.tag_id)))) WHERE ((task_tags.owner_id = names_of_tags.owner) AND (task_tags.task_id = names_of_tags.task)) ORDER BY tags.folded);

CREATE FUNCTION public.number_change() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION public.refuse_change() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
  RAISE EXCEPTION '% is written once', tg_table_name USING ERRCODE = 'insufficient_privilege';
END $$;

CREATE FUNCTION public.remember_erasure() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
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
    new.banned_at := greatest(new.banned_at, known.banned_at);
  END IF;
  RETURN new;
END $$;

CREATE FUNCTION public.show_links() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
  PERFORM show_tags(array_agg(owner_id), array_agg(task_id)) FROM (SELECT DISTINCT owner_id, task_id FROM links) one;
  RETURN NULL;
END $$;

CREATE FUNCTION public.show_new_names() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
  PERFORM show_tags(array_agg(owner_id), array_agg(task_id))
  FROM (SELECT DISTINCT link.owner_id, task_id FROM renamed JOIN task_tags link
        ON link.owner_id = renamed.owner_id AND link.tag_id = renamed.id) one;
  RETURN NULL;
END $$;

CREATE FUNCTION public.show_tags(owners uuid[], changed uuid[]) RETURNS void
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION public.tell_of_user() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
  PERFORM pg_notify('users', old.subject);
  RETURN NULL;
END $$;

CREATE FUNCTION public.unlink() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
  DELETE FROM task_tags WHERE owner_id = old.owner_id AND tag_id = old.id;
  RETURN old;
END $$;

CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);

CREATE TABLE public.audit_log (
    id uuid DEFAULT uuidv7() NOT NULL,
    at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    actor uuid,
    source text NOT NULL,
    action text NOT NULL,
    subject text NOT NULL,
    user_id uuid,
    details jsonb DEFAULT '{}'::jsonb NOT NULL,
    request_id text,
    CONSTRAINT audit_log_source CHECK ((source = ANY (ARRAY['admin'::text, 'cli'::text, 'event'::text, 'self'::text])))
);

ALTER TABLE ONLY public.audit_log FORCE ROW LEVEL SECURITY;

CREATE TABLE public.change_counters (
    owner_id uuid NOT NULL,
    n bigint DEFAULT 0 NOT NULL,
    purged bigint DEFAULT 0 NOT NULL
);

ALTER TABLE ONLY public.change_counters FORCE ROW LEVEL SECURITY;

CREATE TABLE public.erasures (
    issuer text NOT NULL,
    subject text NOT NULL,
    roles text[] NOT NULL,
    claims_at timestamp with time zone,
    tokens_valid_after timestamp with time zone,
    status_at timestamp with time zone,
    erased_at timestamp with time zone DEFAULT now() NOT NULL,
    banned_at timestamp with time zone
);

ALTER TABLE ONLY public.erasures FORCE ROW LEVEL SECURITY;

CREATE TABLE public.idempotency_keys (
    owner_id uuid NOT NULL,
    key text NOT NULL,
    fingerprint bytea NOT NULL,
    status integer NOT NULL,
    headers json NOT NULL,
    body text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT idempotency_keys_length CHECK (((char_length(key) >= 1) AND (char_length(key) <= 255)))
);

ALTER TABLE ONLY public.idempotency_keys FORCE ROW LEVEL SECURITY;

CREATE TABLE public.security_events (
    issuer text NOT NULL,
    jti text NOT NULL,
    received_at timestamp with time zone DEFAULT now() NOT NULL
);

ALTER TABLE ONLY public.security_events FORCE ROW LEVEL SECURITY;

CREATE TABLE public.tasks (
    owner_id uuid NOT NULL,
    id uuid DEFAULT uuidv7() NOT NULL,
    title text NOT NULL COLLATE pg_catalog."C",
    description text,
    status text NOT NULL,
    priority text NOT NULL,
    due_at timestamp with time zone,
    completed_at timestamp with time zone,
    version integer DEFAULT 1 NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    deleted_at timestamp with time zone,
    folded text GENERATED ALWAYS AS (((casefold((title COLLATE pg_unicode_fast)) || 'X'::text) || casefold((COALESCE(description, ''::text) COLLATE pg_unicode_fast)))) STORED NOT NULL,
    n bigint NOT NULL,
    tag_names text[] DEFAULT '{}'::text[] NOT NULL,
    CONSTRAINT tasks_completed_when_done CHECK (((status = 'done'::text) = (completed_at IS NOT NULL))),
    CONSTRAINT tasks_description_length CHECK ((char_length(description) <= 10000)),
    CONSTRAINT tasks_priority CHECK ((priority = ANY (ARRAY['low'::text, 'normal'::text, 'high'::text, 'urgent'::text]))),
    CONSTRAINT tasks_status CHECK ((status = ANY (ARRAY['todo'::text, 'in_progress'::text, 'done'::text]))),
    CONSTRAINT tasks_title_length CHECK (((char_length(title) >= 1) AND (char_length(title) <= 200)))
)
WITH (autovacuum_vacuum_scale_factor='0.02', autovacuum_vacuum_insert_scale_factor='0.02');

ALTER TABLE ONLY public.tasks FORCE ROW LEVEL SECURITY;

CREATE TABLE public.users (
    id uuid DEFAULT uuidv7() NOT NULL,
    issuer text NOT NULL,
    subject text NOT NULL,
    email text,
    email_verified boolean DEFAULT false NOT NULL,
    name text,
    image text,
    roles text[] DEFAULT '{}'::text[] NOT NULL,
    is_anonymous boolean DEFAULT false NOT NULL,
    claims_at timestamp with time zone,
    status text DEFAULT 'active'::text NOT NULL,
    tokens_valid_after timestamp with time zone,
    time_zone text,
    locale text,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    status_at timestamp with time zone,
    suspended_here boolean DEFAULT false NOT NULL,
    banned boolean DEFAULT false NOT NULL,
    banned_at timestamp with time zone,
    CONSTRAINT users_status CHECK ((status = ANY (ARRAY['active'::text, 'suspended'::text, 'purged'::text]))),
    CONSTRAINT users_subject_length CHECK (((char_length(subject) >= 1) AND (char_length(subject) <= 255)))
);

ALTER TABLE ONLY public.users FORCE ROW LEVEL SECURITY;

ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);

ALTER TABLE ONLY public.audit_log
    ADD CONSTRAINT audit_log_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.change_counters
    ADD CONSTRAINT change_counters_pkey PRIMARY KEY (owner_id);

ALTER TABLE ONLY public.erasures
    ADD CONSTRAINT erasures_pkey PRIMARY KEY (issuer, subject);

ALTER TABLE ONLY public.idempotency_keys
    ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (owner_id, key);

ALTER TABLE ONLY public.security_events
    ADD CONSTRAINT security_events_pkey PRIMARY KEY (issuer, jti);

ALTER TABLE ONLY public.tags
    ADD CONSTRAINT tags_name UNIQUE (owner_id, folded);

ALTER TABLE ONLY public.tags
    ADD CONSTRAINT tags_pkey PRIMARY KEY (owner_id, id);

ALTER TABLE ONLY public.task_tags
    ADD CONSTRAINT task_tags_pkey PRIMARY KEY (owner_id, task_id, tag_id);

ALTER TABLE ONLY public.tasks
    ADD CONSTRAINT tasks_pkey PRIMARY KEY (owner_id, id);

ALTER TABLE ONLY public.users
    ADD CONSTRAINT users_issuer_subject_key UNIQUE (issuer, subject);

ALTER TABLE ONLY public.users
    ADD CONSTRAINT users_pkey PRIMARY KEY (id);

CREATE INDEX audit_log_by_time ON public.audit_log USING btree (at, id);

CREATE INDEX audit_log_by_user ON public.audit_log USING btree (user_id, at, id);

CREATE INDEX erasures_by_age ON public.erasures USING btree (erased_at);

CREATE INDEX idempotency_keys_to_purge ON public.idempotency_keys USING btree (created_at);

CREATE INDEX security_events_by_age ON public.security_events USING btree (received_at);

CREATE INDEX task_tags_by_tag ON public.task_tags USING btree (owner_id, tag_id, task_id);

CREATE INDEX tasks_by_change ON public.tasks USING btree (owner_id, updated_at, id) WHERE (deleted_at IS NULL);

CREATE INDEX tasks_by_creation ON public.tasks USING btree (owner_id, created_at, id) WHERE (deleted_at IS NULL);

CREATE INDEX tasks_by_due_date ON public.tasks USING btree (owner_id, (
CASE
    WHEN (due_at IS NULL) THEN 'infinity'::timestamp with time zone
    ELSE due_at
END), id) WHERE (deleted_at IS NULL);

CREATE INDEX tasks_by_due_date_descending ON public.tasks USING btree (owner_id, (
CASE
    WHEN (due_at IS NULL) THEN '-infinity'::timestamp with time zone
    ELSE due_at
END), id) WHERE (deleted_at IS NULL);

CREATE INDEX tasks_by_long_text ON public.tasks USING btree (owner_id, id) WHERE ((deleted_at IS NULL) AND (octet_length(folded) > 1500));

CREATE INDEX tasks_by_number ON public.tasks USING btree (owner_id, n, id);

CREATE INDEX tasks_by_priority ON public.tasks USING btree (owner_id, (
CASE
    WHEN (priority = 'low'::text) THEN 0
    WHEN (priority = 'normal'::text) THEN 1
    WHEN (priority = 'high'::text) THEN 2
    WHEN (priority = 'urgent'::text) THEN 3
    ELSE NULL::integer
END), id) WHERE (deleted_at IS NULL);

CREATE INDEX tasks_by_text ON public.tasks USING btree (owner_id, id) INCLUDE (folded, title, status, priority, due_at, created_at, updated_at) WHERE ((deleted_at IS NULL) AND (octet_length(folded) <= 1500));

CREATE INDEX tasks_by_title ON public.tasks USING btree (owner_id, title, id) WHERE (deleted_at IS NULL);

CREATE INDEX tasks_in_the_bin ON public.tasks USING btree (owner_id, deleted_at) WHERE (deleted_at IS NOT NULL);

CREATE INDEX tasks_to_purge ON public.tasks USING btree (deleted_at, owner_id, id) WHERE (deleted_at IS NOT NULL);

CREATE INDEX users_by_creation ON public.users USING btree (created_at, id);

CREATE TRIGGER audit_log_stays BEFORE DELETE OR UPDATE OR TRUNCATE ON public.audit_log FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_change();

CREATE TRIGGER await_turn BEFORE DELETE OR UPDATE ON public.tasks FOR EACH STATEMENT EXECUTE FUNCTION public.await_turn();

CREATE TRIGGER forget_changes AFTER DELETE ON public.tasks REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION public.forget_changes();

CREATE TRIGGER number_change BEFORE INSERT OR UPDATE ON public.tasks FOR EACH ROW EXECUTE FUNCTION public.number_change('folded');

CREATE TRIGGER show_links_as_they_are AFTER UPDATE ON public.task_tags REFERENCING NEW TABLE AS links FOR EACH STATEMENT EXECUTE FUNCTION public.show_links();

CREATE TRIGGER show_links_as_they_were AFTER UPDATE ON public.task_tags REFERENCING OLD TABLE AS links FOR EACH STATEMENT EXECUTE FUNCTION public.show_links();

CREATE TRIGGER show_new_links AFTER INSERT ON public.task_tags REFERENCING NEW TABLE AS links FOR EACH STATEMENT EXECUTE FUNCTION public.show_links();

CREATE TRIGGER show_new_names AFTER UPDATE ON public.tags REFERENCING NEW TABLE AS renamed FOR EACH STATEMENT EXECUTE FUNCTION public.show_new_names();

CREATE TRIGGER show_old_links AFTER DELETE ON public.task_tags REFERENCING OLD TABLE AS links FOR EACH STATEMENT EXECUTE FUNCTION public.show_links();

CREATE TRIGGER unlink BEFORE DELETE ON public.tags FOR EACH ROW EXECUTE FUNCTION public.unlink();

CREATE TRIGGER users_changed AFTER UPDATE ON public.users FOR EACH ROW WHEN (((((((((old.id IS DISTINCT FROM new.id) OR (old.issuer IS DISTINCT FROM new.issuer)) OR (old.subject IS DISTINCT FROM new.subject)) OR (old.status IS DISTINCT FROM new.status)) OR (old.suspended_here IS DISTINCT FROM new.suspended_here)) OR (old.banned IS DISTINCT FROM new.banned)) OR (old.roles IS DISTINCT FROM new.roles)) OR (old.tokens_valid_after IS DISTINCT FROM new.tokens_valid_after))) EXECUTE FUNCTION public.tell_of_user();

CREATE TRIGGER users_gone AFTER DELETE ON public.users FOR EACH ROW EXECUTE FUNCTION public.tell_of_user();

CREATE TRIGGER users_known_before BEFORE INSERT ON public.users FOR EACH ROW EXECUTE FUNCTION public.remember_erasure();

CREATE TRIGGER users_made_with_status BEFORE INSERT ON public.users FOR EACH ROW EXECUTE FUNCTION public.follow_authorities();

CREATE TRIGGER users_status BEFORE UPDATE ON public.users FOR EACH ROW WHEN ((((old.status IS DISTINCT FROM new.status) OR (old.suspended_here IS DISTINCT FROM new.suspended_here)) OR (old.banned IS DISTINCT FROM new.banned))) EXECUTE FUNCTION public.follow_authorities();

ALTER TABLE ONLY public.change_counters
    ADD CONSTRAINT change_counters_owner_id_fkey FOREIGN KEY (owner_id) REFERENCES public.users(id) ON DELETE CASCADE;

ALTER TABLE ONLY public.idempotency_keys
    ADD CONSTRAINT idempotency_keys_owner_id_fkey FOREIGN KEY (owner_id) REFERENCES public.users(id) ON DELETE CASCADE;

ALTER TABLE ONLY public.tags
    ADD CONSTRAINT tags_owner_id_fkey FOREIGN KEY (owner_id) REFERENCES public.users(id) ON DELETE CASCADE;

ALTER TABLE ONLY public.task_tags
    ADD CONSTRAINT task_tags_owner_id_tag_id_fkey FOREIGN KEY (owner_id, tag_id) REFERENCES public.tags(owner_id, id) ON DELETE CASCADE;

ALTER TABLE ONLY public.task_tags
    ADD CONSTRAINT task_tags_owner_id_task_id_fkey FOREIGN KEY (owner_id, task_id) REFERENCES public.tasks(owner_id, id) ON DELETE CASCADE;

ALTER TABLE ONLY public.tasks
    ADD CONSTRAINT tasks_owner_id_fkey FOREIGN KEY (owner_id) REFERENCES public.users(id) ON DELETE CASCADE;

ALTER TABLE public.audit_log ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.change_counters ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.erasures ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.idempotency_keys ENABLE ROW LEVEL SECURITY;

CREATE POLICY owner ON public.change_counters TO api_user USING ((owner_id = (NULLIF(current_setting('app.caller'::text, true), ''::text))::uuid));

CREATE POLICY owner ON public.idempotency_keys TO api_user USING ((owner_id = (NULLIF(current_setting('app.caller'::text, true), ''::text))::uuid));

CREATE POLICY owner ON public.tags TO api_user USING ((owner_id = (NULLIF(current_setting('app.caller'::text, true), ''::text))::uuid));

CREATE POLICY owner ON public.task_tags TO api_user USING ((owner_id = (NULLIF(current_setting('app.caller'::text, true), ''::text))::uuid));

CREATE POLICY owner ON public.tasks TO api_user USING ((owner_id = (NULLIF(current_setting('app.caller'::text, true), ''::text))::uuid));

CREATE POLICY owner ON public.users TO api_user USING ((id = (NULLIF(current_setting('app.caller'::text, true), ''::text))::uuid));

ALTER TABLE public.security_events ENABLE ROW LEVEL SECURITY;

CREATE POLICY system ON public.audit_log TO api_system USING (true);

CREATE POLICY system ON public.change_counters TO api_system USING (true);

CREATE POLICY system ON public.erasures TO api_system USING (true);

CREATE POLICY system ON public.idempotency_keys TO api_system USING (true);

CREATE POLICY system ON public.security_events TO api_system USING (true);

CREATE POLICY system ON public.tags TO api_system USING (true);

CREATE POLICY system ON public.task_tags TO api_system USING (true);

CREATE POLICY system ON public.tasks TO api_system USING (true);

CREATE POLICY system ON public.users TO api_system USING (true);

ALTER TABLE public.tags ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.task_tags ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.tasks ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.users ENABLE ROW LEVEL SECURITY;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.tags TO api_system;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.tags TO api_user;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.task_tags TO api_system;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.task_tags TO api_user;

GRANT SELECT,INSERT ON TABLE public.audit_log TO api_system;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.change_counters TO api_system;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.change_counters TO api_user;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.erasures TO api_system;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.idempotency_keys TO api_system;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.idempotency_keys TO api_user;

GRANT SELECT,INSERT,DELETE ON TABLE public.security_events TO api_system;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.tasks TO api_system;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.tasks TO api_user;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.users TO api_system;
GRANT SELECT ON TABLE public.users TO api_user;

GRANT UPDATE(time_zone) ON TABLE public.users TO api_user;

GRANT UPDATE(locale) ON TABLE public.users TO api_user;

GRANT UPDATE(updated_at) ON TABLE public.users TO api_user;
