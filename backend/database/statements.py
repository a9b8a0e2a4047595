"""Statements, compiled once from SQLAlchemy expressions, and the actors that they run as."""

from collections.abc import Iterable, Mapping
from copy import copy
from enum import StrEnum
from typing import Any, LiteralString, NamedTuple, Self
from uuid import UUID

from sqlalchemy import ClauseElement, Select, bindparam
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.sql.compiler import SQLCompiler

_DIALECT = PGDialect_psycopg(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it unannotated

# A preamble sets the role, the caller, the time zone and the timeouts of a transaction. All of them end with the
# transaction, so neither this pool nor a pooler behind it can carry them over to another request.
_BECOME: LiteralString = (
    "SELECT set_config('role', $1, true), set_config('app.caller', $2, true), set_config('timezone', 'UTC', true),"
)
_AUTO: LiteralString = " set_config('plan_cache_mode', 'auto', true)"
_KEEP_PLANS: LiteralString = " set_config('plan_cache_mode', 'force_generic_plan', true)"

# Other statements are queued behind a short read on its shared connection, so it waits for a lock for 50 ms only.
# Everywhere else the lock_timeout is the rest of the time that a request may wait.
_READ: LiteralString = (
    _BECOME + " set_config('statement_timeout', '2s', true), set_config('lock_timeout', '50ms', true),"
)
_WRITE: LiteralString = _BECOME + " set_config('statement_timeout', '4s', true), set_config('lock_timeout', $3, true),"
_SEARCH: LiteralString = _WRITE.replace("'4s'", "'10s'")
READ_ALONE: LiteralString = _WRITE + _AUTO
# The server ends a session that is idle in a transaction: its client is dead or too slow.
TRANSACT: LiteralString = _SEARCH + " set_config('idle_in_transaction_session_timeout', '5s', true)," + _AUTO


class Actor(NamedTuple):
    """The role and the user id that a transaction runs as. Even a superuser's login runs as one."""

    role: LiteralString
    id: str = ""

    @classmethod
    def user(cls, id: UUID) -> Self:
        return cls("api_user", str(id))


SYSTEM = Actor("api_system")


class Cost(StrEnum):
    """How much a statement may read; it decides on which connections the statement runs."""

    short = "short"  # by key, or one page of an index: milliseconds, however many rows the owner has
    long = "long"  # grows with the owner's rows: search, filters, counts, export, the first copy of a sync


class Statement:
    """A SQLAlchemy expression as SQL text. Create it at import, or behind `lru_cache` when its shape varies.

    Its parameters are bound by name. The parameter `caller` is always the id of the actor.
    `keeps_plan`: one generic plan serves all values, which saves planning on each execution (`docs/performance.md`).
    It has no effect within a transaction.
    `writes`: set it for a SELECT with side effects. Reads share transactions, so another read's error would undo it.
    `cost`: `Cost.long` for a read that may take longer than milliseconds. It has no effect within a transaction.
    """

    def __init__(
        self, clause: ClauseElement, *, keeps_plan: bool = False, writes: bool = False, cost: Cost = Cost.short
    ) -> None:
        compiled = clause.compile(dialect=_DIALECT)
        assert isinstance(compiled, SQLCompiler)
        self.sql = compiled.string
        self.writes = writes or not isinstance(clause, Select) or any(cte.element.is_dml for cte in compiled.ctes or ())
        self.names = compiled.positiontup or []
        self.cost = cost
        self._plans = _KEEP_PLANS if keeps_plan else _AUTO
        self.preamble = self._preamble()
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}

    def at(self, cost: Cost) -> "Statement":
        """The same statement with another cost."""
        other = copy(self)
        other.cost = cost
        other.preamble = other._preamble()  # noqa: SLF001  # of the same class
        return other

    def _preamble(self) -> LiteralString:
        return (_SEARCH if self.cost is Cost.long else _WRITE if self.writes else _READ) + self._plans

    def bind(self, actor: Actor, values: Mapping[str, object]) -> list[object]:
        """The values of its parameters, in order."""
        given = {**self._constants, **values, "caller": actor.id or None}
        return [given[name] for name in self.names]


def parameters(names: Iterable[str]) -> dict[str, Any]:
    """For `values()`: each column is set from the parameter with its name."""
    return {name: bindparam(name) for name in names}
