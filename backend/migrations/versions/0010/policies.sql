-- Privileges and row-level security of users and of the tables that only the system reads. It is forced, so that it
-- also applies to the owner of the tables.

GRANT SELECT, INSERT, UPDATE, DELETE ON users TO api_system;
GRANT SELECT, UPDATE (time_zone, locale, updated_at) ON users TO api_user;
GRANT SELECT, INSERT, UPDATE, DELETE ON erasures TO api_system;
GRANT SELECT, INSERT, DELETE ON security_events TO api_system;
GRANT SELECT, INSERT ON audit_log TO api_system;

ALTER TABLE users ENABLE ROW LEVEL SECURITY;
ALTER TABLE users FORCE ROW LEVEL SECURITY;
CREATE POLICY owner ON users TO api_user USING (id = nullif(current_setting('app.caller', true), '')::uuid);
CREATE POLICY system ON users TO api_system USING (true);

ALTER TABLE erasures ENABLE ROW LEVEL SECURITY;
ALTER TABLE erasures FORCE ROW LEVEL SECURITY;
CREATE POLICY system ON erasures TO api_system USING (true);

ALTER TABLE security_events ENABLE ROW LEVEL SECURITY;
ALTER TABLE security_events FORCE ROW LEVEL SECURITY;
CREATE POLICY system ON security_events TO api_system USING (true);

ALTER TABLE audit_log ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit_log FORCE ROW LEVEL SECURITY;
CREATE POLICY system ON audit_log TO api_system USING (true);
