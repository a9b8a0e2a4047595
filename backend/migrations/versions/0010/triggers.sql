-- Users

-- `status` follows from `suspended_here` and `banned`. A status that is written alone comes from a worker of an older
-- version, or from SQL: to suspend is an act of this API's administrators, and to activate lifts both.
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

-- Workers cache users. Every change that affects access is announced, also one that is made with SQL.
CREATE FUNCTION tell_of_user() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_notify('users', old.subject);
  RETURN NULL;
END $$;
CREATE TRIGGER users_changed AFTER UPDATE ON users FOR EACH ROW
  WHEN (
    (old.id, old.issuer, old.subject, old.status, old.suspended_here, old.banned, old.roles, old.tokens_valid_after)
    IS DISTINCT FROM
    (new.id, new.issuer, new.subject, new.status, new.suspended_here, new.banned, new.roles, new.tokens_valid_after)
  )
  EXECUTE FUNCTION tell_of_user();
-- The condition of a trigger for DELETE cannot name the new row.
CREATE TRIGGER users_gone AFTER DELETE ON users FOR EACH ROW EXECUTE FUNCTION tell_of_user();

-- A new row of an erased account starts with the times that the erased row had, so that older claims, tokens and events
-- remain older.
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
    new.banned_at := greatest(new.banned_at, known.banned_at);
  END IF;
  RETURN new;
END $$;
CREATE TRIGGER users_known_before BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION remember_erasure();

-- The audit log is append-only.
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION '% is written once', tg_table_name USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER audit_log_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
  FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- Change numbers
-- Serializes the writers of one owner: the holder of the lock commits before the next writer takes a number.
CREATE FUNCTION lock_changes(owner uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('changes of ' || owner, 0));
END $$;

-- Before any row lock, so that writers cannot deadlock. For api_system, which has no caller, each row takes the lock.
CREATE FUNCTION await_turn() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE caller text := current_setting('app.caller', true);
BEGIN
  IF caller <> '' THEN
    PERFORM pg_advisory_xact_lock(hashtextextended('changes of ' || caller, 0));
  END IF;
  RETURN NULL;
END $$;

-- One number per owner and transaction, kept in a setting that ends with the transaction. Arguments: the generated
-- columns, which have no value yet.
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

-- A deleted row cannot be listed as a change: clients that have not seen its tombstone must start a new sync.
CREATE FUNCTION forget_changes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  UPDATE change_counters counter
  SET n = counter.n + lost.live, purged = greatest(counter.purged, lost.n, lost.live * (counter.n + 1))
  FROM (SELECT owner_id, max(n) AS n, max((deleted_at IS NULL)::int) AS live FROM gone GROUP BY owner_id) lost
  WHERE counter.owner_id = lost.owner_id;
  RETURN NULL;
END $$;
