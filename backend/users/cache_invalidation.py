"""Receives PostgreSQL notifications of changed user rows and invalidates the cache of this process."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from math import inf
from typing import Final, LiteralString, Self
from uuid import uuid4

from sqlalchemy import bindparam
from sqlmodel import func, select

from backend.database import NOTICE_DEAD_CLIENT, SYSTEM, Connection, Database, Pool, Statement, cut, with_keepalives
from backend.users.provisioning import Users

logger = logging.getLogger(__name__)

# A trigger on `users` sends the subject of each changed row to this channel.
LISTEN: Final[LiteralString] = "LISTEN users"
NOTIFY = Statement(select(func.pg_notify("users", bindparam("payload"))), writes=True)

POLL_INTERVAL: Final = 0.25  # seconds, as the others
FIRST_BACKOFF: Final = 0.1
MAX_BACKOFF: Final = 5.0


class NotDelivered(Exception):
    """DATABASE_DIRECT_URL leads to a different database than DATABASE_URL, or through a transaction pooler."""


class Listener:
    """An async context manager that keeps `users` current in the background. Entering does not wait for a connection.

    `url` leads to the database of `pool` without a transaction pooler. If the server does not answer within `patience`
    seconds, the connection is cut and replaced. Times are by `monotonic`.

    PostgreSQL delivers the notifications of everything committed before a statement arrived no later than the response
    to that statement. A response therefore proves that all changes committed before the statement was sent have been
    received. An open connection alone proves nothing: TCP may take minutes to report that it is dead.
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
        self._is_failing = False
        self._is_closing = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._listen_forever(), name="user notifications")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_closing = True
        if self._connection is not None:
            # Cancelling a running statement would also cancel it at the server, which may hang.
            cut(self._connection)
            await asyncio.wait({self._task}, timeout=0.5)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _listen_forever(self) -> None:
        while True:
            try:
                await self._listen()
            except Exception as error:  # noqa: BLE001 - the edge of a background task, which must go on
                if self._is_closing:
                    return
                self._report(error)
            # Random, so that workers that lost the same server do not reconnect at the same time.
            await asyncio.sleep(self._backoff * random.random())  # noqa: S311  # not security-relevant
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
        try:
            await self._execute(connection, NOTICE_DEAD_CLIENT, connection.info.backend_pid)
            await self._execute(connection, LISTEN)
            # No change is missed from here on; earlier ones may have been.
            self._users.invalidate_all()
            await self._check_delivery(connection)
            while True:
                sent_at = self._monotonic()
                await self._execute(connection, "SELECT 1")
                await self._receive(connection, 0)  # those that arrived before the response
                self._users.confirm(sent_at)
                self._report(None)
                await self._receive(connection, POLL_INTERVAL)
        finally:
            self._users.confirm(-inf)
            self._connection = None
            await connection.close()

    async def _execute(self, connection: Connection, query: LiteralString, *values: int) -> None:
        deadline = asyncio.get_running_loop().call_later(self._patience, cut, connection)
        try:
            await connection.execute(query, values or None)
        finally:
            deadline.cancel()

    async def _check_delivery(self, connection: Connection) -> None:
        """Send a notification through the pool and wait for it on this connection. Raises NotDelivered."""
        payload = uuid4().hex
        await self._database.rows(NOTIFY, payload=payload)
        async with aclosing(connection.notifies(timeout=self._patience)) as notices:
            async for notice in notices:
                self._users.invalidate(notice.payload)
                if notice.payload == payload:
                    return
        raise NotDelivered(NotDelivered.__doc__)

    async def _receive(self, connection: Connection, seconds: float) -> None:
        """Apply the notifications that have arrived, and those of the next `seconds`."""
        async for notice in connection.notifies(timeout=seconds):
            self._users.invalidate(notice.payload)

    def _report(self, error: Exception | None) -> None:
        if error is None:
            self._backoff = FIRST_BACKOFF
            if self._is_failing:
                logger.info("notifications of changed users restored")
        elif not self._is_failing:
            # The message of any other error may contain hosts and logins.
            why = str(error) if isinstance(error, NotDelivered) else type(error).__name__
            logger.warning("no notifications of changed users; reading users from the database until restored: %s", why)
        self._is_failing = error is not None
