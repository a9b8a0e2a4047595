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
from sqlalchemy import DateTime, and_, bindparam, func, or_, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col, select

from backend.auth import Principal
from backend.database import SYSTEM, Actor, Database, Pool, Row, Statement, parameters
from backend.users.models import User, UserStatus
from backend.web.problems import DomainError

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

    `claims_at` is the time of the data, `said_at` the one that must not be before the row's `claims_at`.
    Safe against any number of first requests at once: the unique key decides, and the losers find the winner's row.
    """
    statement = insert(User).values(parameters(("issuer", "subject", "claims_at", *fields)))
    if not fields:
        return Statement(statement.on_conflict_do_nothing().returning(*KNOWN))
    new = statement.excluded
    differs = tuple_(*(col(getattr(User, name)) for name in sorted(fields))).is_distinct_from(
        tuple_(*(new[name] for name in sorted(fields)))
    )
    said_at = bindparam("said_at", type_=DateTime(timezone=True))
    newer = or_(col(User.claims_at).is_(None), col(User.claims_at) <= said_at)
    changes: dict[str, Any] = {name: new[name] for name in fields}
    changes |= {"claims_at": func.greatest(col(User.claims_at), new.claims_at), "updated_at": func.now()}
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

    def news(self, claims: Mapping[str, Any], principal: Principal) -> Mapping[str, Any]:
        """The claims to write: all, all but the roles, or none.

        None where the row says the same or was written from a newer token; no roles where the token's data are older
        than the row's. The other claims do not wait for newer data: an event that brings a role is a little later than
        the `updatedAt` of its change, and brings no profile.
        """
        if data_at(principal) < self.claims_at:
            claims = {name: value for name, value in claims.items() if name != "roles"}
        differ = any(self.profile[name] != value for name, value in claims.items())
        return claims if differ and claims_at(principal) >= self.claims_at else {}


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
        if known is not None and not known.user.news(claims, principal):
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
        # A token with scopes brings no roles. Were it a measure for them, a `/token` JWT whose data are older could not
        # bring them any more.
        data = datetime.fromtimestamp(data_at(principal), UTC) if claims and principal.scopes is None else None
        said = datetime.fromtimestamp(claims_at(principal), UTC)
        for _ in range(_ATTEMPTS):
            row = await self._database.row(FIND, **key)
            news = claims if row is None else KnownUser.of(row).news(claims, principal)
            if row is None or news:
                times = {"claims_at": data, "said_at": data if "roles" in news else said}
                row = await self._database.row(ensure(frozenset(news)), **key, **news, **times)
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
    """When the token was made, in unix seconds.

    `iat` counts whole seconds, and two tokens of one second may say different things (a role set in between). Where
    the claims have `minted_at`, or the user's `updatedAt` within that second, which have milliseconds, these decide.
    """
    minted, updated = _minted_at(principal), _updated_at(principal)
    if minted is not None:
        return minted
    return principal.issued_at if updated is None else max(principal.issued_at, updated)


def data_at(principal: Principal) -> float:
    """The moment up to which the token's data are known to be true, in unix seconds; never after `claims_at`.

    `minted_at` says that Better Auth's storage was read at that moment. Without it the data may come from a cookie that
    is older than the token (`session.cookieCache`), so that nothing is known but the user's `updatedAt`; and where
    that is missing, too, `iat` has to do.
    """
    minted, updated = _minted_at(principal), _updated_at(principal)
    if minted is not None:
        return minted
    return principal.issued_at if updated is None else updated


def _minted_at(principal: Principal) -> float | None:
    """The claim, in milliseconds since 1970; None when it is no integer, or later than `iat` allows."""
    minted = principal.claims.get("minted_at")
    if type(minted) is not int or not 0 <= minted < (principal.issued_at + 1) * 1000:
        return None
    return minted / 1000


def _updated_at(principal: Principal) -> float | None:
    """The claim, ISO 8601 with an offset; None when it is none, or later than `iat` allows."""
    updated = principal.claims.get("updatedAt")
    try:
        moment = datetime.fromisoformat(updated) if isinstance(updated, str) else None
        changed = moment.timestamp() if moment is not None and moment.tzinfo else math.inf
    except (ValueError, OverflowError):
        return None
    return changed if 0 <= changed < principal.issued_at + 1 else None
