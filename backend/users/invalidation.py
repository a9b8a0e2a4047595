"""Each worker hears of a changed user when the change is committed, and knows when it may have missed one."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from math import inf
from types import TracebackType
from typing import Final, LiteralString, Self
from uuid import uuid4

from psycopg.pq.misc import PGnotify
from sqlalchemy import bindparam
from sqlmodel import func, select

from backend.database import NOTICE_DEAD_CLIENT, SYSTEM, Connection, Database, Pool, Statement, cut, with_keepalives
from backend.users.directory import Users

logger = logging.getLogger(__name__)

# A trigger on `users` says here whose row was changed: their subject.
LISTEN: Final[LiteralString] = "LISTEN users"
SAY = Statement(select(func.pg_notify("users", bindparam("word"))), writes=True)

BEAT: Final = 0.25  # seconds, as all of these
FIRST_BACKOFF: Final = 0.1
MAX_BACKOFF: Final = 5.0


class NotHeard(Exception):
    """DATABASE_DIRECT_URL leads to another database than DATABASE_URL, or through a transaction pooler."""


class Listener:
    """Tells `users` of changes, for as long as it is entered; entering waits for nobody.

    `url` leads past any transaction pooler to the database of `pool`. What the server has not answered within
    `patience` seconds counts as lost: the connection is cut, and another one made. Times are by `monotonic`.

    PostgreSQL delivers what was committed before a statement arrived no later than that statement's answer. So an
    answer shows that everything committed before its question was sent has been heard, and by the time of that question
    `users` may believe what it remembers. A connection that merely stands shows nothing: TCP may take minutes to tell.
    """

    def __init__(
        self,
        url: str,
        pool: Pool,
        users: Users,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        patience: float = 2.0,
    ) -> None:
        self._url = url
        self._database = Database(pool, SYSTEM)
        self._users = users
        self._monotonic = monotonic
        self._patience = patience
        self._connection: Connection | None = None
        self._backoff = FIRST_BACKOFF
        self._failing = False
        self._left = False

    async def __aenter__(self) -> Self:
        self._job = asyncio.create_task(self._listen_forever(), name="changes of users")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left = True
        if self._connection is not None:
            # A statement that is cancelled would be cancelled at the server, too, which may hang.
            cut(self._connection)
            await asyncio.wait({self._job}, timeout=0.5)
        self._job.cancel()
        with suppress(asyncio.CancelledError):
            await self._job

    async def _listen_forever(self) -> None:
        while True:
            try:
                await self._listen()
            except Exception as error:  # noqa: BLE001 - the edge of a background task: whatever it was, try again
                if self._left:
                    return
                self._note(error)
            # Workers that lost the same server do not come back to it together.
            await asyncio.sleep(self._backoff * random.random())  # noqa: S311  # nothing to guess
            self._backoff = min(2 * self._backoff, MAX_BACKOFF)

    async def _listen(self) -> None:
        connection = await Connection.connect(
            with_keepalives(self._url),
            autocommit=True,
            application_name="resource-server listener",
            client_encoding="utf8",
            connect_timeout=5,
        )
        self._connection = connection
        connection.pgconn.notify_handler = self._hear
        try:
            await self._ask(connection, NOTICE_DEAD_CLIENT, connection.info.backend_pid)
            await self._ask(connection, LISTEN)
            # From here on nothing is missed; what was changed before is not known.
            self._users.forget_everybody()
            await self._check(connection)
            while True:
                sent = self._monotonic()
                await self._ask(connection, "SELECT 1")
                self._users.believe(sent)
                self._note(None)
                async for _ in connection.notifies(timeout=BEAT):
                    pass
        finally:
            self._users.believe(-inf)
            self._connection = None
            await connection.close()

    async def _ask(self, connection: Connection, query: LiteralString, *values: int) -> None:
        deadline = asyncio.get_running_loop().call_later(self._patience, cut, connection)
        try:
            await connection.execute(query, values or None)
        finally:
            deadline.cancel()

    async def _check(self, connection: Connection) -> None:
        """Say a word through the pool, and hear it here. Raises NotHeard."""
        word = uuid4().hex
        await self._database.rows(SAY, word=word)
        async with aclosing(connection.notifies(timeout=self._patience)) as notices:
            async for notice in notices:
                if notice.payload == word:
                    return
        raise NotHeard(NotHeard.__doc__)

    def _hear(self, notice: PGnotify) -> None:
        self._users.forget(notice.extra.decode())

    def _note(self, error: Exception | None) -> None:
        if error is None:
            self._backoff = FIRST_BACKOFF
            if self._failing:
                logger.info("changes of users are heard again")
        elif not self._failing:
            # The message of any other error may name hosts and logins.
            why = str(error) if isinstance(error, NotHeard) else type(error).__name__
            logger.warning("changes of users are not heard, so each request looks for itself: %s", why)
        self._failing = error is not None
