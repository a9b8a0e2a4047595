"""Defines the principal of a verified token and reads it from the claims of Better Auth and its plugins."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Self

ProfileValue = str | bool | None

# Larger numbers are milliseconds, as in JavaScript: as seconds they would be after the year 5138.
_MILLISECONDS: Final = 1e11
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")
# Claims whose absence grants something: one that cannot be stored is not left out, but replaced by a value that no
# reader accepts, so that the token is banned, narrow or without roles.
_NEVER_LEFT_OUT: Final = frozenset({"banned", "key", "role"})
_LAST_SECOND: Final = 253402300799.0  # of the year 9999


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Principal:
    """The subject of a verified token. It is immutable because it is shared between requests."""

    subject: str
    issuer: str = field(repr=False)
    issued_at: float = field(repr=False)
    """Seconds since 1970, as `expires_at`."""
    expires_at: float = field(repr=False)
    scopes: frozenset[str] | None = field(default=None, repr=False)
    """What an OAuth access token (`at+jwt`) or the token of an API key (a `/token` JWT with the claim `key`) was
    granted; None for any other `/token` JWT, which has all rights of the user."""
    client_id: str | None = field(default=None, repr=False)
    session_id: str | None = field(default=None, repr=False)
    profile: Mapping[str, ProfileValue] = field(default_factory=_nothing, repr=False, hash=False)
    """The claims `email`, `email_verified`, `name` and `image`. A null claim is None; a claim that the token does not
    contain is missing here, so that an access token, which contains none, does not erase a known name."""
    roles: tuple[str, ...] | None = field(default=None, repr=False)
    """From the admin plugin's `role`; empty when it is null, empty or cannot be read. None when the token has no such
    claim or has `scopes`: an access token or an API key names no roles."""
    is_anonymous: bool = field(default=False, repr=False)
    impersonated_by: str | None = field(default=None, repr=False)
    banned: bool = field(default=False, repr=False)
    """The claim as issued, even if the ban has ended: use `is_banned`."""
    ban_expires_at: float | None = field(default=None, repr=False)
    """Seconds since 1970; None if the ban is permanent or its end cannot be parsed."""
    claims: Mapping[str, Any] = field(default_factory=_nothing, repr=False, hash=False)
    """All verified claims, read-only: objects as mappings, arrays as tuples. A claim in which some text holds a NUL or
    a lone surrogate is left out; `banned`, `key` and `role` are then True."""

    @classmethod
    def from_claims(cls, claims: Mapping[str, Any], *, is_access_token: bool) -> Self:
        """Create a principal from verified claims: sub, iss, iat and exp must be present and of the right type."""
        is_narrow = is_access_token or "key" in claims
        return cls(
            subject=claims["sub"],
            issuer=claims["iss"],
            issued_at=float(claims["iat"]),
            expires_at=float(claims["exp"]),
            scopes=frozenset((_text(claims.get("scope")) or "").split()) if is_narrow else None,
            client_id=_text(claims.get("client_id")),
            session_id=_text(claims.get("sid")),
            profile=_profile(claims),
            roles=None if is_narrow else read_roles(claims),
            is_anonymous=claims.get("isAnonymous") is True,
            impersonated_by=_text(claims.get("impersonatedBy")),
            banned=bool(claims.get("banned")),
            ban_expires_at=_moment(claims.get("banExpires")),
            claims=MappingProxyType({name: _frozen(value) for name, value in claims.items()}),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickle and copy, which cannot handle read-only mappings, by reading the claims again."""
        read = partial(type(self).from_claims, is_access_token=self.scopes is not None)
        return read, (_thawed(self.claims),)

    @property
    def is_machine(self) -> bool:
        """Whether this is an OAuth client that acts for itself (client_credentials), not a person."""
        return self.subject == self.client_id

    @property
    def email(self) -> str | None:
        """Not an identifier: it may be unverified, and several subjects may share it."""
        return self._profile_text("email")

    @property
    def email_verified(self) -> bool:
        return self.profile.get("email_verified") is True

    @property
    def name(self) -> str | None:
        return self._profile_text("name")

    @property
    def image(self) -> str | None:
        return self._profile_text("image")

    def is_banned(self, at: float) -> bool:
        """Whether the ban holds at a time, in seconds since 1970."""
        return self.banned and (self.ban_expires_at is None or self.ban_expires_at > at)

    def _profile_text(self, name: str) -> str | None:
        value = self.profile.get(name)
        return value if isinstance(value, str) else None


def is_storable(text: str) -> bool:
    """Whether a text can be stored and sent on: no NUL (PostgreSQL), no lone surrogate (UTF-8)."""
    return _UNSTORABLE.search(text) is None


def without_unstorable(claims: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out each claim that holds an unstorable text, at any depth; `banned`, `key` and `role` become True."""
    return {
        name: value if storable else True
        for name, value in claims.items()
        if is_storable(name) and ((storable := _is_storable_value(value)) or name in _NEVER_LEFT_OUT)
    }


def _is_storable_value(value: Any) -> bool:
    if isinstance(value, str):
        return is_storable(value)
    if isinstance(value, dict):
        return all(is_storable(name) and _is_storable_value(inner) for name, inner in value.items())
    return not isinstance(value, list) or all(map(_is_storable_value, value))


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({name: _frozen(inner) for name, inner in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _thawed(inner) for name, inner in value.items()}
    return list(map(_thawed, value)) if isinstance(value, tuple) else value


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _profile(claims: Mapping[str, Any]) -> Mapping[str, ProfileValue]:
    found: dict[str, ProfileValue] = {}
    for name in ("email", "name", "image"):
        if name in claims and (claims[name] is None or isinstance(claims[name], str)):
            found[name] = claims[name]
    if isinstance(verified := claims.get("emailVerified"), bool):
        found["email_verified"] = verified
    return MappingProxyType(found)


def read_roles(claims: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The roles that `role` names, or None when there is no such claim. One that cannot be read names none."""
    return (parse_role(claims["role"]) or ()) if "role" in claims else None


def parse_role(role: object) -> tuple[str, ...] | None:
    """The roles of a string with commas (the admin plugin's form), an array of strings, or null; None for others."""
    if role is None:
        return ()
    names = role.split(",") if isinstance(role, str) else role
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(stripped for name in names if (stripped := name.strip()))


def _moment(value: Any) -> float | None:
    """Read a time as Better Auth writes it: ISO 8601 with an offset, or a number; None when it is neither."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return None
        return moment.timestamp() if moment.tzinfo else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    seconds = value / 1000 if _MILLISECONDS < value < 1000 * _LAST_SECOND else value
    return float(seconds) if abs(seconds) <= _LAST_SECOND else None
