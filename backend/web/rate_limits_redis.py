"""Counters in Redis, shared by the workers of all machines."""

import asyncio
import logging
from asyncio import sleep
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Self

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

# A request waits at most 50 ms for Redis, in steps: if the event loop itself is late, this uses up only one step.
STEPS: Final = 5
STEP: Final = 0.01  # seconds
RETRY_AFTER: Final = 1.0  # seconds between attempts to reach Redis again

# One round trip; every key gets an expiry. EVAL, since a restarted Redis no longer has the script of EVALSHA.
_HIT = """
local count = redis.call('INCR', KEYS[1])
local ttl = redis.call('PTTL', KEYS[1])
if ttl < 0 then
  ttl = tonumber(ARGV[1])
  redis.call('PEXPIRE', KEYS[1], ttl)
end
return {count, ttl}
"""


class SharedCounters:
    """Counts requests in Redis; one per process. Concurrent hits share one round trip on one connection.

    When Redis fails or does not respond within 50 ms, `hit` returns None at once until Redis responds again.
    """

    def __init__(self, url: str, *, window: int) -> None:
        # No retries by the client: requests would wait for them.
        self._redis = Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_connect_timeout=RETRY_AFTER)
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
        self._resolve(self._pending, None)
        await self._redis.aclose()

    async def hit(self, key: str) -> tuple[int, float] | None:
        """Count a request. Returns the count and the seconds until the window ends; None while Redis is unavailable."""
        if not self.up.is_set():
            return None
        result: asyncio.Future[tuple[int, float] | None] = asyncio.get_running_loop().create_future()
        self._pending.append((key, result))
        self._wake.set()
        return await result

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._pending = self._pending, []
            try:
                self._resolve(batch, await self._query([key for key, _ in batch]))
            except Exception as error:  # noqa: BLE001 - outer edge of a background task
                self.up.clear()
                self._resolve(batch + self._pending, None)
                self._pending = []
                logger.warning(
                    "Redis is unavailable (%s): each worker counts rate limits alone until it responds",
                    type(error).__name__,
                )
                await self._recover()
            except asyncio.CancelledError:
                self._resolve(batch, None)
                raise

    async def _recover(self) -> None:
        while not self.up.is_set():
            await sleep(RETRY_AFTER)
            try:
                await self._query([])
            except (RedisError, OSError, TimeoutError):
                continue
            self.up.set()
            logger.info("Redis responds again: rate limits are shared")

    async def _query(self, keys: list[str]) -> list[tuple[int, float]]:
        try:
            async with _deadline(), self._redis.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.eval(_HIT, 1, key, str(self._window))
                if not keys:
                    pipeline.ping()
                replies = await pipeline.execute()
        except BaseException:
            await self._redis.connection_pool.disconnect(inuse_connections=True)
            raise
        return [(count, ttl / 1000) for count, ttl in replies] if keys else []

    @staticmethod
    def _resolve(
        batch: list[tuple[str, asyncio.Future[tuple[int, float] | None]]], results: list[tuple[int, float]] | None
    ) -> None:
        for index, (_, result) in enumerate(batch):
            if not result.done():  # the request may have been cancelled
                result.set_result(results[index] if results else None)


@asynccontextmanager
async def _deadline() -> AsyncIterator[None]:
    """Raises TimeoutError after the last step."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle
    async with asyncio.timeout(None) as timeout:

        def step(remaining: int) -> None:
            nonlocal timer
            if remaining:
                timer = loop.call_later(STEP, step, remaining - 1)
            else:
                timeout.reschedule(loop.time())

        timer = loop.call_later(STEP, step, STEPS - 1)
        try:
            yield
        finally:
            timer.cancel()
