"""Maps a verified token to the local user: provisions the row, updates it from claims, and caches it for a minute."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID
from weakref import ref

from cachetools import FIFOCache

from backend.auth import Principal
from backend.database import SYSTEM, Actor, Database, Pool, Row
from backend.users.models import UserStatus
from backend.users.system_statements import FIND, PROFILE, upsert_claims
from backend.users.token_claims import claims_at, data_at, profile_of
from backend.web.problems import DomainError

_ATTEMPTS = 3
_MAX_STALENESS = 0.75  # seconds since the cache was last known to be complete


class Suspended(DomainError):
    """The account is suspended."""

    status, code = 403, "account_suspended"


class Purged(DomainError):
    """The account and its data were deleted."""

    status, code = 403, "account_purged"


class Contended(DomainError):
    """The account is being changed by other requests. Try again."""

    status, code = 503, "database_busy"


@dataclass(frozen=True, slots=True)
class KnownUser:
    """The part of a user row that every request needs."""

    id: UUID
    status: UserStatus
    roles: tuple[str, ...]
    tokens_valid_after: float
    claims_at: float
    profile: Mapping[str, Any]
    actor: Actor

    @classmethod
    def of(cls, row: Row) -> "KnownUser":
        floor, claims_at = row["tokens_valid_after"], row["claims_at"]
        return cls(
            id=row["id"],
            status=UserStatus(row["status"]),
            roles=tuple(row["roles"]),
            tokens_valid_after=math.floor(floor.timestamp()) if floor else -math.inf,
            claims_at=claims_at.timestamp() if claims_at else -math.inf,
            profile={name: row[name] for name in PROFILE},
            actor=Actor.user(row["id"]),
        )

    def outdated(self, claims: Mapping[str, Any], principal: Principal) -> Mapping[str, Any]:
        """The claims to write to the row: all, all but the roles, or none.

        None if they equal the row or the row was written from a newer token. No roles if the token's data are older
        than the row's. The other claims need no newer data: an event that sets a role is slightly later than the
        `updatedAt` of its change, and contains no profile.
        """
        if data_at(principal) < self.claims_at:
            claims = {name: value for name, value in claims.items() if name != "roles"}
        differ = any(self.profile[name] != value for name, value in claims.items())
        return claims if differ and claims_at(principal) >= self.claims_at else {}


@dataclass(slots=True)
class _Cached:
    """A user, and the last principal whose claims were compared with the row."""

    user: KnownUser
    principal: ref[Principal]  # dies with the cached token
    until: float  # monotonic clock


class Users:
    """The cache of users by subject, one per process.

    `Listener` calls `invalidate` for each changed row, and `confirm` with the time up to which it has received all
    changes. From 750 ms after that time on, every request reads the row from the database.

    `issuer`: the first of the issuer's names, stored in all rows whichever name a token has.
    `ttl`: lifetime of an entry, in seconds. `monotonic`: a clock in seconds.
    """

    def __init__(
        self,
        pool: Pool,
        issuer: str,
        *,
        size: int = 10_000,
        ttl: float = 60.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = Database(pool, SYSTEM)
        self._issuer = issuer
        self._cached: FIFOCache[str, _Cached] = FIFOCache(size)
        self._ttl = ttl
        self._monotonic = monotonic
        self._confirmed_at = -math.inf
        self._invalidations = 0
        self.loads = 0

    async def resolve(self, principal: Principal) -> KnownUser:
        """Return the caller's user. A cached user with unchanged claims needs no statement.

        Raises Purged, Suspended, Contended or psycopg.Error.
        """
        now = self._monotonic()
        cached: _Cached | None
        try:
            cached = self._cached[principal.subject]  # `get` would look twice
        except KeyError:
            cached = None
        if cached is not None and (cached.until <= now or now - self._confirmed_at > _MAX_STALENESS):
            cached = None
        user = cached.user if cached and cached.principal() is principal else await self._find(cached, principal)
        if user.status is UserStatus.purged:
            raise Purged
        if user.status is not UserStatus.active:
            raise Suspended
        return user

    async def _find(self, cached: _Cached | None, principal: Principal) -> KnownUser:
        claims = profile_of(principal)
        if cached is not None and not cached.user.outdated(claims, principal):
            cached.principal = ref(principal)
            return cached.user
        invalidations = self._invalidations
        self.loads += 1
        user = await self._load(principal, claims)
        if invalidations == self._invalidations:
            # Otherwise the row may have been read before the change that invalidated it.
            self._cached[principal.subject] = _Cached(user, ref(principal), self._monotonic() + self._ttl)
        return user

    def __len__(self) -> int:
        """The number of cached users."""
        return len(self._cached)

    @property
    def is_current(self) -> bool:
        """Whether cached users are used at the moment."""
        return self._monotonic() - self._confirmed_at <= _MAX_STALENESS

    def confirm(self, at: float) -> None:
        """All changes committed before `at` (monotonic clock) have been received."""
        self._confirmed_at = at

    def invalidate(self, subject: str) -> None:
        """Remove the user, whose row has changed."""
        self._invalidations += 1
        self._cached.pop(subject, None)

    def invalidate_all(self) -> None:
        """Remove all users, because changes may have been missed."""
        self._invalidations += 1
        self._cached.clear()

    async def _load(self, principal: Principal, claims: Mapping[str, Any]) -> KnownUser:
        key = {"issuer": self._issuer, "subject": principal.subject}
        # A token with scopes has no roles and must not set `claims_at`: a `/token` JWT with older data has to set them.
        data = datetime.fromtimestamp(data_at(principal), UTC) if claims and principal.scopes is None else None
        said = datetime.fromtimestamp(claims_at(principal), UTC)
        for _ in range(_ATTEMPTS):
            row = await self._database.row(FIND, **key)
            changes = claims if row is None else KnownUser.of(row).outdated(claims, principal)
            if row is None or changes:
                times = {"claims_at": data, "said_at": data if "roles" in changes else said}
                row = await self._database.row(upsert_claims(frozenset(changes)), **key, **changes, **times)
            if row is not None:
                return KnownUser.of(row)
            # A concurrent request inserted the row, or an erasure deleted it: read it again.
        raise Contended
