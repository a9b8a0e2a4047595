"""The prepared statements of one connection, and the encoding of their values and decoding of their rows."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import psycopg
from psycopg import pq
from psycopg.abc import Buffer
from psycopg.adapt import PyFormat, Transformer

from backend.database.query import Connection, Execute, Prepared, Query, Row, StatementKey

MAX_PREPARED = 500  # on one connection; each takes some kB in the server
_TEXT_OIDS = {count: (25,) * count for count in (2, 3)}  # by the number of parameters
_TEXT_FORMATS = {count: (pq.Format.TEXT,) * count for count in (2, 3)}


class Bound(NamedTuple):
    """A statement with its values, encoded for the server."""

    sql: str
    values: Sequence[Buffer | None]
    types: tuple[int, ...]
    formats: Sequence[pq.Format]


class PreparedStatements:
    """Sends statements on one connection, and prepares each at its first use."""

    def __init__(self, connection: Connection, *, prepare: bool) -> None:
        self._pgconn = connection.pgconn
        self._transformer = Transformer(connection)
        self._prepare = prepare
        self._statements: dict[StatementKey, Prepared] = {}
        self._number = 0

    def bind(self, query: Query) -> tuple[Bound, Bound]:
        """The preamble and the statement. Raises the errors of the values' dumpers."""
        texts = [text.encode() for text in query.texts]
        preamble = Bound(query.preamble, texts, _TEXT_OIDS[len(texts)], _TEXT_FORMATS[len(texts)])
        if not query.values:
            return preamble, Bound(query.sql, (), (), ())
        transformer = self._transformer
        try:
            values = transformer.dump_sequence(query.values, [PyFormat.AUTO] * len(query.values))
        except UnicodeError as error:  # a lone surrogate
            raise psycopg.DataError("a text that cannot be encoded") from error
        return preamble, Bound(query.sql, values, transformer.types or (), transformer.formats or ())

    def send(self, query: Query, part: Bound) -> None:
        """Send one part of a query, and note the steps that the server has to confirm."""
        pgconn, key = self._pgconn, (part.sql, part.types)
        statement = self._statements.get(key)
        if statement is None:
            if not self._prepare or len(self._statements) >= MAX_PREPARED:
                query.statement = Prepared(b"")
                query.steps.append(Execute.STEP)
                pgconn.send_query_params(part.sql.encode(), part.values, part.types, part.formats, pq.Format.BINARY)
                return
            self._number += 1
            statement = self._statements[key] = Prepared(b"statement_%d" % self._number)
            query.steps.append(key)
            pgconn.send_prepare(statement.name, part.sql.encode(), part.types)
        query.statement = statement
        query.steps.append(Execute.STEP)
        pgconn.send_query_prepared(statement.name, part.values, part.formats, pq.Format.BINARY)

    def rows(self, query: Query) -> list[Row]:
        result, statement = query.result, query.statement
        if result is None or not result.nfields:
            return []
        if statement.columns is None:
            statement.columns = [(result.fname(column) or b"").decode() for column in range(result.nfields)]
        names = statement.columns
        self._transformer.set_pgresult(result)
        # Not `strict`: each row has as many values by the protocol, and the check takes a sixth of the time.
        return [dict(zip(names, row)) for row in self._transformer.load_rows(0, result.ntuples, tuple)]  # noqa: B905

    def forget_unconfirmed(self, queries: Iterable[Query]) -> None:
        """Forget the statements of a failed transaction that the server has not prepared yet: it skips them."""
        for query in queries:
            for step in query.steps:
                if step is not Execute.STEP:
                    self._statements.pop(step, None)

    def forget_stale(self, query: Query) -> None:
        """Forget the statements of a query that has failed because its statement was stale or not prepared.

        A statement that was prepared again since the query was sent is kept.
        """
        statements = self._statements
        for key, statement in list(statements.items()):
            if key[0] == query.preamble or (key[0] == query.sql and statement is query.statement):
                del statements[key]
