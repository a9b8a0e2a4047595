"""Quotas of security events, apart from the rate limits of requests: no load of requests can delay a ban."""

import time
from collections.abc import Callable, Iterable
from typing import Final

from backend.web.quotas import Counters, Decision, Quota, Subject, decide
from backend.web.rate_limits import RateLimited


class EventQuotas:
    """Counts security events against three quotas.

    - `FAILED`: rejected tokens per address. Tokens from an address over this quota are still verified, since the issuer
      may share the address with the sender of the rejected ones.
    - `VERIFIED`: valid tokens per type of event, so that sign-outs cannot use up the quota of bans.
    - `CHECKED`: verified signatures of all addresses over the quota `FAILED` together. It limits the processor time of
      a flood: 500 Ed25519 signatures take 60 ms.

    Each worker counts alone, regardless of `RATE_LIMIT` and `REDIS_URL`: neither a setting for requests nor an outage
    of Redis affects the delivery of bans.
    """

    FAILED: Final = Quota(60, 60)
    VERIFIED: Final = Quota(10_000, 60)
    CHECKED: Final = Quota(500, 1)

    def __init__(
        self, *, on_rejection: Callable[[Subject], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`on_rejection` is called for each event that is rejected with 429."""
        self._on_rejection = on_rejection
        self._failed = Counters(self.FAILED.window, clock=clock)
        self._verified = Counters(self.VERIFIED.window, clock=clock)
        self._checked = Counters(self.CHECKED.window, clock=clock)

    def is_used_up(self, address: str) -> bool:
        """Whether the address has used up its quota of rejected tokens."""
        return self._failed.get(address)[0] >= self.FAILED.amount

    def check(self) -> None:
        """Count a signature to be verified for an address over its quota. Raises RateLimited."""
        self._require(decide("address", self.CHECKED, *self._checked.hit("")))

    def verify(self, types: Iterable[str]) -> Decision:
        """Count a valid token with events of these types. Raises RateLimited."""
        count, seconds = max(self._verified.hit(type) for type in types)
        return self._require(decide("issuer", self.VERIFIED, count, seconds))

    def fail(self, address: str) -> Decision:
        """Count a rejected token."""
        return decide("address", self.FAILED, *self._failed.hit(address))

    def reject(self, decision: Decision) -> RateLimited:
        if self._on_rejection is not None:
            self._on_rejection(decision.subject)
        return RateLimited(decision)

    def _require(self, decision: Decision) -> Decision:
        if decision.exceeded:
            raise self.reject(decision)
        return decision
