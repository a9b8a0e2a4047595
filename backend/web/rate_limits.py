"""Rate limits: authenticated requests are limited per user, all others per IP address (/64 for IPv6).

The counters in memory are our own and bounded. Those of the library `limits` (5.8.0) keep every key for a whole window
and scan all keys at each hit: 17 ms of processor time with 50,000 addresses, where these take 2 us.
"""

import asyncio
import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, Protocol

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.auth import AuthError, TokenVerifier, read_token
from backend.web.problems import DomainError, domain_error
from backend.web.proxies import client_network

Subject = Literal["user", "address", "issuer"]

EXEMPT: Final = frozenset({"/livez", "/readyz", "/metrics"})
SECURITY_EVENTS: Final = "/api/v1/security-events"  # authenticated by the token in the body
MAX_KEYS: Final = 50_000


class Quota(NamedTuple):
    """A number of requests in a window of seconds."""

    amount: int
    window: int


class Decision(NamedTuple):
    """The use of a quota after a request, for the `RateLimit` fields (draft-ietf-httpapi-ratelimit-headers-11)."""

    subject: Subject
    quota: Quota
    used: int
    seconds: int  # until the quota is reset

    @property
    def exceeded(self) -> bool:
        return self.used > self.quota.amount

    def fields(self) -> list[tuple[bytes, bytes]]:
        remaining = max(0, self.quota.amount - self.used)
        return [
            _policy(self.subject, self.quota),
            (b"ratelimit", f'"{self.subject}";r={remaining};t={self.seconds}'.encode()),
        ]


@lru_cache(8)
def _policy(subject: Subject, quota: Quota) -> tuple[bytes, bytes]:
    return b"ratelimit-policy", f'"{subject}";q={quota.amount};w={quota.window}'.encode()


class RateLimited(DomainError):
    """Too many requests. Retry after the number of seconds in Retry-After."""

    status, code = 429, "rate_limited"

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.decision = decision
        self.headers = {"Retry-After": str(decision.seconds)}


class Counters:
    """Counts requests by key, for at most `size` keys. The window of a key begins with its first request.

    All windows have the same length, so keys expire in the order of insertion and no search or sweep is needed.
    """

    def __init__(self, window: float, *, size: int = MAX_KEYS, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = window
        self._size = size
        self._clock = clock
        self._counts: dict[str, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def hit(self, key: str) -> tuple[int, float]:
        """Count a request. Returns the count and the seconds until the window ends."""
        now = self._clock()
        count, end = self._counts.get(key, (0, 0.0))
        if end > now:
            self._counts[key] = (count + 1, end)
            return count + 1, end - now
        self.set(key, 1, self._window)
        return 1, self._window

    def get(self, key: str) -> tuple[int, float]:
        """The count and the seconds until the window ends."""
        if key not in self._counts:
            return 0, 0.0
        count, end = self._counts[key]
        seconds = end - self._clock()
        return (count, seconds) if seconds > 0 else (0, 0.0)

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
    """Counters that workers share."""

    up: asyncio.Event

    async def hit(self, key: str) -> tuple[int, float] | None:
        """As `Counters.hit`; None while the counters are unavailable."""


class RateLimits:
    """Counts requests against the quota of each user and each address; one per process."""

    def __init__(
        self,
        quota: Quota,
        *,
        shared: Shared | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_rejection: Callable[[Subject], None] | None = None,
    ) -> None:
        """`on_rejection` is called for each request that is rejected with 429."""
        self.quota: Final = quota
        self.shared: Final = shared
        self._on_rejection = on_rejection
        # Separate counters, so that a flood from many addresses does not evict users.
        self._local: dict[Subject, Counters] = {
            "user": Counters(quota.window, clock=clock),
            "address": Counters(quota.window, clock=clock),
        }

    async def count(self, subject: Subject, key: str) -> Decision:
        """Count a request. Requests over the quota are counted in this process only."""
        local = self._local[subject]
        result: tuple[int, float] | None = None
        if self.shared is not None and local.get(key)[0] <= self.quota.amount:
            # The key contains the quota, since deployments with other quotas have other windows.
            result = await self.shared.hit(f"resource-server:{self.quota.amount}/{self.quota.window}:{subject}:{key}")
        if result is None:
            result = local.hit(key)
        else:
            local.set(key, *result)
        return decide(subject, self.quota, *result)

    def would_exceed(self, subject: Subject, key: str) -> Decision | None:
        """The decision on one more request if it would exceed the quota, else None. Counts nothing."""
        count, seconds = self._local[subject].get(key)
        return decide(subject, self.quota, count + 1, seconds) if count >= self.quota.amount else None

    def reject(self, decision: Decision) -> RateLimited:
        if self._on_rejection is not None:
            self._on_rejection(decision.subject)
        return RateLimited(decision)


def decide(subject: Subject, quota: Quota, count: int, seconds: float) -> Decision:
    return Decision(subject, quota, count, max(1, math.ceil(seconds)))


async def count_user(state: dict[str, Any]) -> None:
    """Count the request of a principal, before its first database query. Raises RateLimited."""
    limits: RateLimits | None = state["rate_limits"]
    if limits is not None:
        state["rate_limit"] = decision = await limits.count("user", state["principal"].subject)
        if decision.exceeded:
            raise limits.reject(decision)


class RateLimiting:
    """ASGI middleware around the routes: checks the quota of the address before any signature is verified.

    A request with valid credentials counts for its user, any other request for its address. Users behind one address
    therefore do not share a quota, while forged tokens are limited. An address over its quota is rejected, except for
    requests with a recently verified token: a neighbour's flood does not lock users out. On routes that do not read
    credentials, every request counts for its address.

    Security events have quotas of their own (`EventQuotas`), which are counted by their route.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in EXEMPT:
            await self.app(scope, receive, send)
            return
        state = scope["state"]
        is_event = scope["path"] == SECURITY_EVENTS and scope["method"] == "POST"
        limits: RateLimits | None = None if is_event else state["rate_limits"]
        address = client_network(scope)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                decision: Decision | None = state.get("rate_limit")
                # A failed authentication counts for the address. Server errors are not the client's fault.
                if decision is None and limits is not None and message["status"] < 500:
                    decision = state["rate_limit"] = await limits.count("address", address)
                if decision is not None:
                    message["headers"] = [*message["headers"], *decision.fields()]
            await send(message)

        if limits is None:
            await self.app(scope, receive, send_with_limits if is_event else send)
            return
        has_credentials = reads_credentials(scope["path"]) and _has_credentials(scope)
        decision = limits.would_exceed("address", address)
        if decision and has_credentials and _was_verified(state["bearer"].verifier, scope):
            decision = None
        elif decision is None and not has_credentials:
            decision = state["rate_limit"] = await limits.count("address", address)
        if decision and decision.exceeded:
            state["rate_limit"] = decision
            response = await domain_error(Request(scope), limits.reject(decision))
            await response(scope, receive, send_with_limits)
            return
        await self.app(scope, receive, send_with_limits)


def reads_credentials(path: str) -> bool:
    """Whether the route of a path reads credentials."""
    return path.startswith("/api/") and path != SECURITY_EVENTS


def _has_credentials(scope: Scope) -> bool:
    return b"authorization" in dict(scope["headers"])


def _was_verified(verifier: TokenVerifier, scope: Scope) -> bool:
    try:
        return verifier.remembers(read_token(Request(scope)))
    except AuthError:
        return False
