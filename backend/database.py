"""The one way to PostgreSQL: a statement is compiled once, and always runs as somebody."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, LiteralString, NamedTuple, Self, TypeVar
from uuid import UUID

from psycopg import AsyncConnection
from psycopg.errors import DeadlockDetected, SerializationFailure
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import ClauseElement, bindparam
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

T = TypeVar("T")
Row = DictRow
Connection = AsyncConnection[Row]

_DIALECT = PGDialect_psycopg()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it unannotated

# One statement gives a transaction its role, its caller, its clock and its patience. All of them end with the
# transaction, so neither this pool nor a pooler behind it can carry them to the next request.
_BECOME: LiteralString = (
    "SELECT set_config('role', %s, true), set_config('app.caller', %s, true),"
    " set_config('timezone', 'UTC', true), set_config('statement_timeout', '10s', true)"
)


class Actor(NamedTuple):
    """Who a transaction belongs to. There is no other way in, so a superuser's login is never used as such."""

    role: LiteralString
    id: str = ""

    @classmethod
    def user(cls, id: UUID) -> Self:
        return cls("api_user", str(id))


SYSTEM = Actor("api_system")


class Statement:
    """A SQLAlchemy expression as SQL text. Build it at import, or behind `lru_cache` when its shape varies.

    Its parameters are bound by name; one named `caller` is the id of the actor it runs as.
    """

    def __init__(self, clause: ClauseElement) -> None:
        compiled = clause.compile(dialect=_DIALECT)
        self.sql = compiled.string  # of columns and operators: values are always bound
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}

    def bind(self, actor: Actor, values: Mapping[str, object]) -> dict[str, object]:
        return {**self._constants, **values, "caller": actor.id or None}


class Transaction:
    """Several statements, all or nothing."""

    def __init__(self, connection: Connection, actor: Actor, *, prepare: bool) -> None:
        self._connection = connection
        self._actor = actor
        self._prepare = prepare

    async def rows(self, statement: Statement, **values: object) -> list[Row]:
        cursor = await self._connection.execute(
            statement.sql, statement.bind(self._actor, values), prepare=self._prepare, binary=True
        )
        return await cursor.fetchall() if cursor.description else []

    async def row(self, statement: Statement, **values: object) -> Row | None:
        return next(iter(await self.rows(statement, **values)), None)


class Pool:
    """The connections of this process. `async with` opens them; a server that is down is found out at first use."""

    def __init__(self, url: str, *, size: int = 10, prepare: bool = True, wait: float = 3.0) -> None:
        """`wait`: seconds a request waits for a connection before it is a `psycopg_pool.PoolTimeout`."""
        self.prepare = prepare
        self._pool = AsyncConnectionPool(
            url,
            connection_class=Connection,
            min_size=size,
            max_size=size,
            timeout=wait,
            open=False,
            kwargs={
                "autocommit": True,
                "row_factory": dict_row,
                "prepare_threshold": 5 if prepare else None,
                "application_name": "resource-server",
                "connect_timeout": 5,
            },
        )

    async def __aenter__(self) -> Self:
        await self._pool.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()

    def connection(self) -> AbstractAsyncContextManager[Connection]:
        """A connection as the login role: for what has no rows of anybody's to read, such as the readiness check."""
        return self._pool.connection()


class Database:
    """The pool, seen by one actor.

    A deadlock or a serialisation failure is tried once more; then it is the caller's `psycopg.Error`.
    """

    def __init__(self, pool: Pool, actor: Actor) -> None:
        self._pool = pool
        self._actor = actor

    async def rows(self, statement: Statement, **values: object) -> list[Row]:
        """Run one statement in a transaction of its own, committed on return: one round trip."""
        try:
            return await self._rows(statement, values)
        except (DeadlockDetected, SerializationFailure):
            return await self._rows(statement, values)

    async def row(self, statement: Statement, **values: object) -> Row | None:
        return next(iter(await self.rows(statement, **values)), None)

    async def transact(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Run `work` in one transaction, committed on return. It may be called twice, so it must touch nothing else."""
        try:
            return await self._transact(work)
        except (DeadlockDetected, SerializationFailure):
            return await self._transact(work)

    async def _rows(self, statement: Statement, values: Mapping[str, object]) -> list[Row]:
        prepare = self._pool.prepare
        async with self._pool.connection() as connection:
            # The messages of a pipeline are one transaction, which its end commits. A commit that fails raises, but as
            # an OperationalError without its SQLSTATE: no constraint may be DEFERRABLE (a test reads the catalogue).
            async with connection.pipeline():
                await connection.execute(_BECOME, self._actor, prepare=prepare)
                cursor = await connection.execute(
                    statement.sql, statement.bind(self._actor, values), prepare=prepare, binary=True
                )
            return await cursor.fetchall() if cursor.description else []

    async def _transact(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(_BECOME, self._actor, prepare=self._pool.prepare)
            return await work(Transaction(connection, self._actor, prepare=self._pool.prepare))


def parameters(names: Iterable[str]) -> dict[str, Any]:
    """For `values()`: each column set from the parameter of its name."""
    return {name: bindparam(name) for name in names}
