"""The doctor's report on PostgreSQL and Redis, with the setting or statement that solves a problem."""

import socket
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from redis import Redis

from backend import migrations
from backend.auth.testing import LocalIssuer
from tests.conftest import create_database
from tests.database.test_migrations import as_login
from tests.doctor.report import SECRET, Report, assert_contains, settings_for
from tests.support.pgbouncer import pooler
from tests.support.redis_server import redis_server


@pytest.fixture
def database(postgres: str) -> str:
    """A migrated database for this test alone."""
    url = create_database(postgres, f"doctor_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    return url


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notification that does not arrive is awaited for 0.3 s instead of 3 s."""
    monkeypatch.setattr("backend.doctor.stores.PATIENCE", 0.3)


@pytest.fixture
def settings(jwks_url: str, issuer: LocalIssuer) -> dict[str, Any]:
    return settings_for(issuer, jwks_url)


async def test_a_missing_database_url_is_a_warning(settings: dict[str, Any]) -> None:
    report = await Report.of(**settings)
    assert report.failures() == []
    assert_contains(report.on("database"), ["warn", "DATABASE_URL is not set"])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"postgresql://api:{SECRET}@127.0.0.1:9/api", ["refused", "correct DATABASE_URL"]),
        (f"postgresql://api:{SECRET}#x@127.0.0.1/api", ["correct DATABASE_URL"]),
    ],
)
async def test_a_database_that_cannot_be_reached_is_reported(
    settings: dict[str, Any], url: str, words: list[str]
) -> None:
    (line,) = (await Report.of(**settings, database_url=url)).failures()
    assert_contains(line, ["FAIL  database", *words])


async def test_a_missing_login_or_database_is_reported(settings: dict[str, Any], database: str) -> None:
    (line,) = (await Report.of(**settings, database_url=as_login(database, "absent_login"))).failures()
    assert_contains(line, ['role "absent_login" does not exist', "correct DATABASE_URL"])
    elsewhere = database.replace("/doctor_", "/nowhere_")
    (line,) = (await Report.of(**settings, database_url=database, database_direct_url=elsewhere)).failures()
    assert_contains(line, ["does not exist", "correct DATABASE_DIRECT_URL"])


async def test_a_server_that_is_too_old_is_reported(
    settings: dict[str, Any], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "OLDEST_POSTGRES", 99)
    (line,) = (await Report.of(**settings, database_url=database_url)).failures()
    assert_contains(line, ["this is PostgreSQL 18; 99 or newer is required", "DATABASE_URL"])


async def test_a_database_without_migrations_is_reported(settings: dict[str, Any], postgres: str) -> None:
    empty = create_database(postgres, f"doctor_{uuid4().hex[:8]}")
    (line,) = (await Report.of(**settings, database_url=empty)).failures()
    assert_contains(line, ["FAIL  migrations", "run `resource-server migrate`"])


async def test_a_database_of_a_newer_version_is_reported(settings: dict[str, Any], database: str) -> None:
    execute(database, "UPDATE alembic_version SET version_num = '9999'")
    (line,) = (await Report.of(**settings, database_url=database)).failures()
    assert_contains(line, ["FAIL  migrations", "at revision 9999", "deploy a newer one"])


async def test_a_login_that_cannot_set_the_roles_is_reported_with_the_grant(
    settings: dict[str, Any], database: str
) -> None:
    """The GRANT in the report solves the problem."""
    login = f"plain_{uuid4().hex[:8]}"
    execute(database, f"CREATE ROLE {login} LOGIN", f"GRANT SELECT ON alembic_version TO {login}")
    (line,) = (await Report.of(**settings, database_url=as_login(database, login))).failures()
    assert_contains(line, ["FAIL  roles", "DATABASE_URL's login", "api_user, api_system", "have a DBA run: GRANT"])
    execute(database, line.partition("have a DBA run: ")[2])
    assert (await Report.of(**settings, database_url=as_login(database, login))).failures() == []


async def test_missing_roles_are_reported(
    settings: dict[str, Any], postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The roles belong to the cluster, which other tests use, so the doctor looks for a role that never existed."""
    monkeypatch.setattr("backend.doctor.stores.ROLES", ("api_user", "api_absent"))
    empty = create_database(postgres, f"doctor_{uuid4().hex[:8]}")
    line = (await Report.of(**settings, database_url=empty)).failures()[-1]
    assert_contains(line, ["FAIL  roles", "api_absent do not exist", "CREATEROLE"])


async def test_a_table_that_does_not_force_its_policies_is_reported(settings: dict[str, Any], database: str) -> None:
    execute(
        database, "ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY", "CREATE TABLE of_another_application (owner_id uuid)"
    )
    (line,) = (await Report.of(**settings, database_url=database)).failures()
    assert_contains(
        line, ["FAIL  isolation", "not forced on tasks", "ALTER TABLE tasks ENABLE ROW LEVEL SECURITY, FORCE"]
    )
    execute(database, line.partition(": ")[2])
    assert (await Report.of(**settings, database_url=database)).failures() == []


async def test_a_role_that_bypasses_every_policy_is_reported(settings: dict[str, Any], database: str) -> None:
    execute(database, "ALTER ROLE api_user BYPASSRLS")
    try:
        (line,) = (await Report.of(**settings, database_url=database)).failures()
    finally:
        execute(database, "ALTER ROLE api_user NOBYPASSRLS")
    assert_contains(
        line, ["FAIL  isolation", "api_user bypasses row-level security", "ALTER ROLE api_user NOSUPERUSER NOBYPASSRLS"]
    )


@pytest.mark.usefixtures("short_wait")
async def test_a_direct_url_of_another_database_is_reported(
    settings: dict[str, Any], database: str, database_url: str
) -> None:
    (line,) = (await Report.of(**settings, database_url=database, database_direct_url=database_url)).failures()
    assert_contains(line, ["FAIL  listen", "DATABASE_DIRECT_URL names", "another database than DATABASE_URL"])


@pytest.mark.needs("pgbouncer")
class TestPooler:
    async def test_a_transaction_pooler_needs_other_settings(
        self, settings: dict[str, Any], database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pooler(database) as pooled:
            with monkeypatch.context() as patch:
                patch.setattr("backend.doctor.stores.PATIENCE", 0.3)
                prepare, listen = (await Report.of(**settings, database_url=pooled)).failures()
            assert_contains(prepare, ["FAIL  prepare", "set DATABASE_PREPARE to off", "pgbouncer 1.21"])
            assert_contains(listen, ["FAIL  listen", "DATABASE_URL names", "set DATABASE_DIRECT_URL"])
            corrected: dict[str, Any] = {
                "database_url": pooled,
                "database_prepare": "off",
                "database_direct_url": database,
            }
            report = await Report.of(**settings, **corrected)
            assert report.failures() == []
            assert_contains(report.on("prepare"), ["off, behind a pooler"])

    @pytest.mark.usefixtures("short_wait")
    async def test_a_direct_url_of_a_pooler_is_reported(self, settings: dict[str, Any], database: str) -> None:
        with pooler(database) as pooled:
            both: dict[str, Any] = {"database_url": database, "database_direct_url": pooled}
            (line,) = (await Report.of(**settings, **both)).failures()
        assert_contains(line, ["FAIL  listen", "DATABASE_DIRECT_URL names a transaction pooler"])


class TestAccount:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                "status = 'suspended'",
                ["FAIL", "in this API", "/api/v1/admin/users/", "`resource-server reinstate "],
            ),
            ("banned = true", ["FAIL", "banned in Better Auth", "lift the ban there"]),
            ("status = 'purged'", ["FAIL", "deleted permanently in Better Auth"]),
            ("tokens_valid_after = now() + interval '1 minute'", ["FAIL", "has revoked this token", "get a new one"]),
            ("time_zone = 'Europe/Berlin'", ["ok", "active"]),
        ],
    )
    async def test_the_state_of_the_users_row_is_reported(
        self, settings: dict[str, Any], issuer: LocalIssuer, database_url: str, change: str, words: list[str]
    ) -> None:
        subject = uuid4().hex
        insert = f"INSERT INTO users (issuer, subject) VALUES ('{issuer.url}', '{subject}')"  # noqa: S608
        execute(database_url, insert, f"UPDATE users SET {change} WHERE subject = '{subject}'")  # noqa: S608
        report = await Report.of(issuer.token(sub=subject), **settings, database_url=database_url)
        assert_contains(report.on("account"), words)

    async def test_a_user_without_a_row_is_ok(
        self, settings: dict[str, Any], issuer: LocalIssuer, database_url: str
    ) -> None:
        report = await Report.of(issuer.token(sub=uuid4().hex), **settings, database_url=database_url)
        assert_contains(report.on("account"), ["ok", "no user row yet"])


class TestRedis:
    @pytest.mark.needs("redis-server")
    async def test_a_redis_that_rejects_the_login_is_reported(self, settings: dict[str, Any]) -> None:
        with redis_server() as server:
            assert_contains(
                (await Report.of(**settings, redis_url=server.url)).on("redis"), ["ok", "limits are shared"]
            )
            with Redis.from_url(server.url) as redis:
                redis.config_set("requirepass", SECRET)
            (line,) = (await Report.of(**settings, redis_url=server.url)).failures()
            assert_contains(line, ["FAIL  redis", "rejects the login", "password", "REDIS_URL"])
            wrong = server.url.replace("unix://", f"unix://:{SECRET}x@")
            (line,) = (await Report.of(**settings, redis_url=wrong)).failures()
            assert_contains(line, ["FAIL  redis", "rejects the login"])

    async def test_an_unreachable_redis_is_reported(self, settings: dict[str, Any]) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"redis://:{SECRET}@127.0.0.1:{unused.getsockname()[1]}"
            (line,) = (await Report.of(**settings, redis_url=url)).failures()
        assert_contains(line, ["FAIL  redis", "no Redis at 127.0.0.1", "correct REDIS_URL"])

    async def test_a_redis_url_that_cannot_be_parsed_is_reported(self, settings: dict[str, Any]) -> None:
        (line,) = (await Report.of(**settings, redis_url=f"redis://api:{SECRET}/x@127.0.0.1")).failures()
        assert_contains(line, ["FAIL  redis", "REDIS_URL cannot be parsed", "percent-encode"])
