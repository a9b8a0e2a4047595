"""The issuer's public keys, kept fresh in the background, so that no request with a known kid ever waits for them."""

import asyncio
import logging
import random as random_module
import string
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from types import MappingProxyType, TracebackType
from typing import Any, Final, Protocol, Self

import httpx
from cachetools import FIFOCache

from .encoding import decode_jwks
from .errors import AuthError, InvalidToken, KeysUnavailable, Reason, UnusableKeys
from .fetch import FetchFailed, check_url, fetch, new_client
from .jwk import Key, KeySet, SkippedKey
from .observer import FetchReason, Observer

logger = logging.getLogger(__name__)

REFRESH_EVERY: Final = 60.0
JITTER: Final = 0.1
# Cache-Control: max-age is honoured between these.
MIN_REFRESH: Final = 30.0
MAX_REFRESH: Final = 300.0
FIRST_BACKOFF: Final = 1.0
MAX_BACKOFF: Final = 30.0
WAIT: Final = 2.0  # how long a request waits for a fetch
MAX_WAITERS: Final = 32
MEMORY: Final = 5.0  # a fetch answers for this long after its start, for the kids that were asked for
BUDGET: Final = 2  # attempts that requests may start at once, then one every so many seconds:
BUDGET_EVERY: Final = 5.0
# Better Auth's kids are database ids. An unknown one with slashes, quotes or the like is an attack and no rotation.
_USUAL_IN_KIDS: Final = frozenset(string.ascii_letters + string.digits + "._~+=:@-")


class KeySource(Protocol):
    """Where a verifier finds keys."""

    def current(self, kid: str) -> Key | None:
        """The key of that id at this moment, at once; None when there is none or the set is too old to be believed."""

    async def get(self, kid: str) -> Key:
        """The key of that id, fetched if need be. Raises InvalidToken (it does not exist) or KeysUnavailable."""

    async def replacement(self, key: Key, /) -> Key | None:
        """The key that has taken the id of `key`, which did not fit a signature; None when there is none."""


class StaticKeys:
    """A fixed JWK set. Raises UnusableKeys when no key of it can be used."""

    def __init__(self, jwks: Mapping[str, Any]) -> None:
        self.set: Final = KeySet.from_jwks(jwks)

    def current(self, kid: str) -> Key | None:
        return self.set.keys.get(kid)

    async def get(self, kid: str) -> Key:
        if key := self.set.keys.get(kid):
            return key
        raise InvalidToken(Reason.UNKNOWN_KEY)

    async def replacement(self, _key: Key, /) -> Key | None:
        return None


@dataclass(frozen=True, slots=True)
class KeysStatus:
    """A key source seen from outside. Times are in seconds, by the monotonic clock."""

    ready: bool
    age: float | None
    """Since the start of the fetch that brought the set; None before the first."""
    kids: tuple[str, ...]
    skipped: tuple[SkippedKey, ...]
    last_error: str | None
    """Of the last attempt; None when it brought a usable set."""
    fetches: Mapping[FetchReason, int]
    """Attempts started, by reason."""
    failures: int
    """Attempts that failed, of all."""
    waiting: int
    """Requests that wait for a fetch now."""
    unknown_kids: int
    """Requests so far whose kid was not in the set."""


class RemoteKeys:
    """The key set at a URL. Enter it (`async with`) before use: it then refreshes itself until it is left.

    Entering neither waits for the endpoint nor fails when it is down. `clock` (seconds since 1970) reads dates in
    Retry-After, `monotonic` measures everything else, `sleep` and `random` (0 to 1) pace the background refresh; tests
    pass their own. A `client` that is passed in is used and not closed: give it its certificates and
    `trust_env=False`. `max_stale` is for how many seconds the last good set serves while the endpoint fails: the
    longest life of a token, since past it none from before the outage can be alive.

    Raises ValueError for a URL that is neither https nor on the loopback.
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
        self._random = random
        self._observer = observer or Observer()
        self._max_stale = max_stale

        self._set: KeySet | None = None
        self._body = b""
        self._since = 0.0  # start of the last successful attempt
        self._loaded = asyncio.Event()
        self._due = monotonic()
        self._not_before = self._due  # the endpoint asked to be left alone until then
        self._backoff = FIRST_BACKOFF
        self._budget = _TokenBucket(BUDGET, BUDGET_EVERY, self._due)
        self._absent: FIFOCache[str, float] = FIFOCache(1024)  # kid -> start of the attempt whose set lacked it
        self._confirmed: dict[str, float] = {}  # kid -> start of the attempt that brought the same key again
        self._flight: asyncio.Task[bool] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._left = False

        self._fetches = dict.fromkeys(FetchReason, 0)
        self._failures = 0
        self._last_error: str | None = None
        self._waiting = 0
        self._unknown_kids = 0

    async def __aenter__(self) -> Self:
        if self._refreshing is not None:
            raise RuntimeError("RemoteKeys can be entered once")
        if self._client is None:
            self._client = self._owned_client = new_client()
        self._refreshing = asyncio.create_task(self._refresh_forever(), name="key set refresh")
        self._begin(FetchReason.REFRESH)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left = True
        tasks = [task for task in (self._refreshing, self._flight) if task is not None]
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            if self._owned_client is not None:
                await self._owned_client.aclose()

    @property
    def ready(self) -> bool:
        """Whether tokens can be judged now: a set is there, and not too old."""
        return self._usable(self._monotonic()) is not None

    def status(self) -> KeysStatus:
        """A snapshot for health checks, metrics and the doctor."""
        now = self._monotonic()
        return KeysStatus(
            ready=self._usable(now) is not None,
            age=None if self._set is None else now - self._since,
            kids=tuple(self._set.keys) if self._set else (),
            skipped=self._set.skipped if self._set else (),
            last_error=self._last_error,
            fetches=MappingProxyType(dict(self._fetches)),
            failures=self._failures,
            waiting=self._waiting,
            unknown_kids=self._unknown_kids,
        )

    def current(self, kid: str) -> Key | None:
        now = self._monotonic()
        if now >= self._due and self._under_way() is None and self._refreshing is not None and not self._left:
            # The background task has overslept (timers stop with a suspended machine). Nobody waits for this.
            self._begin(FetchReason.REFRESH)
        usable = self._usable(now)
        return usable.keys.get(kid) if usable else None

    async def get(self, kid: str) -> Key:
        arrived = self._monotonic()
        if key := self.current(kid):
            return key
        if self._usable(arrived) is not None:
            self._unknown_kids += 1
            try:
                key = await self._find(kid, arrived)
            except AuthError as error:
                self._observer.unknown_kid("absent" if isinstance(error, InvalidToken) else "unavailable")
                raise
            self._observer.unknown_kid("found")
            return key
        if self._set is None:
            await self._first_set()
        elif not await self._share_attempt(FetchReason.NO_KEYS):
            raise self._unavailable()
        return self._settle(kid, arrived)

    async def replacement(self, key: Key, /) -> Key | None:
        # A key that was looked up anew for this reason just now is still the same: forgeries cost no more than that.
        if self._monotonic() - self._confirmed.get(key.kid, -inf) > MEMORY:
            confirmed = await self._share_attempt(FetchReason.BAD_SIGNATURE)
            if confirmed is None:
                raise self._unavailable()  # the answer is on its way, and may well be another key
            if confirmed and self.current(key.kid) == key:
                self._confirmed[key.kid] = self._since
        found = self.current(key.kid)
        return None if found == key else found

    async def _find(self, kid: str, arrived: float) -> Key:
        """Look for a kid that the set lacks: the normal way in which a rotation shows."""
        if not self._is_fetchable(kid) or arrived - self._absent.get(kid, -inf) <= MEMORY:
            raise InvalidToken(Reason.UNKNOWN_KEY)
        if not await self._share_attempt(FetchReason.UNKNOWN_KID):
            raise self._unavailable()
        return self._settle(kid, arrived)

    def _settle(self, kid: str, arrived: float) -> Key:
        """Say what an attempt has shown: the key; that it does not exist; or that this is not known yet.

        Only an attempt begun after the request arrived, or at most 5 s before, shows that a kid does not exist.
        """
        if key := self.current(kid):
            return key
        if not self.ready or arrived - self._since > MEMORY:
            raise self._unavailable()
        self._absent[kid] = self._since
        raise InvalidToken(Reason.UNKNOWN_KEY)

    async def _first_set(self) -> None:
        """Wait for any attempt to succeed, not only the next: the API may have started a moment before its issuer."""
        self._ask(FetchReason.NO_KEYS)
        with self._one_more_waiting():
            try:
                async with asyncio.timeout(WAIT):
                    await self._loaded.wait()
            except TimeoutError:
                raise self._unavailable() from None

    def _is_fetchable(self, kid: str) -> bool:
        """Whether a kid could be one of this issuer's: of the usual characters, and of those its other kids have."""
        return set(kid) <= _USUAL_IN_KIDS.union(*(self._set.keys if self._set else ()))

    async def _share_attempt(self, reason: FetchReason) -> bool | None:
        """Wait for the attempt in flight or a new one, and say whether it brought a set.

        False: it failed, or the budget allows none. None: one is under way, but too many wait for it already, or it
        takes too long.
        """
        if self._waiting >= MAX_WAITERS:
            return None
        if (flight := self._ask(reason)) is None:
            return False
        with self._one_more_waiting():
            # Unlike wait_for, this leaves the shared attempt alone when one of those who wait gives up.
            await asyncio.wait({flight}, timeout=WAIT)
        if not flight.done():
            return None
        return not flight.cancelled() and flight.result()

    @contextmanager
    def _one_more_waiting(self) -> Iterator[None]:
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def _unavailable(self) -> KeysUnavailable:
        wait = self._not_before - self._monotonic()
        return KeysUnavailable("the issuer's keys cannot be had at the moment", max(1.0, wait))

    def _usable(self, now: float) -> KeySet | None:
        return self._set if now - self._since <= self._max_stale else None

    def _ask(self, reason: FetchReason) -> asyncio.Task[bool] | None:
        """The attempt in flight, or a new one if the budget and the endpoint allow."""
        if self._refreshing is None:
            raise RuntimeError("RemoteKeys must be entered before use: async with RemoteKeys(url) as keys")
        now = self._monotonic()
        if (flight := self._under_way()) is not None or self._left:
            return flight
        if now < self._not_before or not self._budget.take(now):
            return None
        return self._begin(reason)

    def _under_way(self) -> asyncio.Task[bool] | None:
        # Asked of the task itself: an eager task factory may have finished it before anybody could note it down.
        return None if self._flight is None or self._flight.done() else self._flight

    def _begin(self, reason: FetchReason) -> asyncio.Task[bool]:
        self._flight = asyncio.create_task(self._attempt(reason), name=f"key set: {reason}")
        return self._flight

    async def _refresh_forever(self) -> None:
        while True:
            delay = self._due - self._monotonic()
            if delay > 0:
                await self._sleep(delay)
            else:
                await asyncio.wait({self._under_way() or self._begin(FetchReason.REFRESH)})

    async def _attempt(self, reason: FetchReason) -> bool:
        """Fetch once, take note of what came of it, and say whether it was a usable set. Never raises."""
        started = self._monotonic()
        self._fetches[reason] += 1
        retry_after = 0.0
        error: str | None = None
        try:
            assert self._client is not None
            fetched = await fetch(self._client, self._url, self._clock)
            if self._set is None or fetched.body != self._body:
                self._swap(_parse(fetched.body), fetched.body)
        except FetchFailed as failure:
            error, retry_after = str(failure), failure.retry_after
        except UnusableKeys as failure:
            error = str(failure)
        except Exception as failure:  # noqa: BLE001 - the edge of a background task: whatever a client raises, go on
            error = type(failure).__name__
        now = self._monotonic()
        if error is None:
            self._since = started
            self._loaded.set()
            self._backoff = FIRST_BACKOFF
            base = REFRESH_EVERY if fetched.max_age is None else fetched.max_age
            jittered = min(max(base, MIN_REFRESH), MAX_REFRESH) * (1 + JITTER * (2 * self._random() - 1))
            self._due = started + min(max(jittered, MIN_REFRESH), MAX_REFRESH)
        else:
            self._failures += 1
            self._not_before = now + retry_after
            if reason is FetchReason.REFRESH:
                self._due = now + self._random() * self._backoff
                self._backoff = min(2 * self._backoff, MAX_BACKOFF)
            self._due = max(self._due, self._not_before)
        self._note(error)
        self._observer.fetched(reason, now - started, error)
        return error is None

    def _swap(self, new: KeySet, body: bytes) -> None:
        if self._set is None or new.keys != self._set.keys:
            self._absent.clear()
            self._confirmed.clear()
            logger.info("key set changed: %s", ", ".join(new.keys))
        for key in new.skipped if self._set is None or new.skipped != self._set.skipped else ():
            logger.warning("key skipped: kid %s: %s", key.kid, key.reason)
        self._set, self._body = new, body

    def _note(self, error: str | None) -> None:
        if error != self._last_error:
            if error is None:
                logger.info("key set fetched again")
            else:
                logger.warning("key set not fetched: %s", error)
        self._last_error = error


class _TokenBucket:
    """`capacity` starts at once, then one every `interval` seconds."""

    def __init__(self, capacity: float, interval: float, now: float) -> None:
        self._capacity = capacity
        self._interval = interval
        self._level = capacity
        self._at = now

    def take(self, now: float) -> bool:
        self._level = min(self._capacity, self._level + (now - self._at) / self._interval)
        self._at = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


def _parse(body: bytes) -> KeySet:
    try:
        document = decode_jwks(body)
    except ValueError:
        raise UnusableKeys("not JSON") from None
    return KeySet.from_jwks(document)
