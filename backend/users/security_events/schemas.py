"""The claims of a security event token, the events in it, and the error response."""

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field

_LAST_SECOND: Final = 253402300799  # of the year 9999

Moment = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=_LAST_SECOND)]


class EventType(StrEnum):
    account_disabled = "https://schemas.openid.net/secevent/risc/event-type/account-disabled"
    account_enabled = "https://schemas.openid.net/secevent/risc/event-type/account-enabled"
    account_purged = "https://schemas.openid.net/secevent/risc/event-type/account-purged"
    session_revoked = "https://schemas.openid.net/secevent/caep/event-type/session-revoked"
    token_claims_change = "https://schemas.openid.net/secevent/caep/event-type/token-claims-change"  # noqa: S105
    account_merged = "urn:better-auth-resource-server:event-type:account-merged"


class Err(StrEnum):
    """Error codes of RFC 8935, section 2.4."""

    invalid_request = "invalid_request"
    invalid_key = "invalid_key"
    invalid_issuer = "invalid_issuer"
    invalid_audience = "invalid_audience"
    authentication_failed = "authentication_failed"
    access_denied = "access_denied"


class Rejection(BaseModel):
    """The reason why a security event token was rejected (RFC 8935, section 2.3)."""

    err: Err = Field(description="A stable error code for programs.")
    description: str = Field(description="An explanation for people; the text may change.")


class Subject(BaseModel):
    """RFC 9493, section 3.2.3."""

    format: Literal["iss_sub"]
    iss: str
    sub: Annotated[str, Field(min_length=1, max_length=255, pattern=r"\S")]


class Claims(BaseModel):
    """RFC 8417, section 2.2, with the subject of RFC 9493, section 4."""

    iss: str
    aud: str | list[str]
    iat: Moment
    jti: Annotated[str, Field(min_length=1, max_length=255)]
    sub_id: Subject
    toe: Moment | None = None
    exp: Moment | None = None
    nbf: Moment | None = None
    events: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


class ClaimsChange(BaseModel):
    """The members of a `token-claims-change` event."""

    class Changed(BaseModel):
        role: Any = None  # not validated: rejecting the event would leave the old roles in place

    claims: Changed


class Merge(BaseModel):
    """The members of an `account-merged` event."""

    into: Subject


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a token. `type` may be unknown to this API."""

    type: str
    roles: tuple[str, ...] | None = None
    into: str | None = None

    @property
    def action(self) -> str:
        """The name of the event in the audit log."""
        return re.split("[/:]", self.type)[-1] if self.type in set(EventType) else "unknown-event"

    @property
    def details(self) -> dict[str, Any]:
        """The details of the event in the audit log."""
        by_action: dict[str, dict[str, Any]] = {
            "token-claims-change": {"roles": self.roles},
            "account-merged": {"into": self.into},
            "unknown-event": {"event": self.type},
        }
        return by_action.get(self.action, {})


@dataclass(frozen=True, slots=True)
class SecurityEvent:
    """The content of a valid security event token."""

    id: str
    subject: str
    at: datetime
    events: tuple[Event, ...]
