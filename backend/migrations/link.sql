-- What `link` in `backend.migrations` executes; it fills in the names in braces.

CREATE FUNCTION names_of_{labels}{suffix}(owner uuid, {row} uuid) RETURNS text[] LANGUAGE sql STABLE
RETURN array(
  SELECT {labels}.name
  FROM {table} JOIN {labels} ON {labels}.owner_id = {table}.owner_id AND {labels}.id = {table}.{label}_id
  WHERE {table}.owner_id = owner AND {table}.{row}_id = {row} ORDER BY {labels}.folded
);

-- Locks the rows first, so that the names include what concurrent transactions committed. A row with other names gets a
-- new version, unless this transaction has already made one.
CREATE FUNCTION show_{labels}{suffix}(owners uuid[], changed uuid[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM FROM {rows} WHERE (owner_id, id) IN (SELECT * FROM unnest(owners, changed)) ORDER BY owner_id, id
  FOR NO KEY UPDATE;
  IF FOUND THEN
    WITH told AS MATERIALIZED (
      SELECT owner, {row}, names_of_{labels}{suffix}(owner, {row}) AS names FROM unnest(owners, changed) AS one (owner, {row})
    )
    UPDATE {rows} SET
      {names} = told.names,
      version = version + CASE WHEN {rows}.xmin = pg_current_xact_id()::xid THEN 0 ELSE 1 END,
      updated_at = CASE WHEN {rows}.xmin = pg_current_xact_id()::xid THEN updated_at ELSE greatest(updated_at, now()) END
    FROM told WHERE owner_id = told.owner AND id = told.{row} AND {names} <> told.names;
  END IF;
END $$;

CREATE FUNCTION show_links{suffix}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM show_{labels}{suffix}(array_agg(owner_id), array_agg({row}_id)) FROM (SELECT DISTINCT owner_id, {row}_id FROM links) one;
  RETURN NULL;
END $$;

CREATE FUNCTION show_new_names{suffix}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM show_{labels}{suffix}(array_agg(owner_id), array_agg({row}_id))
  FROM (SELECT DISTINCT link.owner_id, {row}_id FROM renamed JOIN {table} link
        ON link.owner_id = renamed.owner_id AND link.{label}_id = renamed.id) one;
  RETURN NULL;
END $$;

-- A cascade would run as the owner of the tables, from whom row-level security hides the rows.
CREATE FUNCTION unlink{suffix}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  DELETE FROM {table} WHERE owner_id = old.owner_id AND {label}_id = old.id;
  RETURN old;
END $$;

CREATE TRIGGER show_new_links AFTER INSERT ON {table} REFERENCING NEW TABLE AS links
  FOR EACH STATEMENT EXECUTE FUNCTION show_links{suffix}();
CREATE TRIGGER show_old_links AFTER DELETE ON {table} REFERENCING OLD TABLE AS links
  FOR EACH STATEMENT EXECUTE FUNCTION show_links{suffix}();
CREATE TRIGGER show_links_as_they_are AFTER UPDATE ON {table} REFERENCING NEW TABLE AS links
  FOR EACH STATEMENT EXECUTE FUNCTION show_links{suffix}();
CREATE TRIGGER show_links_as_they_were AFTER UPDATE ON {table} REFERENCING OLD TABLE AS links
  FOR EACH STATEMENT EXECUTE FUNCTION show_links{suffix}();
CREATE TRIGGER show_new_names{suffix} AFTER UPDATE ON {labels} REFERENCING NEW TABLE AS renamed
  FOR EACH STATEMENT EXECUTE FUNCTION show_new_names{suffix}();
CREATE TRIGGER unlink{suffix} BEFORE DELETE ON {labels} FOR EACH ROW EXECUTE FUNCTION unlink{suffix}();
