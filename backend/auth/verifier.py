"""Verifies tokens, with cheap checks before cryptography, and caches the results until the tokens expire."""

import time
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from typing import Any, Final, NamedTuple, TypeGuard

from cachetools import LRUCache

from .encoding import decode_object
from .errors import InvalidToken, KeysUnavailable, Reason
from .jwk import Key
from .jws import JWS, MAX_TOKEN, parse_jws
from .key_source import KeySource
from .observer import Observer
from .principal import Principal, is_storable, without_unstorable

CACHE_ENTRIES: Final = 4096
CACHE_SECONDS: Final = 300.0
MAX_SUBJECT: Final = 255
# A token counts as one cache entry for each started 4 KiB, plus one for every 16 objects and arrays, so that neither
# large claims nor many empty objects can exhaust the memory.
ENTRY_SIZE: Final = 4096
ENTRY_CONTAINERS: Final = 16

_ACCESS_TOKEN: Final = frozenset({"at+jwt", "application/at+jwt"})
_TYPES: Final = frozenset({None, "jwt"}) | _ACCESS_TOKEN
_LATEST: Final = 2.0**53  # seconds; beyond it a float does not hold every integer


class _Verified(NamedTuple):
    principal: Principal
    key: Key
    not_before: float  # by the wall clock, as expires_at
    expires_at: float
    until: float  # by the monotonic clock
    size: int


class TokenVerifier:
    """Verifies Better Auth's tokens: `/token` JWTs and OAuth access tokens (RFC 7519, 8725, 9068).

    `issuers` are the names of one Better Auth server, `audiences` those of this API: `iss` must be one of the former,
    `aud` must contain one of the latter. `clock` returns seconds since 1970, `monotonic` seconds of a monotonic clock.
    `max_lifetime` is the maximum of `exp - iat` and `leeway` the tolerated clock difference, both in seconds.
    `token_url` is where clients exchange a session token; errors name it (default: the longest issuer plus `/token`).
    """

    def __init__(
        self,
        *,
        keys: KeySource,
        issuers: Collection[str],
        audiences: Collection[str],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        max_lifetime: float = 3600,
        leeway: float = 5,
        token_url: str | None = None,
        observer: Observer | None = None,
    ) -> None:
        for name, values in (("issuers", issuers), ("audiences", audiences)):
            # A lone string is a collection of its characters: `aud: "h"` would then pass for "http://...".
            if isinstance(values, str) or not values or not all(values):
                raise ValueError(f"{name} must be a collection of non-empty strings")
        self.keys: Final = keys
        self.clock: Final = clock
        self._issuers = frozenset(issuers)
        self._audiences = frozenset(audiences)
        self._monotonic = monotonic
        self._max_lifetime = max_lifetime
        self._leeway = leeway
        self._token_url = token_url or f"{max(issuers, key=len).rstrip('/')}/token"
        self._observer = observer or Observer()
        self._cache: LRUCache[bytes, _Verified] = LRUCache(CACHE_ENTRIES, getsizeof=lambda verified: verified.size)

    def seconds_left(self, principal: Principal) -> float:
        """Return the seconds until the principal's token is no longer accepted."""
        return principal.expires_at + self._leeway - self.clock()

    async def verify(self, token: str) -> Principal:
        """Verify a token. Raises InvalidToken or KeysUnavailable, nothing else."""
        try:
            # Check the length first, to avoid hashing a megabyte.
            digest = sha256(token.encode("ascii")).digest() if len(token) <= MAX_TOKEN else b""
        except (AttributeError, TypeError, UnicodeEncodeError):
            self._observer.judged(Reason.MALFORMED.name.lower())
            raise InvalidToken(Reason.MALFORMED) from None
        if (verified := self._cached(digest)) is not None:
            self._observer.judged("hit")
            return verified.principal
        try:
            verified = await self._verify(token)
        except InvalidToken as error:
            self._observer.judged(error.reason.name.lower())
            if error.reason is Reason.OPAQUE_SESSION:
                raise InvalidToken(error.reason, error.reason.replace("<issuer>/token", self._token_url)) from None
            raise
        except KeysUnavailable:
            self._observer.judged("keys_unavailable")
            raise
        self._cache[digest] = verified
        self._observer.judged("verified")
        return verified.principal

    def cached_principal(self, token: str) -> Principal | None:
        """The principal of a token that was verified before, so that `verify` needs no cryptography. Never raises."""
        if len(token) > MAX_TOKEN or not token.isascii():
            return None
        verified = self._cached(sha256(token.encode()).digest())
        return verified and verified.principal

    def _cached(self, digest: bytes) -> _Verified | None:
        try:
            verified = self._cache[digest]  # `get` would make two lookups
        except KeyError:
            return None
        if (
            # The wall clock may have been set forward or back since the verification.
            verified.not_before - self._leeway <= self.clock() < verified.expires_at + self._leeway
            and self._monotonic() < verified.until
            and ((key := self.keys.current(verified.key.kid)) is verified.key or key == verified.key)
        ):
            return verified
        return None

    async def _verify(self, token: str) -> _Verified:
        jws = parse_jws(token)
        if jws.typ not in _TYPES:
            raise InvalidToken(Reason.BAD_TYPE)
        claims = _read_claims(jws.payload)
        now, started = self.clock(), self._monotonic()
        issued_at, not_before, expires_at = self._check_times(claims, now)
        self._check_names(claims)
        is_access_token = jws.typ in _ACCESS_TOKEN
        if is_access_token and not (_is_text(claims.get("client_id")) and _is_text(claims.get("jti"))):
            raise InvalidToken(Reason.INCOMPLETE)
        key = await verify_signature(jws, self.keys)
        if not self.clock() - self._leeway < expires_at:
            raise InvalidToken(Reason.EXPIRED)  # while waiting for the key
        return _Verified(
            key=key,
            principal=Principal.from_claims(_without_unstorable(claims, jws.payload), is_access_token=is_access_token),
            not_before=max(issued_at, not_before),
            expires_at=expires_at,
            until=started + min(expires_at + self._leeway - now, CACHE_SECONDS),
            size=1 + len(token) // ENTRY_SIZE + (jws.payload.count(b"{") + jws.payload.count(b"[")) // ENTRY_CONTAINERS,
        )

    def _check_times(self, claims: Mapping[str, Any], now: float) -> tuple[float, float, float]:
        expires_at, issued_at = _number(claims.get("exp")), _number(claims.get("iat"))
        not_before = _number(claims["nbf"]) if "nbf" in claims else issued_at
        if not now - self._leeway < expires_at:
            raise InvalidToken(Reason.EXPIRED)
        if max(issued_at, not_before) > now + self._leeway:
            raise InvalidToken(Reason.NOT_YET_VALID)
        if issued_at > expires_at:
            raise InvalidToken(Reason.BAD_TIMES)
        if expires_at - issued_at > self._max_lifetime:
            raise InvalidToken(Reason.LIVES_TOO_LONG)
        return issued_at, not_before, expires_at

    def _check_names(self, claims: Mapping[str, Any]) -> None:
        if not isinstance(issuer := claims.get("iss"), str) or issuer not in self._issuers:
            raise InvalidToken(Reason.BAD_ISSUER)
        audience = claims.get("aud")
        audiences = [audience] if isinstance(audience, str) else audience
        if (
            not isinstance(audiences, list)
            or not all(isinstance(name, str) for name in audiences)
            or self._audiences.isdisjoint(audiences)
        ):
            raise InvalidToken(Reason.BAD_AUDIENCE)
        subject = claims.get("sub")
        if not _is_text(subject) or len(subject) > MAX_SUBJECT:
            raise InvalidToken(Reason.BAD_SUBJECT)
        if "cnf" in claims:
            raise InvalidToken(Reason.SENDER_CONSTRAINED)


async def verify_signature(jws: JWS, keys: KeySource) -> Key:
    """Verify a JWS of any type with the key that it names; returns the key. Raises InvalidToken or KeysUnavailable.

    May fetch the key set, so check first whether the JWS could be accepted at all.
    """
    key = await keys.get(jws.kid)
    if jws.is_signed_by(key):
        return key
    # A recreated database may assign an old kid to another key.
    replacement = await keys.replacement(key)
    if replacement is not None and jws.is_signed_by(replacement):
        return replacement
    raise InvalidToken(Reason.BAD_SIGNATURE)


def _read_claims(payload: bytes) -> dict[str, Any]:
    try:
        return decode_object(payload)
    except ValueError:
        raise InvalidToken(Reason.MALFORMED) from None


def _without_unstorable(claims: dict[str, Any], payload: bytes) -> dict[str, Any]:
    # Strict JSON and UTF-8 allow NUL and lone surrogates only as escapes.
    return without_unstorable(claims) if b"\\u" in payload else claims


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LATEST < value < _LATEST:
        raise InvalidToken(Reason.BAD_TIMES)
    return value


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip()) and is_storable(value)
