"""Whether PostgreSQL and Redis are what the API takes them for."""

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
from backend.users.directory import FIND, KnownUser
from backend.users.models import UserStatus

ROLES: Final = ("api_user", "api_system")
PATIENCE: Final = 3  # seconds

_LOGIN = """
SELECT name, r.oid IS NOT NULL AS there, coalesce(pg_has_role(current_user, r.oid, 'SET'), false) AS settable,
       coalesce(r.rolsuper OR r.rolbypassrls, false) AS unbound
FROM unnest(%s::text[]) AS name LEFT JOIN pg_roles r ON r.rolname = name
"""
# The tables of others in the same database are none of our business: those count that the role of users can reach.
_UNFORCED = """
SELECT c.oid::regclass::text FROM pg_class c
WHERE c.relkind IN ('r', 'p') AND NOT (c.relrowsecurity AND c.relforcerowsecurity)
  AND c.relnamespace = 'public'::regnamespace
  AND has_any_column_privilege('api_user', c.oid, 'SELECT, INSERT, UPDATE') ORDER BY 1
"""


async def examine_database(settings: Settings) -> AsyncIterator[Finding]:
    """Whether the API can work on this database, and isolation holds in it."""
    if not settings.database_url:
        yield warn("database", "DATABASE_URL is not set: `resource-server dev` brings its own, `serve` needs one")
        return
    async with AsyncExitStack() as stack:
        connections = []
        for name, url in (("DATABASE_URL", settings.database_url), ("DATABASE_DIRECT_URL", settings.direct_url)):
            try:
                connections.append(await stack.enter_async_context(await _connect(url)))
            except psycopg.Error as error:
                yield fail("database", _unreachable(name, error))
                return
        try:
            async for finding in _examine(connections[0], connections[1], settings):
                yield finding
        except psycopg.Error as error:
            yield fail("database", f"{_line(error)}: look at the server's log")


async def _examine(
    connection: AsyncConnection[Any], direct: AsyncConnection[Any], settings: Settings
) -> AsyncIterator[Finding]:
    version = direct.info.server_version // 10000
    if version < migrations.OLDEST_POSTGRES:
        needed = f"{migrations.OLDEST_POSTGRES} or newer is needed: let DATABASE_URL lead to such a server"
        yield fail("database", f"PostgreSQL {version} is there, {needed}")
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
        yield fail(
            "isolation",
            f"row-level security is not forced on {shown(table)}: "
            f"ALTER TABLE {shown(table)} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        )
    if rows and not tables and not reason:
        yield ok("isolation", "row-level security is forced on every table that users reach")


async def _examine_roles(connection: AsyncConnection[Any]) -> AsyncIterator[Finding]:
    login = connection.info.user
    rows = await (await connection.execute(_LOGIN, [list(ROLES)])).fetchall()
    absent = [name for name, there, *_ in rows if not there]
    refused = [name for name, there, settable, _ in rows if there and not settable]
    unbound = [name for name, _, _, unbound in rows if unbound]
    if absent:
        yield fail(
            "roles", f"{listed(absent)} are not there: run `resource-server migrate` with a login that has CREATEROLE"
        )
    if refused:
        grant = SQL("GRANT {} TO {} WITH INHERIT FALSE, SET TRUE").format(
            SQL(", ").join(map(Identifier, refused)), Identifier(login)
        )
        yield fail(
            "roles",
            f"DATABASE_URL's login may not take on {listed(refused)}: have a DBA run: {grant.as_string(connection)}",
        )
    for name in unbound:
        yield fail("isolation", f"row-level security does not bind {name}: ALTER ROLE {name} NOSUPERUSER NOBYPASSRLS")
    if not absent and not refused:
        yield ok("roles", f"{shown(login)} may take on {listed(ROLES)}")


async def _examine_pooling(
    connection: AsyncConnection[Any], direct: AsyncConnection[Any], settings: Settings
) -> AsyncIterator[Finding]:
    # What a pooler hands out as the number of the server process is its own invention.
    ((pid,),) = await (await connection.execute("SELECT pg_backend_pid()")).fetchall()
    pooled = pid != connection.info.backend_pid
    where = "behind a pooler" if pooled else "PostgreSQL itself"
    if settings.database_prepare == "off":
        yield ok("prepare", f"off, {where}")
    elif await _keeps_prepared_statements(settings.database_url):
        yield ok("prepare", f"prepared statements work, {where}")
    else:
        yield fail(
            "prepare",
            "DATABASE_URL leads through a pooler that mixes up prepared statements: set DATABASE_PREPARE to off "
            "(or use pgbouncer 1.21 or newer, with max_prepared_statements)",
        )
    if await _hears(direct, connection):
        yield ok("listen", "notifications arrive")
    elif settings.database_direct_url:
        yield fail(
            "listen",
            "DATABASE_DIRECT_URL leads through a transaction pooler, or to another database than DATABASE_URL: "
            "set it to PostgreSQL's own address",
        )
    else:
        yield fail(
            "listen",
            "DATABASE_URL leads through a transaction pooler, which carries no notifications: "
            "set DATABASE_DIRECT_URL to PostgreSQL's own address",
        )


async def _keeps_prepared_statements(url: str) -> bool:
    """Whether two clients that prepare statements under one name, as all do, are kept apart."""
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


async def _hears(listener: AsyncConnection[Any], sayer: AsyncConnection[Any]) -> bool:
    channel = f"doctor_{uuid4().hex}"
    await listener.execute(SQL("LISTEN {}").format(Identifier(channel)))
    await sayer.execute("SELECT pg_notify(%s, '')", [channel])
    async with aclosing(listener.notifies(timeout=PATIENCE, stop_after=1)) as notices:
        heard = [notice async for notice in notices if notice.channel == channel]
    with suppress(psycopg.Error):
        await listener.execute(SQL("UNLISTEN {}").format(Identifier(channel)))
    return bool(heard)


async def _connect(url: str) -> AsyncConnection[Any]:
    return await AsyncConnection.connect(
        url, autocommit=True, application_name="resource-server doctor", connect_timeout=5
    )


def _unreachable(name: str, error: psycopg.Error) -> str:
    return f"{_line(error)}: mend {name}"


def _line(error: Exception) -> str:
    return shown(" ".join(str(error).split()), 400)


async def examine_account(settings: Settings, principal: Principal) -> AsyncIterator[Finding]:
    """What this API knows against somebody whose token is good. A database that fails has been spoken of before."""
    subject, row = "account", None
    if not settings.database_url:
        return
    try:
        async with Pool(settings.database_url, size=LEAST_SIZE, prepare=False) as pool:
            row = await Database(pool, SYSTEM).row(FIND, issuer=settings.issuers[0], subject=principal.subject)
    except psycopg.Error:
        return
    if row is None:
        yield ok(subject, "not here yet: the first request makes the row")
        return
    user = KnownUser.of(row)
    if user.status is UserStatus.purged:
        yield fail(subject, "deleted at Better Auth and here, for good: sign up anew")
    elif row["banned"]:
        yield fail(subject, "banned at Better Auth: unban it there")
    elif user.status is not UserStatus.active:
        route, command = f"POST /api/v1/admin/users/{user.id}/reinstate", f"resource-server reinstate {user.id}"
        yield fail(subject, f"suspended here: an administrator can {route}; without one: `{command}`")
    elif principal.issued_at <= user.tokens_valid_after:
        yield fail(subject, "its tokens up to now were revoked, by a sign-out or an administrator: get a fresh one")
    else:
        yield ok(subject, "active")


async def examine_redis(settings: Settings) -> AsyncIterator[Finding]:
    """Whether the rate limits can be shared."""
    if not settings.redis_url:
        yield ok("redis", "REDIS_URL is not set: each worker counts alone")
        return
    from redis.asyncio import Redis
    from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

    try:
        where = urlsplit(settings.redis_url).hostname or urlsplit(settings.redis_url).path
        redis = Redis.from_url(settings.redis_url, socket_connect_timeout=PATIENCE, socket_timeout=PATIENCE)
    except ValueError:  # its text may quote half a password
        yield fail("redis", "REDIS_URL cannot be read: write what is special in its password as %XX")
        return
    try:
        await redis.eval("return redis.call('PTTL', KEYS[1])", 1, f"doctor:{uuid4().hex}")
    except (RedisError, OSError, TimeoutError) as error:
        if isinstance(error.__cause__ or error, (AuthenticationError, NoPermissionError)):
            remedy = "put a user and a password that may EVAL into REDIS_URL"
            yield fail("redis", f"{shown(where)} refuses the login: {remedy}")
        else:
            remedy = "mend REDIS_URL; until then each worker counts alone"
            yield fail("redis", f"none at {shown(where)} ({type(error).__name__}): {remedy}")
    else:
        yield ok("redis", f"limits are shared at {shown(where)}")
    finally:
        await redis.aclose()
