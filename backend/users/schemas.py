"""What the API shows of a user, and lets them change."""

import re
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from backend.resources.pagination import Page, PageQuery
from backend.resources.types import Storable
from backend.users.models import AuditSource, UserStatus

# IANA names start with a capital; `localtime`, `posix/...` and the like are files of the machine, not zones.
_ZONE = re.compile(r"[A-Z][A-Za-z0-9_+-]{0,30}(/[A-Z][A-Za-z0-9_+-]{0,30}){0,2}")

# RFC 5646, section 2.1: language, extended language, script, region, variants, extensions, private use; or private use
# alone. The tags that the RFC keeps for history's sake alone (i-klingon) are not taken.
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


class Me(BaseModel):
    """The caller: the local row, and how the token was judged."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f",
                    "email": "ada@example.com",
                    "email_verified": True,
                    "name": "Ada Lovelace",
                    "image": None,
                    "roles": ["user"],
                    "scopes": None,
                    "is_anonymous": False,
                    "status": "active",
                    "time_zone": "Europe/London",
                    "locale": "en-GB",
                    "issuer": "http://localhost:3000",
                    "subject": "Yq2CLmVq0VVmJYFBzLkS8jDbNQvlnVpM",
                    "expires_at": "2026-11-23T10:15:00Z",
                    "created_at": "2026-11-23T10:00:00Z",
                    "updated_at": "2026-11-23T10:00:00Z",
                }
            ]
        }
    )

    id: UUID
    email: str | None = Field(description="As Better Auth knows it; two people may have the same.")
    email_verified: bool = Field(description="Whether Better Auth has seen that it is theirs.")
    name: str | None = Field(description="As Better Auth knows it.")
    image: str | None = Field(description="The address of a picture.")
    roles: list[str] = Field(description="Of Better Auth's admin plugin.")
    scopes: list[str] | None = Field(
        description="Of an OAuth access token or an API key. null: the person's own token, not limited."
    )
    is_anonymous: bool = Field(description="Signed in without an account, through Better Auth's anonymous plugin.")
    status: UserStatus = Field(description="Whether this API lets them in: who reads this is `active`.")
    time_zone: str | None = Field(description="IANA name")
    locale: str | None = Field(description="BCP 47")
    issuer: str = Field(description="`iss` of the token that was used")
    subject: str = Field(description="`sub` of the token that was used: the id at Better Auth")
    expires_at: datetime = Field(description="`exp` of the token that was used")
    created_at: datetime
    updated_at: datetime


class MeUpdate(BaseModel):
    """What belongs to this API. Everything else is Better Auth's, and changed there."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"time_zone": "Europe/London", "locale": "en-GB"}]}
    )

    time_zone: Annotated[str, AfterValidator(_time_zone)] | None = Field(default=None, description="IANA name")
    locale: (
        Annotated[str, AfterValidator(_locale), Field(max_length=100, json_schema_extra={"pattern": _LANGUAGE_TAG})]
        | None
    ) = Field(default=None, description="BCP 47")


_SUBJECT = "Yq2CLmVq0VVmJYFBzLkS8jDbNQvlnVpM"


class UserRead(BaseModel):
    """The local row of somebody, as administrators see it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f",
                    "subject": _SUBJECT,
                    "email": "ada@example.com",
                    "email_verified": True,
                    "name": "Ada Lovelace",
                    "image": None,
                    "roles": ["user"],
                    "is_anonymous": False,
                    "status": "suspended",
                    "status_at": "2026-11-23T11:00:00Z",
                    "suspended_here": True,
                    "banned": False,
                    "tokens_valid_after": None,
                    "created_at": "2026-11-23T10:00:00Z",
                    "updated_at": "2026-11-23T11:00:00Z",
                }
            ]
        }
    )

    id: UUID
    subject: str = Field(description="Their id at Better Auth.")
    email: str | None = Field(description="As Better Auth knows it; two people may have the same.")
    email_verified: bool = Field(description="Whether Better Auth has seen that it is theirs.")
    name: str | None = Field(description="As Better Auth knows it.")
    image: str | None = Field(description="The address of a picture.")
    roles: list[str] = Field(description="Of Better Auth's admin plugin.")
    is_anonymous: bool = Field(description="Signed in without an account, through Better Auth's anonymous plugin.")
    status: UserStatus = Field(description="Whether this API lets them in.")
    status_at: datetime | None = Field(description="Since when. null: it was never changed.")
    suspended_here: bool = Field(description="Whether an administrator of this API has suspended them.")
    banned: bool = Field(description="Whether Better Auth has banned them: the ban ends there, and not by reinstating.")
    tokens_valid_after: datetime | None = Field(description="Tokens issued up to then are refused.")
    created_at: datetime
    updated_at: datetime


class UserPage(Page[UserRead]):
    """People, as many as were asked for, unless these are the last."""


class UserQuery(PageQuery):
    """What the listing can be narrowed by. Each field that is set adds the condition of the same name."""

    status: UserStatus | None = Field(default=None, description="Only people of this status.", examples=["suspended"])
    q: Annotated[str, Storable] | None = Field(
        default=None,
        max_length=200,
        description="Only people whose email or name has this in it, whatever the case of the letters.",
        examples=["ada"],
    )


class AuditRead(BaseModel):
    """What was done to an account."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "019a9d85-3a40-7c11-8d5a-0f1e2d3c4b5a",
                    "at": "2026-11-23T11:00:00Z",
                    "source": "admin",
                    "actor": "019a9d4e-0000-7d20-9f0e-6a1b2c3d4e5f",
                    "action": "suspend",
                    "subject": _SUBJECT,
                    "user_id": "019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f",
                    "details": {},
                    "request_id": "0c8f1f3f3d6c4a37a0e8b4e2a1f7d9c5",
                }
            ]
        }
    )

    id: UUID
    at: datetime = Field(description="When it was done.")
    source: AuditSource = Field(
        description="An administrator here, the command line, an event of Better Auth, or the person."
    )
    actor: UUID | None = Field(description="The administrator.")
    action: str = Field(description="What was done.")
    subject: str = Field(description="Whose account, by their id at Better Auth.")
    user_id: UUID | None = Field(description="Whose account, by the id that it had here.")
    details: dict[str, Any] = Field(description="What else is known of it; the members vary with the action.")
    request_id: str | None = Field(description="`X-Request-ID` of the request that did it.")


class AuditPage(Page[AuditRead]):
    """Entries, as many as were asked for, unless these are the last."""


class AuditQuery(PageQuery):
    """What the log can be narrowed by."""

    user_id: UUID | None = Field(
        default=None,
        description="Only what was done to this account.",
        examples=["019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f"],
    )
