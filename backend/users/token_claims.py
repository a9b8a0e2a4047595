"""The profile in a token's claims, and how recent it is."""

import math
from datetime import datetime
from typing import Any

from backend.auth import Principal

# Better Auth may store a picture as a data URL. URLs are kept, embedded pictures are not.
_LONGEST_IMAGE = 2048


def profile_of(principal: Principal) -> dict[str, Any]:
    """The profile columns for which the token has claims. OAuth access tokens, for example, may lack a name."""
    claims: dict[str, Any] = dict(principal.profile)
    if len(claims.get("image") or "") > _LONGEST_IMAGE:
        claims["image"] = None
    if principal.roles is not None:
        claims["roles"] = list(principal.roles)
    if "isAnonymous" in principal.claims:
        claims["is_anonymous"] = principal.is_anonymous
    return claims


def claims_at(principal: Principal) -> float:
    """The time at which the token was issued, in unix seconds.

    `iat` has whole seconds only, and two tokens of one second may have different claims (a role set in between).
    `minted_at`, or else the user's `updatedAt` within that second, gives the milliseconds.
    """
    minted = _minted_at(principal)
    return max(principal.issued_at, _updated_at(principal) or 0) if minted is None else minted


def data_at(principal: Principal) -> float:
    """The time up to which the token's data are known to be current, in unix seconds; never after `claims_at`.

    `minted_at` is the time at which Better Auth read its storage. Without it, the data may come from a session cookie
    (`session.cookieCache`) older than the token, so only the user's `updatedAt` is certain. The fallback is `iat`.
    """
    minted, updated = _minted_at(principal), _updated_at(principal)
    if minted is not None:
        return minted
    return principal.issued_at if updated is None else updated


def _minted_at(principal: Principal) -> float | None:
    """The claim, which is in milliseconds, in unix seconds. None if not an integer, or later than `iat` allows."""
    minted = principal.claims.get("minted_at")
    if type(minted) is not int or not 0 <= minted < (principal.issued_at + 1) * 1000:
        return None
    return minted / 1000


def _updated_at(principal: Principal) -> float | None:
    """The claim, in unix seconds. None if not ISO 8601 with an offset, or later than `iat` allows."""
    updated = principal.claims.get("updatedAt")
    try:
        moment = datetime.fromisoformat(updated) if isinstance(updated, str) else None
        changed = moment.timestamp() if moment is not None and moment.tzinfo else math.inf
    except (ValueError, OverflowError):
        return None
    return changed if 0 <= changed < principal.issued_at + 1 else None
