"""Counters in Redis, in which all workers of all machines count together."""

import asyncio
import logging
from asyncio import sleep as pause
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Self

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

# A request waits for Redis 50 ms at most, in turns: a worker that was late itself has only missed one of them.
TURNS: Final = 5
TURN: Final = 0.01  # seconds
PAUSE: Final = 1.0  # seconds between attempts to find Redis again

# One round trip, and nothing that a window left behind outlives it. EVAL, since a Redis that was restarted has
# forgotten what EVALSHA names.
_HIT = """
local count = redis.call('INCR', KEYS[1])
local left = redis.call('PTTL', KEYS[1])
if left < 0 then
  left = tonumber(ARGV[1])
  redis.call('PEXPIRE', KEYS[1], left)
end
return {count, left}
"""


class SharedCounters:
    """One for the process. The hits of one moment take one round trip, on one connection.

    A Redis that fails, or does not answer in 50 ms, is left alone until it answers again; nobody waits meanwhile.
    """

    def __init__(self, url: str, *, window: int) -> None:
        # Its own retries would be waited for.
        self._redis = Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_connect_timeout=PAUSE)
        self._window = window * 1000
        self._pending: list[tuple[str, asyncio.Future[tuple[int, float] | None]]] = []
        self._wake = asyncio.Event()
        self.up = asyncio.Event()
        self.up.set()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="shared rate limits")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        self._answer(self._pending, None)
        await self._redis.aclose()

    async def hit(self, key: str) -> tuple[int, float] | None:
        """How many hits there are with this one, and for how many seconds they count; None without Redis."""
        if not self.up.is_set():
            return None
        answer: asyncio.Future[tuple[int, float] | None] = asyncio.get_running_loop().create_future()
        self._pending.append((key, answer))
        self._wake.set()
        return await answer

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._pending = self._pending, []
            try:
                self._answer(batch, await self._ask([key for key, _ in batch]))
            except Exception as error:  # noqa: BLE001 - the edge of a background task: requests wait for it to go on
                self.up.clear()
                self._answer(batch + self._pending, None)
                self._pending = []
                logger.warning("rate limits are each worker's own for now: Redis: %s", type(error).__name__)
                await self._recover()
            except asyncio.CancelledError:
                self._answer(batch, None)
                raise

    async def _recover(self) -> None:
        while not self.up.is_set():
            await pause(PAUSE)
            try:
                await self._ask([])
            except (RedisError, OSError, TimeoutError):
                continue
            self.up.set()
            logger.info("rate limits are shared again")

    async def _ask(self, keys: list[str]) -> list[tuple[int, float]]:
        try:
            async with _patience(), self._redis.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.eval(_HIT, 1, key, str(self._window))
                if not keys:
                    pipeline.ping()
                found = await pipeline.execute()
        except BaseException:
            await self._redis.connection_pool.disconnect(inuse_connections=True)
            raise
        return [(count, left / 1000) for count, left in found] if keys else []

    @staticmethod
    def _answer(
        batch: list[tuple[str, asyncio.Future[tuple[int, float] | None]]], found: list[tuple[int, float]] | None
    ) -> None:
        for index, (_, answer) in enumerate(batch):
            if not answer.done():  # whoever asked may have gone
                answer.set_result(found[index] if found else None)


@asynccontextmanager
async def _patience() -> AsyncIterator[None]:
    """Raises TimeoutError after the last turn."""
    loop = asyncio.get_running_loop()
    turn: asyncio.TimerHandle
    async with asyncio.timeout(None) as timeout:

        def take(left: int) -> None:
            nonlocal turn
            if left:
                turn = loop.call_later(TURN, take, left - 1)
            else:
                timeout.reschedule(loop.time())

        turn = loop.call_later(TURN, take, TURNS - 1)
        try:
            yield
        finally:
            turn.cancel()
