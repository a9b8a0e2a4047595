"""Users and audit entries as administrators see them, and the filters of their lists."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from backend.resources.pagination import Page, PageQuery
from backend.resources.types import Storable
from backend.users.models import AuditSource, UserStatus
from backend.users.schemas import EXAMPLE_PROFILE

_USER: JsonDict = {
    **EXAMPLE_PROFILE,
    "status": "suspended",
    "status_at": "2026-11-23T11:00:00Z",
    "suspended_here": True,
    "banned": False,
    "tokens_valid_after": None,
    "updated_at": "2026-11-23T11:00:00Z",
}
_ENTRY: JsonDict = {
    "id": "019a9d85-3a40-7c11-8d5a-0f1e2d3c4b5a",
    "at": "2026-11-23T11:00:00Z",
    "source": "admin",
    "actor": "019a9d4e-0000-7d20-9f0e-6a1b2c3d4e5f",
    "action": "suspend",
    "subject": EXAMPLE_PROFILE["subject"],
    "user_id": EXAMPLE_PROFILE["id"],
    "details": {},
    "request_id": "0c8f1f3f3d6c4a37a0e8b4e2a1f7d9c5",
}


class UserRead(BaseModel):
    """A user's local account."""

    model_config = ConfigDict(json_schema_extra={"examples": [_USER]})

    id: UUID
    subject: str = Field(description="The user's id at Better Auth.")
    email: str | None = Field(description="From Better Auth. Not unique.")
    email_verified: bool = Field(description="Whether Better Auth has verified the address.")
    name: str | None = Field(description="From Better Auth.")
    image: str | None = Field(description="URL of a picture.")
    roles: list[str] = Field(description="From Better Auth's admin plugin.")
    is_anonymous: bool = Field(description="Signed in through Better Auth's anonymous plugin, without an account.")
    status: UserStatus = Field(description="Only `active` users can use this API.")
    status_at: datetime | None = Field(description="Time of the last change of `status`; null if it never changed.")
    suspended_here: bool = Field(description="Whether an administrator of this API has suspended the user.")
    banned: bool = Field(description="Whether Better Auth has banned the user. Only Better Auth can end a ban.")
    tokens_valid_after: datetime | None = Field(description="Tokens issued at or before this time are refused.")
    created_at: datetime
    updated_at: datetime


class UserPage(Page[UserRead]):
    """A page of users."""


class UserQuery(PageQuery):
    """Filters of the list of users; all of them must match."""

    status: UserStatus | None = Field(default=None, description="Only users with this status.", examples=["suspended"])
    q: Annotated[str, Storable] | None = Field(
        default=None,
        max_length=200,
        description="Only users whose email or name contains this text, ignoring case.",
        examples=["ada"],
    )


class AuditRead(BaseModel):
    """An entry of the audit log: one action on an account."""

    model_config = ConfigDict(json_schema_extra={"examples": [_ENTRY]})

    id: UUID
    at: datetime = Field(description="Time of the action.")
    source: AuditSource = Field(
        description="The origin: an administrator, the command line, a Better Auth event, or the user."
    )
    actor: UUID | None = Field(description="Local id of the administrator.")
    action: str = Field(description="The action.")
    subject: str = Field(description="The user's id at Better Auth.")
    user_id: UUID | None = Field(description="The user's local id at that time.")
    details: dict[str, Any] = Field(description="Details; the members depend on the action.")
    request_id: str | None = Field(description="`X-Request-ID` of the request.")


class AuditPage(Page[AuditRead]):
    """A page of audit entries."""


class AuditQuery(PageQuery):
    """Filters of the audit log."""

    user_id: UUID | None = Field(
        default=None,
        description="Only actions on this account (local id).",
        examples=[EXAMPLE_PROFILE["id"]],
    )
