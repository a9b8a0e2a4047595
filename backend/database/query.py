"""A query: one statement on its way to PostgreSQL, its preamble, and the future that receives its rows."""

import asyncio
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Any, Literal

import psycopg
from psycopg import AsyncConnection, pq

Row = dict[str, Any]
Connection = AsyncConnection[Row]
StatementKey = tuple[str, tuple[int, ...]]  # the SQL text and the oids of its parameters' types

SHORT_LOCK_TIMEOUT = "50ms"  # for a statement on the last free connection of a lane


class ConnectionLost(psycopg.OperationalError):
    """The connection was lost while a statement was running: it may or may not have taken effect."""


class UnreadableRow(psycopg.DataError):
    """The server returned a value that Python cannot represent, such as the time `infinity`."""


class Prepared:
    """A statement that is prepared on one connection."""

    __slots__ = ("columns", "name")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.columns: list[str] | None = None  # the names in its first result


class Execute(Enum):
    """The step of a query that executes a statement. A step that prepares one is the statement's key."""

    STEP = auto()


class Query:
    """A statement, sent behind a preamble: a statement that sets the role and the limits which it runs with.

    It is queued, sent, and answered: `future` receives the rows, or the first error. `steps` lists what the server has
    yet to confirm. If an earlier query of its transaction fails, the server skips it, and it is queued once more.

    The preamble takes two or three texts, and must set each of its settings in every query, because several queries may
    share a transaction. The parameters of both are `$1`, `$2`, ... Each connection prepares a text once for each
    combination of parameter types.
    """

    __slots__ = (
        "begun",
        "error",
        "future",
        "is_alone",
        "is_blocked",
        "is_patient",
        "preamble",
        "result",
        "since",
        "sql",
        "statement",
        "steps",
        "texts",
        "values",
    )

    def __init__(
        self,
        preamble: str,
        texts: tuple[str, ...],
        sql: str,
        values: Sequence[Any],
        begun: float | None = None,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """`begun`: when the request began to wait, by the loop's clock, if an earlier attempt failed."""
        loop = loop or asyncio.get_running_loop()
        self.preamble = preamble
        self.texts = texts
        self.sql = sql
        self.values = values
        self.future: asyncio.Future[list[Row]] = loop.create_future()
        self.since = loop.time()  # when it began to wait where it is now
        self.begun = self.since if begun is None else begun
        self.is_alone = False  # it shares no transaction
        self.is_patient = True  # it may wait for a lock until its time is over
        self.is_blocked = False  # it has met a lock, so it runs only where it may be patient
        self.steps: list[StatementKey | Literal[Execute.STEP]] = []  # those that the server has yet to confirm
        self.statement: Prepared
        self.result: pq.abc.PGresult | None = None
        self.error: psycopg.Error | None = None


def fail(queries: Iterable[Query], kind: type[psycopg.OperationalError], why: str) -> None:
    for query in queries:
        if not query.future.done():
            query.future.set_exception(kind(why))


def lock_timeout(seconds: float) -> str:
    """The setting for a time. At least 1 ms, since 0 would mean no limit."""
    return f"{max(1, round(1000 * seconds))}ms"
