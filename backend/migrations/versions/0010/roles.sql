-- The roles that every statement runs as.
DO $$
DECLARE name text;
BEGIN
  FOREACH name IN ARRAY ARRAY['api_user', 'api_system'] LOOP
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
      BEGIN
        EXECUTE format('CREATE ROLE %I NOLOGIN', name);
      EXCEPTION WHEN duplicate_object OR unique_violation THEN
        NULL;  -- another database of this cluster was migrated at the same moment
      END;
    END IF;
    IF NOT pg_has_role(current_user, name, 'SET') THEN
      -- PostgreSQL does not grant SET to the creator of a role.
      EXECUTE format('GRANT %I TO CURRENT_USER WITH INHERIT FALSE, SET TRUE', name);
    END IF;
  END LOOP;
END $$;
