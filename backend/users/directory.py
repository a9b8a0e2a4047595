"""From a judged token to the local user row: made at first sight, kept in step, remembered for a minute."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from uuid import UUID
from weakref import ref

from cachetools import FIFOCache
from sqlalchemy import and_, bindparam, func, or_, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col, select

from backend.auth import Principal
from backend.database import SYSTEM, Actor, Database, Pool, Row, Statement, parameters
from backend.problems import DomainError
from backend.users.models import User, UserStatus

# Better Auth keeps a picture as a data URL if it is given one. An address is kept, a picture is not.
_LONGEST_IMAGE = 2048
_ATTEMPTS = 3
_TRUSTED = 0.75  # seconds that what is remembered is used after it was last known to be true

PROFILE = ("email", "email_verified", "name", "image", "roles", "is_anonymous")
KNOWN = [col(getattr(User, name)) for name in ("id", "status", "banned", "tokens_valid_after", "claims_at", *PROFILE)]
THIS = (col(User.issuer) == bindparam("issuer"), col(User.subject) == bindparam("subject"))
FIND = Statement(select(*KNOWN).where(*THIS))


class Suspended(DomainError):
    """This account is suspended here."""

    status, code = 403, "account_suspended"


class Purged(DomainError):
    """This account was deleted, and its data with it."""

    status, code = 403, "account_purged"


class Contended(DomainError):
    """This account is being changed by many at once; try again."""

    status, code = 503, "database_busy"


@lru_cache(64)
def ensure(fields: frozenset[str]) -> Statement:
    """Insert the row, or bring it in step with newer claims; no row comes back when there was nothing to do.

    Safe against any number of first requests at once: the unique key decides, and the losers find the winner's row.
    """
    statement = insert(User).values(parameters(("issuer", "subject", "claims_at", *fields)))
    if not fields:
        return Statement(statement.on_conflict_do_nothing().returning(*KNOWN))
    new = statement.excluded
    differs = tuple_(*(col(getattr(User, name)) for name in sorted(fields))).is_distinct_from(
        tuple_(*(new[name] for name in sorted(fields)))
    )
    newer = or_(col(User.claims_at).is_(None), col(User.claims_at) <= new.claims_at)
    changes = {name: new[name] for name in (*fields, "claims_at")} | {"updated_at": func.now()}
    statement = statement.on_conflict_do_update(
        index_elements=[col(User.issuer), col(User.subject)], set_=changes, where=and_(newer, differs)
    )
    return Statement(statement.returning(*KNOWN))


@dataclass(frozen=True, slots=True)
class KnownUser:
    """What each request needs of the row, without a statement."""

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

    def is_behind(self, claims: Mapping[str, Any], principal: Principal) -> bool:
        """Whether the token says something else than the row, and is not older than what the row was written from."""
        profile = self.profile
        return any(profile[name] != value for name, value in claims.items()) and claims_at(principal) >= self.claims_at


@dataclass(slots=True)
class _Remembered:
    """A user, and the principal last seen, of whom the row says what the token said; it lives with the token."""

    user: KnownUser
    principal: ref[Principal]
    until: float  # by the monotonic clock


class Users:
    """The people who call, by the subject of their token. One for the process; each is asked after once a minute.

    What it remembers it uses only while somebody (`Listener`) tells it of changes: `forget` for each, and `believe` for
    the moment up to which there was none other. 750 ms after that moment every request looks at the row itself.

    `issuer`: the first of the issuer's names, under which all rows are filed, whichever name a token bears.
    `monotonic`: seconds, of a clock that nobody sets.
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
        self._known: FIFOCache[str, _Remembered] = FIFOCache(size)
        self._ttl = ttl
        self._monotonic = monotonic
        self._believed = -math.inf
        self._forgotten = 0
        self.loads = 0

    async def resolve(self, principal: Principal) -> KnownUser:
        """The caller's row. A caller who is known and whose claims are as before costs no statement."""
        now = self._monotonic()
        known: _Remembered | None
        try:
            known = self._known[principal.subject]  # `get` would look twice
        except KeyError:
            known = None
        if known is not None and (known.until <= now or now - self._believed > _TRUSTED):
            known = None
        if known is None or known.principal() is not principal:
            user = await self._find(known, principal)
        else:
            user = known.user
        if user.status is UserStatus.purged:
            raise Purged
        if user.status is not UserStatus.active:
            raise Suspended
        return user

    async def _find(self, known: _Remembered | None, principal: Principal) -> KnownUser:
        claims = profile_of(principal)
        if known is not None and not known.user.is_behind(claims, principal):
            known.principal = ref(principal)
            return known.user
        forgotten = self._forgotten
        self.loads += 1
        user = await self._load(principal, claims)
        if forgotten == self._forgotten:
            # Else the row may have been read before the change that was told of meanwhile.
            self._known[principal.subject] = _Remembered(user, ref(principal), self._monotonic() + self._ttl)
        return user

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._known)

    @property
    def believed(self) -> bool:
        """Whether what is remembered is used now."""
        return self._monotonic() - self._believed <= _TRUSTED

    def believe(self, at: float) -> None:
        """Every change committed before `at`, by the monotonic clock, has been told of."""
        self._believed = at

    def forget(self, subject: str) -> None:
        """This person's row was changed."""
        self._forgotten += 1
        self._known.pop(subject, None)

    def forget_everybody(self) -> None:
        """Any row may have been changed."""
        self._forgotten += 1
        self._known.clear()

    async def _load(self, principal: Principal, claims: Mapping[str, Any]) -> KnownUser:
        key = {"issuer": self._issuer, "subject": principal.subject}
        since = datetime.fromtimestamp(claims_at(principal), UTC) if claims else None
        for _ in range(_ATTEMPTS):
            row = await self._database.row(FIND, **key)
            if row is None or KnownUser.of(row).is_behind(claims, principal):
                row = await self._database.row(ensure(frozenset(claims)), **key, **claims, claims_at=since)
            if row is not None:
                return KnownUser.of(row)
            # Another request made the row first, or an erasure took it away: look again.
        raise Contended


def profile_of(principal: Principal) -> dict[str, Any]:
    """The claims that the row keeps, those only that the token has: an OAuth access token says nothing of a name."""
    claims: dict[str, Any] = dict(principal.profile)
    if len(claims.get("image") or "") > _LONGEST_IMAGE:
        claims["image"] = None
    if principal.roles is not None:
        claims["roles"] = list(principal.roles)
    if "isAnonymous" in principal.claims:
        claims["is_anonymous"] = principal.is_anonymous
    return claims


def claims_at(principal: Principal) -> float:
    """The moment that the token's claims speak of, in unix seconds.

    `iat` counts whole seconds, and two tokens of one second may say different things (a role set in between). Where
    the claims hold the user's `updatedAt`, which has milliseconds, it decides within that second.
    """
    updated = principal.claims.get("updatedAt")
    if isinstance(updated, str):
        try:
            moment = datetime.fromisoformat(updated)
            changed = moment.timestamp() if moment.tzinfo else -math.inf
        except (ValueError, OverflowError):
            return principal.issued_at
        if principal.issued_at < changed < principal.issued_at + 1:
            return changed
    return principal.issued_at
