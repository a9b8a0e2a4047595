"""The representation of the current user, and the fields that the user may change."""

import re
from datetime import datetime
from typing import Annotated
from uuid import UUID
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from backend.users.models import UserStatus

# IANA names start with a capital letter. `localtime`, `posix/...` and similar names are files, not zones.
_ZONE = re.compile(r"[A-Z][A-Za-z0-9_+-]{0,30}(/[A-Z][A-Za-z0-9_+-]{0,30}){0,2}")

# RFC 5646, section 2.1: language, extended language, script, region, variants, extensions, private use; or private use
# only. Grandfathered tags (i-klingon) are not accepted.
_LANGUAGE_TAG = (
    "^(([A-Za-z]{2,3}(-[A-Za-z]{3}){0,3}|[A-Za-z]{4,8})(-[A-Za-z]{4})?(-([A-Za-z]{2}|[0-9]{3}))?"
    "(-([A-Za-z0-9]{5,8}|[0-9][A-Za-z0-9]{3}))*(-[0-9A-WY-Za-wy-z](-[A-Za-z0-9]{2,8})+)*(-[Xx](-[A-Za-z0-9]{1,8})+)?"
    "|[Xx](-[A-Za-z0-9]{1,8})+)$"
)


def _time_zone(value: str) -> str:
    if _ZONE.fullmatch(value):
        try:
            return ZoneInfo(value).key
        except (ValueError, KeyError, OSError):
            pass
    raise ValueError("is not a time zone of the IANA database, such as Europe/Berlin")


def _locale(value: str) -> str:
    if not re.fullmatch(_LANGUAGE_TAG, value):
        raise ValueError("is not a language tag (BCP 47), such as de-CH")
    return value


_Locale = Annotated[str, AfterValidator(_locale), Field(max_length=100, json_schema_extra={"pattern": _LANGUAGE_TAG})]
EXAMPLE_PROFILE: JsonDict = {
    "id": "019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f",
    "subject": "Yq2CLmVq0VVmJYFBzLkS8jDbNQvlnVpM",
    "email": "ada@example.com",
    "email_verified": True,
    "name": "Ada Lovelace",
    "image": None,
    "roles": ["user"],
    "is_anonymous": False,
    "created_at": "2026-11-23T10:00:00Z",
}
_EXAMPLE: JsonDict = {
    **EXAMPLE_PROFILE,
    "scopes": None,
    "status": "active",
    "time_zone": "Europe/London",
    "locale": "en-GB",
    "issuer": "http://localhost:3000",
    "expires_at": "2026-11-23T10:15:00Z",
    "updated_at": "2026-11-23T10:00:00Z",
}


class Me(BaseModel):
    """The current user: the local account, and the claims of the token."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    id: UUID
    email: str | None = Field(description="From Better Auth. Not unique.")
    email_verified: bool = Field(description="Whether Better Auth has verified the address.")
    name: str | None = Field(description="From Better Auth.")
    image: str | None = Field(description="URL of a picture.")
    roles: list[str] = Field(description="From Better Auth's admin plugin.")
    scopes: list[str] | None = Field(
        description="Scopes of the OAuth access token or API key; null for a session token, which is not limited."
    )
    is_anonymous: bool = Field(description="Signed in through Better Auth's anonymous plugin, without an account.")
    status: UserStatus = Field(description="Always `active`: other accounts cannot use this API.")
    time_zone: str | None = Field(description="IANA time zone name.")
    locale: str | None = Field(description="BCP 47 language tag.")
    issuer: str = Field(description="`iss` of the token.")
    subject: str = Field(description="`sub` of the token: the user's id at Better Auth.")
    expires_at: datetime = Field(description="`exp` of the token.")
    created_at: datetime
    updated_at: datetime


class MeUpdate(BaseModel):
    """The settings that this API stores. All other members are changed at Better Auth."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"time_zone": "Europe/London", "locale": "en-GB"}]}
    )

    time_zone: Annotated[str, AfterValidator(_time_zone)] | None = Field(
        default=None, description="IANA time zone name."
    )
    locale: _Locale | None = Field(default=None, description="BCP 47 language tag.")
