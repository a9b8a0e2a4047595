"""Caches a key set and, for a few seconds, which keys a fetch has shown to be absent or unchanged."""

import logging
import string
from enum import Enum, auto
from math import inf
from typing import Final

from cachetools import FIFOCache

from .encoding import decode_jwks
from .errors import UnusableKeys
from .jwk import KeySet

logger = logging.getLogger(__name__)

RECHECK_AFTER: Final = 5.0  # seconds for which a fetch proves that a key is absent or unchanged
# Better Auth uses database ids as kids. An unknown kid with other characters is an attack, not a rotation.
_KID_CHARACTERS: Final = frozenset(string.ascii_letters + string.digits + "._~+=:@-")


class CacheState(Enum):
    """Whether tokens can be verified with the cached set."""

    EMPTY = auto()
    USABLE = auto()
    STALE = auto()


class KeyCache:
    """The last good key set of an issuer; stale after `max_stale` seconds. Times are monotonic seconds."""

    def __init__(self, max_stale: float) -> None:
        self.set: KeySet | None = None
        self.fetched_at = 0.0  # start of the last successful fetch
        self._max_stale = max_stale
        self._body = b""
        self._absent: FIFOCache[str, float] = FIFOCache(1024)  # kid -> start of the fetch that did not return it
        self._unchanged: dict[str, float] = {}  # kid -> start of the fetch that returned the same key again

    def usable(self, now: float) -> KeySet | None:
        """Return the set unless it is stale."""
        return self.set if now - self.fetched_at <= self._max_stale else None

    def state(self, now: float) -> CacheState:
        if self.set is None:
            return CacheState.EMPTY
        return CacheState.STALE if self.usable(now) is None else CacheState.USABLE

    def store(self, body: bytes, started: float) -> None:
        """Store the body of a fetch that began at `started`. Raises UnusableKeys and then keeps the old set."""
        if self.set is None or body != self._body:
            try:
                document = decode_jwks(body)
            except ValueError:
                raise UnusableKeys("not JSON") from None
            self._replace(KeySet.from_jwks(document), body)
        self.fetched_at = started

    def is_fetchable(self, kid: str) -> bool:
        """Whether all characters of an unknown kid are usual ones or occur in the issuer's other kids."""
        return set(kid) <= _KID_CHARACTERS.union(*(self.set.keys if self.set else ()))

    def is_recent(self, at: float) -> bool:
        """Whether the last successful fetch began after `at` or at most RECHECK_AFTER before."""
        return at - self.fetched_at <= RECHECK_AFTER

    def is_absent(self, kid: str, at: float) -> bool:
        """Whether a recent fetch did not return the kid."""
        return at - self._absent.get(kid, -inf) <= RECHECK_AFTER

    def is_unchanged(self, kid: str, at: float) -> bool:
        """Whether a recent fetch returned the same key for the kid as before."""
        return at - self._unchanged.get(kid, -inf) <= RECHECK_AFTER

    def mark_absent(self, kid: str) -> None:
        self._absent[kid] = self.fetched_at

    def mark_unchanged(self, kid: str) -> None:
        self._unchanged[kid] = self.fetched_at

    def _replace(self, new: KeySet, body: bytes) -> None:
        if self.set is None or new.keys != self.set.keys:
            self._absent.clear()
            self._unchanged.clear()
            logger.info("JWKS changed, key ids: %s", ", ".join(new.keys))
        for key in new.skipped if self.set is None or new.skipped != self.set.skipped else ():
            logger.warning("JWKS key ignored: kid %s: %s", key.kid, key.reason)
        self.set, self._body = new, body
