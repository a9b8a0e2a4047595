"""Caches the key set of a JWKS URL and refreshes it in the background: requests with a known kid never wait."""

import asyncio
import logging
import random as random_module
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from types import MappingProxyType
from typing import Final, Self

import httpx

from .errors import AuthError, InvalidToken, KeysUnavailable, Reason, UnusableKeys
from .jwk import Key
from .jwks_cache import CacheState, KeyCache
from .jwks_fetch import FetchFailed, check_url, fetch, new_client
from .jwks_refresh import RefreshPolicy
from .key_source import KeysStatus
from .observer import FetchReason, Observer

logger = logging.getLogger(__name__)

WAIT_TIMEOUT: Final = 2.0  # seconds that a request waits for a fetch
MAX_WAITERS: Final = 32


class _Lifecycle(Enum):
    NEW = auto()
    ENTERED = auto()
    EXITED = auto()


class _Outcome(Enum):
    SUCCEEDED = auto()
    FAILED = auto()  # also when the policy does not allow a fetch
    PENDING = auto()  # still running after WAIT_TIMEOUT, or too many requests wait for it


class RemoteKeys:
    """The key set at a URL, refreshed in the background while the object is entered with `async with`.

    Entering does not wait for the endpoint and does not fail when it is down. `clock` (seconds since 1970) is used to
    read dates in Retry-After, `monotonic` for everything else; `sleep` and `random` (0 to 1) pace the background
    refresh. A `client` passed in is not closed; give it `trust_env=False`. `max_stale` is for how many seconds the last
    good set is used while the endpoint fails: the maximum lifetime of a token, since older tokens have then expired.

    Raises ValueError for a URL that is neither https nor http to a loopback address.
    """

    def __init__(
        self,
        url: str,
        *,
        client: httpx.AsyncClient | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = random_module.random,
        observer: Observer | None = None,
        max_stale: float = 3600,
    ) -> None:
        self._url = check_url(url)
        self._client = client
        self._owned_client: httpx.AsyncClient | None = None
        self._clock = clock
        self._monotonic = monotonic
        self._sleep = sleep
        self._observer = observer or Observer()

        self._cache = KeyCache(max_stale)
        self._loaded = asyncio.Event()
        self._policy = RefreshPolicy(monotonic(), random)
        self._fetch_task: asyncio.Task[bool] | None = None
        self._refresh_task: asyncio.Task[None] | None = None
        self._lifecycle = _Lifecycle.NEW

        self._fetches = dict.fromkeys(FetchReason, 0)
        self._failures = 0
        self._last_error: str | None = None
        self._waiting = 0
        self._unknown_kids = 0

    async def __aenter__(self) -> Self:
        if self._lifecycle is not _Lifecycle.NEW:
            raise RuntimeError("RemoteKeys can be entered once")
        if self._client is None:
            self._client = self._owned_client = new_client()
        self._lifecycle = _Lifecycle.ENTERED
        self._refresh_task = asyncio.create_task(self._refresh_forever(), name="key set refresh")
        self._start_fetch(FetchReason.REFRESH)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._lifecycle = _Lifecycle.EXITED
        tasks = [task for task in (self._refresh_task, self._fetch_task) if task is not None]
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            if self._owned_client is not None:
                await self._owned_client.aclose()

    @property
    def ready(self) -> bool:
        """Whether tokens can be verified now: a key set is cached and not older than `max_stale`."""
        return self._cache.usable(self._monotonic()) is not None

    def status(self) -> KeysStatus:
        """Return a snapshot for health checks and metrics."""
        now, cached = self._monotonic(), self._cache.set
        return KeysStatus(
            ready=self._cache.usable(now) is not None,
            age=None if cached is None else now - self._cache.fetched_at,
            kids=tuple(cached.keys) if cached else (),
            skipped=cached.skipped if cached else (),
            last_error=self._last_error,
            fetches=MappingProxyType(dict(self._fetches)),
            failures=self._failures,
            waiting=self._waiting,
            unknown_kids=self._unknown_kids,
        )

    def current(self, kid: str) -> Key | None:
        now = self._monotonic()
        if now >= self._policy.due and self._running_fetch() is None and self._lifecycle is _Lifecycle.ENTERED:
            # The background task is late, since timers stop while a machine is suspended.
            self._start_fetch(FetchReason.REFRESH)
        usable = self._cache.usable(now)
        return usable.keys.get(kid) if usable else None

    async def get(self, kid: str) -> Key:
        arrived = self._monotonic()
        if key := self.current(kid):
            return key
        state = self._cache.state(arrived)
        if state is CacheState.USABLE:
            return await self._get_unknown(kid, arrived)
        if state is CacheState.EMPTY:
            await self._wait_for_first_set()
        elif await self._share_fetch(FetchReason.NO_KEYS) is not _Outcome.SUCCEEDED:
            raise self._unavailable()
        return self._look_up(kid, arrived)

    async def replacement(self, key: Key, /) -> Key | None:
        # A recent fetch that returned the same key is not repeated, so that forged signatures cannot cause a flood.
        if not self._cache.is_unchanged(key.kid, self._monotonic()):
            outcome = await self._share_fetch(FetchReason.BAD_SIGNATURE)
            if outcome is _Outcome.PENDING:
                raise self._unavailable()  # the pending response may contain another key
            if outcome is _Outcome.SUCCEEDED and self.current(key.kid) == key:
                self._cache.mark_unchanged(key.kid)
        found = self.current(key.kid)
        return None if found == key else found

    async def _get_unknown(self, kid: str, arrived: float) -> Key:
        """Return a key that the cached set does not contain: after a rotation, a fetch returns it."""
        self._unknown_kids += 1
        try:
            if not self._cache.is_fetchable(kid) or self._cache.is_absent(kid, arrived):
                raise InvalidToken(Reason.UNKNOWN_KEY)
            if await self._share_fetch(FetchReason.UNKNOWN_KID) is not _Outcome.SUCCEEDED:
                raise self._unavailable()
            key = self._look_up(kid, arrived)
        except AuthError as error:
            self._observer.unknown_kid("absent" if isinstance(error, InvalidToken) else "unavailable")
            raise
        self._observer.unknown_kid("found")
        return key

    def _look_up(self, kid: str, arrived: float) -> Key:
        """Return the key after a fetch. Raises InvalidToken when it does not exist, else KeysUnavailable.

        A key does not exist if it is missing from a fetch that began after the request arrived or at most 5 s before.
        """
        if key := self.current(kid):
            return key
        if not self.ready or not self._cache.is_recent(arrived):
            raise self._unavailable()
        self._cache.mark_absent(kid)
        raise InvalidToken(Reason.UNKNOWN_KEY)

    async def _wait_for_first_set(self) -> None:
        """Wait for any successful fetch, not only the next one: the issuer may start shortly after the API."""
        self._request_fetch(FetchReason.NO_KEYS)
        with self._counted_as_waiting():
            try:
                async with asyncio.timeout(WAIT_TIMEOUT):
                    await self._loaded.wait()
            except TimeoutError:
                raise self._unavailable() from None

    async def _share_fetch(self, reason: FetchReason) -> _Outcome:
        """Wait for the running fetch, or for a new one if the budget allows it."""
        if self._waiting >= MAX_WAITERS:
            return _Outcome.PENDING
        if (task := self._request_fetch(reason)) is None:
            return _Outcome.FAILED
        with self._counted_as_waiting():
            # Unlike wait_for, this does not cancel the shared fetch when one request is cancelled.
            await asyncio.wait({task}, timeout=WAIT_TIMEOUT)
        if not task.done():
            return _Outcome.PENDING
        return _Outcome.SUCCEEDED if not task.cancelled() and task.result() else _Outcome.FAILED

    @contextmanager
    def _counted_as_waiting(self) -> Iterator[None]:
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def _unavailable(self) -> KeysUnavailable:
        wait = self._policy.not_before - self._monotonic()
        return KeysUnavailable("the issuer's keys are unavailable", max(1.0, wait))

    def _request_fetch(self, reason: FetchReason) -> asyncio.Task[bool] | None:
        """Return the running fetch, or start one if the policy allows it; otherwise None."""
        if self._lifecycle is _Lifecycle.NEW:
            raise RuntimeError("RemoteKeys must be entered before use: async with RemoteKeys(url) as keys")
        if (task := self._running_fetch()) is not None or self._lifecycle is _Lifecycle.EXITED:
            return task
        return self._start_fetch(reason) if self._policy.spend(self._monotonic()) else None

    def _running_fetch(self) -> asyncio.Task[bool] | None:
        # An eager task factory may finish a task before it is assigned; only the task itself knows that it is done.
        return None if self._fetch_task is None or self._fetch_task.done() else self._fetch_task

    def _start_fetch(self, reason: FetchReason) -> asyncio.Task[bool]:
        self._fetch_task = asyncio.create_task(self._fetch(reason), name=f"key set: {reason}")
        return self._fetch_task

    async def _refresh_forever(self) -> None:
        while True:
            if (delay := self._policy.due - self._monotonic()) > 0:
                await self._sleep(delay)
            else:
                await asyncio.wait({self._running_fetch() or self._start_fetch(FetchReason.REFRESH)})

    async def _fetch(self, reason: FetchReason) -> bool:
        """Fetch once and record the result; whether it returned a usable set. Never raises."""
        started = self._monotonic()
        self._fetches[reason] += 1
        retry_after = 0.0
        error: str | None = None
        try:
            assert self._client is not None
            fetched = await fetch(self._client, self._url, self._clock)
            self._cache.store(fetched.body, started)
        except FetchFailed as failure:
            error, retry_after = str(failure), failure.retry_after
        except UnusableKeys as failure:
            error = str(failure)
        except Exception as failure:  # noqa: BLE001 - the outer edge of a task that must survive any error of a client
            error = type(failure).__name__
        now = self._monotonic()
        if error is None:
            self._loaded.set()
            self._policy.succeeded(started, fetched.max_age)
            if self._last_error is not None:
                logger.info("JWKS refresh recovered")
        else:
            self._failures += 1
            self._policy.failed(now, retry_after, in_background=reason is FetchReason.REFRESH)
            if error != self._last_error:
                logger.warning("JWKS refresh failed: %s", error)
        self._last_error = error
        self._observer.fetched(reason, now - started, error)
        return error is None
