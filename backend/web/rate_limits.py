"""How often somebody may ask: per user once a token is good, per address before that.

The counters in memory are our own and bounded. Those of the library `limits` (5.8.0) keep every key for the length of a
window, and look through all keys at a hit: 17 ms of processor time with 50,000 addresses, where these take 2 us.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, Protocol

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.auth import AuthError, TokenVerifier, read_token
from backend.web.problems import DomainError, domain_error
from backend.web.proxies import client_network

Who = Literal["user", "address", "issuer"]

EXEMPT: Final = frozenset({"/livez", "/readyz", "/metrics"})
SPEAKS_FOR_ITSELF: Final = "/api/v1/security-events"  # by its body, whoever sends it
MOST_KEYS: Final = 50_000


class Quota(NamedTuple):
    """So many requests in so many seconds."""

    amount: int
    window: int


class Verdict(NamedTuple):
    """What is left of a quota, for the `RateLimit` fields (draft-ietf-httpapi-ratelimit-headers-11)."""

    who: Who
    quota: Quota
    used: int
    seconds: int

    @property
    def exceeded(self) -> bool:
        return self.used > self.quota.amount

    def fields(self) -> list[tuple[bytes, bytes]]:
        left = max(0, self.quota.amount - self.used)
        return [_policy(self.who, self.quota), (b"ratelimit", f'"{self.who}";r={left};t={self.seconds}'.encode())]


@lru_cache(8)
def _policy(who: Who, quota: Quota) -> tuple[bytes, bytes]:
    return b"ratelimit-policy", f'"{who}";q={quota.amount};w={quota.window}'.encode()


class RateLimited(DomainError):
    """Too many requests: Retry-After says when to ask again."""

    status, code = 429, "rate_limited"

    def __init__(self, verdict: Verdict) -> None:
        super().__init__()
        self.verdict = verdict
        self.headers = {"Retry-After": str(verdict.seconds)}


class Counters:
    """Requests by key, each in a window that its first request opens; at most `size` keys.

    All windows have one length, so the oldest key is the first to end: nothing has to be searched or swept.
    """

    def __init__(self, window: float, *, size: int = MOST_KEYS, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = window
        self._size = size
        self._clock = clock
        self._counts: dict[str, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def hit(self, key: str) -> tuple[int, float]:
        """Count one more; how many there are, and for how many seconds they count."""
        now = self._clock()
        count, end = self._counts.get(key, (0, 0.0))
        if end > now:
            self._counts[key] = (count + 1, end)
            return count + 1, end - now
        self.set(key, 1, self._window)
        return 1, self._window

    def get(self, key: str) -> tuple[int, float]:
        if key not in self._counts:
            return 0, 0.0
        count, end = self._counts[key]
        left = end - self._clock()
        return (count, left) if left > 0 else (0, 0.0)

    def set(self, key: str, count: int, seconds: float) -> None:
        now = self._clock()
        self._counts.pop(key, None)
        while self._counts:
            oldest = next(iter(self._counts))
            if self._counts[oldest][1] > now and len(self._counts) < self._size:
                break
            del self._counts[oldest]
        self._counts[key] = (count, now + seconds)


class Shared(Protocol):
    """Counters that other workers count in, too."""

    up: asyncio.Event

    async def hit(self, key: str) -> tuple[int, float] | None:
        """As `Counters.hit`, or None when they are not to be had."""


class RateLimits:
    """The quota of each user and of each address. One for the process."""

    def __init__(
        self,
        quota: Quota,
        *,
        shared: Shared | None = None,
        clock: Callable[[], float] = time.monotonic,
        refused: Callable[[Who], None] | None = None,
    ) -> None:
        """`refused` is called for each request that is answered 429."""
        self.quota: Final = quota
        self.shared: Final = shared
        self._refused = refused
        # Apart, so that a flood from many addresses pushes no user's count out.
        self._local: dict[Who, Counters] = {
            "user": Counters(quota.window, clock=clock),
            "address": Counters(quota.window, clock=clock),
        }

    async def spend(self, who: Who, key: str) -> Verdict:
        """Count a request. One that is known to be too many is counted here alone."""
        local = self._local[who]
        found: tuple[int, float] | None = None
        if self.shared is not None and local.get(key)[0] <= self.quota.amount:
            # A deployment with another quota has other windows.
            found = await self.shared.hit(f"resource-server:{self.quota.amount}/{self.quota.window}:{who}:{key}")
        if found is None:
            found = local.hit(key)
        else:
            local.set(key, *found)
        return _verdict(who, self.quota, *found)

    def spent(self, who: Who, key: str) -> Verdict | None:
        """The verdict on one more request, when it is known to be one too many; nothing is counted."""
        count, seconds = self._local[who].get(key)
        return _verdict(who, self.quota, count + 1, seconds) if count >= self.quota.amount else None

    def refuse(self, verdict: Verdict) -> RateLimited:
        if self._refused is not None:
            self._refused(verdict.who)
        return RateLimited(verdict)


def _verdict(who: Who, quota: Quota, count: int, seconds: float) -> Verdict:
    return Verdict(who, quota, count, max(1, math.ceil(seconds)))


class EventQuotas:
    """The quotas of security events. They share nothing with those of requests, so that no load delays a ban.

    - `FAILED`: tokens of one address that are refused. The sender of valid events cannot be told from another sender
      at its address before the signature is verified, so an address that has spent this quota is still heard.
    - `VERIFIED`: valid tokens, counted for each type of event, so that sign-outs cannot spend the quota of bans.
    - `CHECKED`: signatures that are verified for all addresses that have spent `FAILED` together. It bounds the
      processor time of a flood: 500 Ed25519 signatures take 60 ms.

    Each worker counts by itself, with `RATE_LIMIT=off` and with a Redis as well: neither a setting for requests nor an
    outage of another service changes how a ban arrives.
    """

    FAILED: Final = Quota(60, 60)
    VERIFIED: Final = Quota(10_000, 60)
    CHECKED: Final = Quota(500, 1)

    def __init__(
        self, *, refused: Callable[[Who], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`refused` is called for each event that is answered 429."""
        self._refused = refused
        self._failed = Counters(self.FAILED.window, clock=clock)
        self._verified = Counters(self.VERIFIED.window, clock=clock)
        self._checked = Counters(self.CHECKED.window, clock=clock)

    def is_spent(self, address: str) -> bool:
        """Whether the address has spent its quota of refused tokens."""
        return self._failed.get(address)[0] >= self.FAILED.amount

    def check(self) -> None:
        """Count a signature that is to be verified for an address that has spent its quota. Raises RateLimited."""
        self._judge(_verdict("address", self.CHECKED, *self._checked.hit("")))

    def verify(self, types: Iterable[str]) -> Verdict:
        """Count a valid token with events of these types. Raises RateLimited."""
        count, seconds = max(self._verified.hit(type) for type in types)
        return self._judge(_verdict("issuer", self.VERIFIED, count, seconds))

    def fail(self, address: str) -> Verdict:
        """Count a token that is not taken."""
        return _verdict("address", self.FAILED, *self._failed.hit(address))

    def refuse(self, verdict: Verdict) -> RateLimited:
        if self._refused is not None:
            self._refused(verdict.who)
        return RateLimited(verdict)

    def _judge(self, verdict: Verdict) -> Verdict:
        if verdict.exceeded:
            raise self.refuse(verdict)
        return verdict


async def spend_as_user(state: dict[str, Any]) -> None:
    """Count the request of a principal, before anything is asked of the database. Raises RateLimited."""
    limits: RateLimits | None = state["rate_limits"]
    if limits is not None:
        state["rate_limit"] = verdict = await limits.spend("user", state["principal"].subject)
        if verdict.exceeded:
            raise limits.refuse(verdict)


class RateLimiting:
    """Pure ASGI, around the routes: the address first, before any cryptography.

    A request with credentials counts for its user when they are good, and for its address when they are not; so many
    people behind one address share no quota, and who makes tokens up is stopped after as many as one user's requests.
    A request without credentials counts for its address at once. When an address has spent its quota, it is let in
    with a token that was good a moment ago: a stranger on one's network is no reason to be shut out. Where no
    credentials are wanted, those that come along say nothing, and a good token opens no way around the quota.

    Security events have quotas of their own (`EventQuotas`), which their route counts.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in EXEMPT:
            await self.app(scope, receive, send)
            return
        state = scope["state"]
        is_event = scope["path"] == SPEAKS_FOR_ITSELF and scope["method"] == "POST"
        limits: RateLimits | None = None if is_event else state["rate_limits"]
        address = client_network(scope)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                verdict: Verdict | None = state.get("rate_limit")
                # What goes wrong here is nobody's fault elsewhere.
                if verdict is None and limits is not None and message["status"] < 500:
                    verdict = state["rate_limit"] = await limits.spend("address", address)
                if verdict is not None:
                    message["headers"] = [*message["headers"], *verdict.fields()]
            await send(message)

        if limits is None:
            await self.app(scope, receive, send_with_limits if is_event else send)
            return
        has_credentials = wants_credentials(scope["path"]) and _has_credentials(scope)
        verdict = limits.spent("address", address)
        if verdict and has_credentials and _is_remembered(state["bearer"].verifier, scope):
            verdict = None
        elif verdict is None and not has_credentials:
            verdict = state["rate_limit"] = await limits.spend("address", address)
        if verdict and verdict.exceeded:
            state["rate_limit"] = verdict
            response = await domain_error(Request(scope), limits.refuse(verdict))
            await response(scope, receive, send_with_limits)
            return
        await self.app(scope, receive, send_with_limits)


def wants_credentials(path: str) -> bool:
    """Whether a route reads credentials, and so counts whose they are."""
    return path.startswith("/api/") and path != SPEAKS_FOR_ITSELF


def _has_credentials(scope: Scope) -> bool:
    return b"authorization" in dict(scope["headers"])


def _is_remembered(verifier: TokenVerifier, scope: Scope) -> bool:
    try:
        return verifier.remembers(read_token(Request(scope)))
    except AuthError:
        return False
