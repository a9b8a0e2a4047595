"""Rate limits: authenticated requests are limited per user, all others per IP address (/64 for IPv6)."""

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.auth import AuthError, Principal, TokenVerifier, read_token
from backend.web.problems import DomainError, domain_error
from backend.web.proxies import client_network
from backend.web.quotas import Counters, Decision, Quota, Subject, decide
from backend.web.request_state import request_state, route_path

EXEMPT: Final = frozenset({"/livez", "/readyz", "/metrics"})
SECURITY_EVENTS: Final = "/api/v1/security-events"  # authenticated by the token in the body


class RateLimited(DomainError):
    """Too many requests. Retry after the number of seconds in Retry-After."""

    status, code = 429, "rate_limited"

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.decision = decision
        self.headers = {"Retry-After": str(decision.seconds)}


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


async def count_user(scope: Scope, principal: Principal) -> None:
    """Count the request of a principal, before its first database query. Raises RateLimited."""
    limits: RateLimits | None = scope["state"]["rate_limits"]
    if limits is not None:
        request_state(scope).rate_limit = decision = await limits.count("user", principal.subject)
        if decision.exceeded:
            raise limits.reject(decision)


class RateLimiting:
    """ASGI middleware around the routes: checks the quota of the address before any signature is verified.

    A request with valid credentials counts for its user, any other request for its address. Users behind one address
    therefore do not share a quota, while forged tokens are limited. An address over its quota is rejected, except for
    requests with a recently verified token: a neighbour's flood does not lock users out. These requests count for the
    user, even if no route authorizes them. On routes that do not read credentials, every request counts for its
    address.

    Security events have quotas of their own (`EventQuotas`), which are counted by their route.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (path := route_path(scope)) in EXEMPT:
            await self.app(scope, receive, send)
            return
        process, state = scope["state"], request_state(scope)
        is_event = path == SECURITY_EVENTS and scope["method"] == "POST"
        limits: RateLimits | None = None if is_event else process["rate_limits"]
        address = client_network(scope)
        user: Principal | None = None  # of a request from an address over its quota

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                decision = state.rate_limit
                # A failed authentication counts for the address. Server errors are not the client's fault.
                if decision is None and limits is not None and message["status"] < 500:
                    counted: tuple[Subject, str] = ("user", user.subject) if user else ("address", address)
                    decision = state.rate_limit = await limits.count(*counted)
                if decision is not None:
                    message["headers"] = [*message.get("headers", ()), *decision.fields()]
            await send(message)

        if limits is None:
            await self.app(scope, receive, send_with_limits if is_event else send)
            return
        has_credentials = reads_credentials(path) and _has_credentials(scope)
        decision = limits.would_exceed("address", address)
        if decision and has_credentials and (user := _cached_principal(process["bearer"].verifier, scope)):
            decision = limits.would_exceed("user", user.subject)
        elif decision is None and not has_credentials:
            decision = state.rate_limit = await limits.count("address", address)
        if decision and decision.exceeded:
            state.rate_limit = decision
            response = await domain_error(Request(scope), limits.reject(decision))
            await response(scope, receive, send_with_limits)
            return
        await self.app(scope, receive, send_with_limits)


def reads_credentials(path: str) -> bool:
    """Whether the route of a path reads credentials."""
    return path.startswith("/api/") and path != SECURITY_EVENTS


def _has_credentials(scope: Scope) -> bool:
    return any(name == b"authorization" for name, _ in scope["headers"])


def _cached_principal(verifier: TokenVerifier, scope: Scope) -> Principal | None:
    try:
        return verifier.cached_principal(read_token(Request(scope)))
    except AuthError:
        return None
