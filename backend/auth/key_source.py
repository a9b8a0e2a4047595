"""Defines the key source of a verifier, its status, and a source with a fixed key set."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from .errors import InvalidToken, Reason
from .jwk import Key, KeySet, SkippedKey
from .observer import FetchReason


class KeySource(Protocol):
    """A source of public keys."""

    def current(self, kid: str) -> Key | None:
        """Return the cached key without waiting; None if there is none or the set is older than its maximum age."""

    async def get(self, kid: str) -> Key:
        """Return the key, fetching if necessary. Raises InvalidToken (no such key) or KeysUnavailable."""

    async def replacement(self, key: Key, /) -> Key | None:
        """Return the key that replaced `key` under the same kid, or None. Called when a signature does not match."""


class StaticKeys:
    """A fixed JWK set. Raises UnusableKeys when it contains no usable key."""

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
    """A snapshot of RemoteKeys for health checks and metrics."""

    ready: bool
    age: float | None  # seconds since the start of the last successful fetch; None before the first
    kids: tuple[str, ...]
    skipped: tuple[SkippedKey, ...]
    last_error: str | None  # of the last fetch; None if it returned a usable set
    fetches: Mapping[FetchReason, int]  # started
    failures: int  # of these fetches
    waiting: int  # requests that are waiting for a fetch
    unknown_kids: int  # requests whose kid was not in the cached set
