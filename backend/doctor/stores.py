"""Examines PostgreSQL and Redis: connection, version, schema, isolation, roles, pooling, and the user's account."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
from psycopg import AsyncConnection
from psycopg.sql import SQL, Identifier

from backend import migrations
from backend.auth import Principal
from backend.database import LEAST_SIZE, SYSTEM, Database, Pool
from backend.doctor.findings import Finding, fail, listed, ok, shown, warn
from backend.settings import Settings
from backend.users.models import UserStatus
from backend.users.provisioning import KnownUser
from backend.users.system_statements import FIND

ROLES: Final = ("api_user", "api_system")
PATIENCE: Final = 3  # seconds

_LOGIN = """
SELECT name, r.oid IS NOT NULL AS there, coalesce(pg_has_role(current_user, r.oid, 'SET'), false) AS settable,
       coalesce(r.rolsuper OR r.rolbypassrls, false) AS unbound
FROM unnest(%s::text[]) AS name LEFT JOIN pg_roles r ON r.rolname = name
"""
# Only tables that api_user can access; other applications may have tables in the same database.
_UNFORCED = """
SELECT c.oid::regclass::text FROM pg_class c
WHERE c.relkind IN ('r', 'p') AND NOT (c.relrowsecurity AND c.relforcerowsecurity)
  AND c.relnamespace = 'public'::regnamespace
  AND has_any_column_privilege('api_user', c.oid, 'SELECT, INSERT, UPDATE') ORDER BY 1
"""


async def examine_database(settings: Settings) -> AsyncIterator[Finding]:
    """Examine whether the API works with this database and users are isolated in it."""
    if not settings.database_url:
        yield warn("database", "DATABASE_URL is not set: required by `serve`, not by `resource-server dev`")
        return
    async with AsyncExitStack() as stack:
        connections = []
        for name, url in (("DATABASE_URL", settings.database_url), ("DATABASE_DIRECT_URL", settings.direct_url)):
            try:
                connections.append(await stack.enter_async_context(await _connect(url)))
            except psycopg.Error as error:
                yield fail("database", f"{_line(error)}: correct {name}")
                return
        try:
            async for finding in _examine(connections[0], connections[1], settings):
                yield finding
        except psycopg.Error as error:
            yield fail("database", f"{_line(error)}: see the server's log")


async def _examine(
    connection: AsyncConnection[Any], direct: AsyncConnection[Any], settings: Settings
) -> AsyncIterator[Finding]:
    version = direct.info.server_version // 10000
    if version < migrations.OLDEST_POSTGRES:
        needed = f"{migrations.OLDEST_POSTGRES} or newer is required: set DATABASE_URL to such a server"
        yield fail("database", f"this is PostgreSQL {version}; {needed}")
        return
    yield ok("database", f"PostgreSQL {version}, {shown(direct.info.dbname)} as {shown(direct.info.user)}")
    for examination in (
        _examine_schema(direct, settings),
        _examine_roles(connection),
        _examine_pooling(connection, direct, settings),
    ):
        async for finding in examination:
            yield finding


async def _examine_schema(direct: AsyncConnection[Any], settings: Settings) -> AsyncIterator[Finding]:
    try:
        reason = await asyncio.to_thread(migrations.pending, settings.direct_url)
    except (migrations.MigrationError, psycopg.Error) as error:
        yield fail("migrations", _line(error))
        return
    yield fail("migrations", reason) if reason else ok("migrations", f"at revision {migrations.head()}")
    rows = await (await direct.execute("SELECT FROM pg_roles WHERE rolname = 'api_user'")).fetchall()
    tables = [row[0] for row in await (await direct.execute(_UNFORCED)).fetchall()] if rows else []
    for table in tables:
        remedy = f"ALTER TABLE {shown(table)} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"
        yield fail("isolation", f"row-level security is not forced on {shown(table)}: {remedy}")
    if rows and not tables and not reason:
        yield ok("isolation", "row-level security is forced on every table that api_user can access")


async def _examine_roles(connection: AsyncConnection[Any]) -> AsyncIterator[Finding]:
    login = connection.info.user
    rows = await (await connection.execute(_LOGIN, [list(ROLES)])).fetchall()
    absent = [name for name, there, *_ in rows if not there]
    refused = [name for name, there, settable, _ in rows if there and not settable]
    unbound = [name for name, _, _, unbound in rows if unbound]
    if absent:
        yield fail("roles", f"{listed(absent)} do not exist: run `resource-server migrate` as a login with CREATEROLE")
    if refused:
        grant = SQL("GRANT {} TO {} WITH INHERIT FALSE, SET TRUE").format(
            SQL(", ").join(map(Identifier, refused)), Identifier(login)
        )
        remedy = f"have a DBA run: {grant.as_string(connection)}"
        yield fail("roles", f"DATABASE_URL's login cannot SET ROLE {listed(refused)}: {remedy}")
    for name in unbound:
        yield fail("isolation", f"{name} bypasses row-level security: ALTER ROLE {name} NOSUPERUSER NOBYPASSRLS")
    if not absent and not refused:
        yield ok("roles", f"{shown(login)} can SET ROLE {listed(ROLES)}")


async def _examine_pooling(
    connection: AsyncConnection[Any], direct: AsyncConnection[Any], settings: Settings
) -> AsyncIterator[Finding]:
    # A pooler reports an invented process id at the start of a connection.
    ((pid,),) = await (await connection.execute("SELECT pg_backend_pid()")).fetchall()
    pooled = pid != connection.info.backend_pid
    where = "behind a pooler" if pooled else "without a pooler"
    if settings.database_prepare == "off":
        yield ok("prepare", f"off, {where}")
    elif await _keeps_prepared_statements(settings.database_url):
        yield ok("prepare", f"prepared statements work, {where}")
    else:
        remedy = "set DATABASE_PREPARE to off (or use pgbouncer 1.21 or newer, with max_prepared_statements)"
        yield fail("prepare", f"the pooler in DATABASE_URL mixes up prepared statements: {remedy}")
    if await _receives_notifications(direct, connection):
        yield ok("listen", "notifications arrive")
    elif settings.database_direct_url:
        cause = "DATABASE_DIRECT_URL names a transaction pooler, or another database than DATABASE_URL"
        yield fail("listen", f"{cause}: set it to PostgreSQL's own address")
    else:
        cause = "DATABASE_URL names a transaction pooler, which delivers no notifications"
        yield fail("listen", f"{cause}: set DATABASE_DIRECT_URL to PostgreSQL's own address")


async def _keeps_prepared_statements(url: str) -> bool:
    """Whether two clients can use the same name for different prepared statements, as psycopg's clients do."""
    async with await _connect(url) as first, await _connect(url) as second:
        try:
            for turn in range(3):
                for connection, number in ((first, 2 * turn), (second, 2 * turn + 1)):
                    cursor = await connection.execute(f"SELECT {number}".encode(), prepare=True)
                    if await cursor.fetchone() != (number,):
                        return False
        except psycopg.Error:
            return False
    return True


async def _receives_notifications(listener: AsyncConnection[Any], sender: AsyncConnection[Any]) -> bool:
    channel = f"doctor_{uuid4().hex}"
    await listener.execute(SQL("LISTEN {}").format(Identifier(channel)))
    await sender.execute("SELECT pg_notify(%s, '')", [channel])
    async with aclosing(listener.notifies(timeout=PATIENCE, stop_after=1)) as notifications:
        received = [each async for each in notifications if each.channel == channel]
    with suppress(psycopg.Error):
        await listener.execute(SQL("UNLISTEN {}").format(Identifier(channel)))
    return bool(received)


async def _connect(url: str) -> AsyncConnection[Any]:
    return await AsyncConnection.connect(
        url, autocommit=True, application_name="resource-server doctor", connect_timeout=5
    )


def _line(error: Exception) -> str:
    return shown(" ".join(str(error).split()), 400)


async def examine_account(settings: Settings, principal: Principal) -> AsyncIterator[Finding]:
    """Examine the user's row. Reports nothing if the database fails: `examine_database` has reported that."""
    subject, row = "account", None
    if not settings.database_url:
        return
    try:
        async with Pool(settings.database_url, size=LEAST_SIZE, prepare=False) as pool:
            row = await Database(pool, SYSTEM).row(FIND, issuer=settings.issuers[0], subject=principal.subject)
    except psycopg.Error:
        return
    if row is None:
        yield ok(subject, "no user row yet: the first request creates it")
        return
    user = KnownUser.of(row)
    if user.status is UserStatus.purged:
        yield fail(subject, "the user was deleted permanently in Better Auth and here: sign up again")
    elif row["banned"]:
        yield fail(subject, "banned in Better Auth: lift the ban there")
    elif user.status is not UserStatus.active:
        route, command = f"POST /api/v1/admin/users/{user.id}/reinstate", f"resource-server reinstate {user.id}"
        yield fail(
            subject, f"suspended in this API: an administrator can {route}; without an administrator: `{command}`"
        )
    elif principal.issued_at <= user.tokens_valid_after:
        yield fail(subject, "a sign-out or an administrator has revoked this token: get a new one")
    else:
        yield ok(subject, "active")


async def examine_redis(settings: Settings) -> AsyncIterator[Finding]:
    """Examine whether the workers can share their rate limits."""
    if not settings.redis_url:
        yield ok("redis", "REDIS_URL is not set: each worker counts separately")
        return
    from redis.asyncio import Redis
    from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

    try:
        where = urlsplit(settings.redis_url).hostname or urlsplit(settings.redis_url).path
        redis = Redis.from_url(settings.redis_url, socket_connect_timeout=PATIENCE, socket_timeout=PATIENCE)
    except ValueError:  # its message may quote part of the password
        yield fail("redis", "REDIS_URL cannot be parsed: percent-encode special characters in its password")
        return
    try:
        await redis.eval("return redis.call('PTTL', KEYS[1])", 1, f"doctor:{uuid4().hex}")
    except (RedisError, OSError, TimeoutError) as error:
        if isinstance(error.__cause__ or error, (AuthenticationError, NoPermissionError)):
            remedy = "set a user that may run EVAL, and its password, in REDIS_URL"
            yield fail("redis", f"{shown(where)} rejects the login: {remedy}")
        else:
            remedy = "correct REDIS_URL; until then each worker counts separately"
            yield fail("redis", f"no Redis at {shown(where)} ({type(error).__name__}): {remedy}")
    else:
        yield ok("redis", f"limits are shared at {shown(where)}")
    finally:
        await redis.aclose()
