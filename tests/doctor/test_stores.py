"""A problem with PostgreSQL or Redis is named with the setting or statement that solves it."""

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
from tests.doctor.report import SECRET, Report, at, names
from tests.support.pgbouncer import pooler
from tests.support.redis_server import redis_server


@pytest.fixture
def database(postgres: str) -> str:
    """A migrated database of the test's own."""
    url = create_database(postgres, f"doctor_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    return url


def run(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


@pytest.fixture
def settings(jwks_url: str, issuer: LocalIssuer) -> dict[str, Any]:
    return at(issuer, jwks_url)


async def test_a_missing_database_url_is_a_warning(settings: dict[str, Any]) -> None:
    report = await Report.of(**settings)
    assert report.failures() == []
    names(report.on("database"), ["warn", "DATABASE_URL is not set"])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"postgresql://api:{SECRET}@127.0.0.1:9/api", ["refused", "correct DATABASE_URL"]),
        (f"postgresql://api:{SECRET}#x@127.0.0.1/api", ["correct DATABASE_URL"]),
    ],
)
async def test_a_database_that_cannot_be_reached(settings: dict[str, Any], url: str, words: list[str]) -> None:
    (line,) = (await Report.of(**settings, database_url=url)).failures()
    names(line, ["FAIL  database", *words])


async def test_a_login_or_a_database_that_does_not_exist(settings: dict[str, Any], database: str) -> None:
    (line,) = (await Report.of(**settings, database_url=as_login(database, "nobody_here"))).failures()
    names(line, ['role "nobody_here" does not exist', "correct DATABASE_URL"])
    elsewhere = database.replace("/doctor_", "/nowhere_")
    (line,) = (await Report.of(**settings, database_url=database, database_direct_url=elsewhere)).failures()
    names(line, ["does not exist", "correct DATABASE_DIRECT_URL"])


async def test_a_server_that_is_too_old(
    settings: dict[str, Any], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "OLDEST_POSTGRES", 99)
    (line,) = (await Report.of(**settings, database_url=database_url)).failures()
    names(line, ["this is PostgreSQL 18; 99 or newer is required", "DATABASE_URL"])


async def test_a_database_that_has_not_been_migrated(settings: dict[str, Any], postgres: str) -> None:
    empty = create_database(postgres, f"doctor_{uuid4().hex[:8]}")
    (line,) = (await Report.of(**settings, database_url=empty)).failures()
    names(line, ["FAIL  migrations", "run `resource-server migrate`"])


async def test_a_database_of_a_newer_version(settings: dict[str, Any], database: str) -> None:
    run(database, "UPDATE alembic_version SET version_num = '9999'")
    (line,) = (await Report.of(**settings, database_url=database)).failures()
    names(line, ["FAIL  migrations", "at revision 9999", "deploy a newer one"])


async def test_a_login_that_cannot_set_the_roles(settings: dict[str, Any], database: str) -> None:
    """The statement in the report solves the problem."""
    login = f"plain_{uuid4().hex[:8]}"
    run(database, f"CREATE ROLE {login} LOGIN", f"GRANT SELECT ON alembic_version TO {login}")
    (line,) = (await Report.of(**settings, database_url=as_login(database, login))).failures()
    names(line, ["FAIL  roles", "DATABASE_URL's login", "api_user, api_system", "have a DBA run: GRANT"])
    run(database, line.partition("have a DBA run: ")[2])
    assert (await Report.of(**settings, database_url=as_login(database, login))).failures() == []


async def test_missing_roles(settings: dict[str, Any], postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests share the cluster's roles, so the doctor looks for a role that does not exist."""
    monkeypatch.setattr("backend.doctor.stores.ROLES", ("api_user", "api_absent"))
    empty = create_database(postgres, f"doctor_{uuid4().hex[:8]}")
    line = (await Report.of(**settings, database_url=empty)).failures()[-1]
    names(line, ["FAIL  roles", "api_absent do not exist", "CREATEROLE"])


async def test_a_table_whose_owner_bypasses_its_policies(settings: dict[str, Any], database: str) -> None:
    run(
        database, "ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY", "CREATE TABLE of_another_application (owner_id uuid)"
    )
    (line,) = (await Report.of(**settings, database_url=database)).failures()
    names(line, ["FAIL  isolation", "not forced on tasks", "ALTER TABLE tasks ENABLE ROW LEVEL SECURITY, FORCE"])
    run(database, line.partition(": ")[2])
    assert (await Report.of(**settings, database_url=database)).failures() == []


async def test_a_role_that_bypasses_every_policy(settings: dict[str, Any], database: str) -> None:
    run(database, "ALTER ROLE api_user BYPASSRLS")
    try:
        (line,) = (await Report.of(**settings, database_url=database)).failures()
    finally:
        run(database, "ALTER ROLE api_user NOBYPASSRLS")
    names(
        line, ["FAIL  isolation", "api_user bypasses row-level security", "ALTER ROLE api_user NOSUPERUSER NOBYPASSRLS"]
    )


async def test_two_urls_of_two_databases(settings: dict[str, Any], database: str, database_url: str) -> None:
    (line,) = (await Report.of(**settings, database_url=database, database_direct_url=database_url)).failures()
    names(line, ["FAIL  listen", "DATABASE_DIRECT_URL names", "another database than DATABASE_URL"])


@pytest.mark.needs("pgbouncer")
class TestPooler:
    async def test_a_transaction_pooler(self, settings: dict[str, Any], database: str) -> None:
        with pooler(database) as pooled:
            prepare, listen = (await Report.of(**settings, database_url=pooled)).failures()
            names(prepare, ["FAIL  prepare", "set DATABASE_PREPARE to off", "pgbouncer 1.21"])
            names(listen, ["FAIL  listen", "DATABASE_URL names", "set DATABASE_DIRECT_URL"])
            corrected: dict[str, Any] = {
                "database_url": pooled,
                "database_prepare": "off",
                "database_direct_url": database,
            }
            report = await Report.of(**settings, **corrected)
            assert report.failures() == []
            names(report.on("prepare"), ["off, behind a pooler"])

    async def test_a_direct_url_of_a_pooler(self, settings: dict[str, Any], database: str) -> None:
        with pooler(database) as pooled:
            both: dict[str, Any] = {"database_url": database, "database_direct_url": pooled}
            (line,) = (await Report.of(**settings, **both)).failures()
        names(line, ["FAIL  listen", "DATABASE_DIRECT_URL names a transaction pooler"])


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
    async def test_the_users_row(
        self, settings: dict[str, Any], issuer: LocalIssuer, database_url: str, change: str, words: list[str]
    ) -> None:
        subject = uuid4().hex
        insert = f"INSERT INTO users (issuer, subject) VALUES ('{issuer.url}', '{subject}')"  # noqa: S608
        run(database_url, insert, f"UPDATE users SET {change} WHERE subject = '{subject}'")  # noqa: S608
        report = await Report.of(issuer.token(sub=subject), **settings, database_url=database_url)
        names(report.on("account"), words)

    async def test_a_new_user(self, settings: dict[str, Any], issuer: LocalIssuer, database_url: str) -> None:
        report = await Report.of(issuer.token(sub=uuid4().hex), **settings, database_url=database_url)
        names(report.on("account"), ["ok", "no user row yet"])


class TestRedis:
    @pytest.mark.needs("redis-server")
    async def test_a_reachable_redis_and_a_wrong_password(self, settings: dict[str, Any]) -> None:
        with redis_server() as server:
            names((await Report.of(**settings, redis_url=server.url)).on("redis"), ["ok", "limits are shared"])
            with Redis.from_url(server.url) as redis:
                redis.config_set("requirepass", SECRET)
            (line,) = (await Report.of(**settings, redis_url=server.url)).failures()
            names(line, ["FAIL  redis", "rejects the login", "password", "REDIS_URL"])
            wrong = server.url.replace("unix://", f"unix://:{SECRET}x@")
            (line,) = (await Report.of(**settings, redis_url=wrong)).failures()
            names(line, ["FAIL  redis", "rejects the login"])

    async def test_a_refused_connection(self, settings: dict[str, Any]) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"redis://:{SECRET}@127.0.0.1:{unused.getsockname()[1]}"
            (line,) = (await Report.of(**settings, redis_url=url)).failures()
        names(line, ["FAIL  redis", "no Redis at 127.0.0.1", "correct REDIS_URL"])

    async def test_a_url_that_cannot_be_parsed(self, settings: dict[str, Any]) -> None:
        (line,) = (await Report.of(**settings, redis_url=f"redis://api:{SECRET}/x@127.0.0.1")).failures()
        names(line, ["FAIL  redis", "REDIS_URL cannot be parsed", "percent-encode"])
