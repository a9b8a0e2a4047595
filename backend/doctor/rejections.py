"""Finds every reason for which the API's verifier rejects a token."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from backend.auth import InvalidToken, Key, KeySet, KeysUnavailable, Principal, Reason, TokenVerifier, decode_object
from backend.auth.encoding import decode_base64url
from backend.settings import Settings


class Rejections(NamedTuple):
    """The reasons in the verifier's order, and how the verification ended."""

    reasons: list[Reason]
    principal: Principal | None = None
    """The principal that the token would yield without these reasons; None if the last reason cannot be set aside."""
    keys_missing: bool = False
    """Whether there were no keys to verify the signature with."""


class _FetchedKeys:
    """A key source that holds the key set already fetched."""

    def __init__(self, keys: KeySet | None) -> None:
        self._keys = keys

    def current(self, kid: str) -> Key | None:
        return self._keys.keys.get(kid) if self._keys else None

    async def get(self, kid: str) -> Key:
        if self._keys is None:
            raise KeysUnavailable("no keys were fetched")
        if key := self.current(kid):
            return key
        raise InvalidToken(Reason.UNKNOWN_KEY)

    async def replacement(self, _: Key, /) -> Key | None:
        return None


async def find_rejections(
    token: str, settings: Settings, keys: KeySet | None, clock: Callable[[], float]
) -> Rejections:
    """Verify the token repeatedly, each time with options under which the last reason no longer applies."""
    claims = decode_part(token, 1)
    options: dict[str, Any] = {
        "issuers": settings.issuers,
        "audiences": settings.audiences,
        "max_lifetime": settings.token_max_lifetime,
        "clock": clock,
    }
    reasons: list[Reason] = []
    while True:
        try:
            principal = await TokenVerifier(keys=_FetchedKeys(keys), **options).verify(token)
        except KeysUnavailable:
            return Rejections(reasons, keys_missing=True)
        except InvalidToken as error:
            if error.reason in reasons:
                return Rejections(reasons)  # its times contradict each other
            reasons.append(error.reason)
            accepting = _accepting_options(error.reason, claims, options)
            if accepting is None:
                return Rejections(reasons)
            options |= accepting
        else:
            return Rejections(reasons, principal)


def _accepting_options(reason: Reason, claims: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The verifier's options under which this reason does not apply; None if there are none."""
    match reason:
        case Reason.EXPIRED if claims["exp"] >= claims["iat"]:
            return {"clock": lambda: claims["exp"]}
        case Reason.NOT_YET_VALID:
            return {"clock": lambda: max(claims["iat"], claims.get("nbf", claims["iat"]))}
        case Reason.LIVES_TOO_LONG:
            return {"max_lifetime": math.inf}
        case Reason.BAD_ISSUER if isinstance(claims.get("iss"), str) and claims["iss"]:
            return {"issuers": [*options["issuers"], claims["iss"]]}
        case Reason.BAD_AUDIENCE if named := audiences_in(claims):
            return {"audiences": [*options["audiences"], named[0]]}
    return None


def audiences_in(claims: Mapping[str, Any]) -> list[str]:
    """The usable audiences in `aud`, which is a string or a list (RFC 7519, 4.1.3)."""
    found = claims.get("aud")
    return [name for name in (found if isinstance(found, list) else [found]) if isinstance(name, str) and name]


def decode_part(token: str, index: int) -> dict[str, Any]:
    """The header (0) or the claims (1) of a JWT without verification; empty if unreadable."""
    try:
        return decode_object(decode_base64url(token.split(".")[index]))
    except (ValueError, IndexError):
        return {}
