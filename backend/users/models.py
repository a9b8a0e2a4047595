"""The tables of users, erased accounts, received security events and the audit log."""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, CheckConstraint, DateTime, Index, Text, UniqueConstraint, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel


class UserStatus(StrEnum):
    active = "active"
    suspended = "suspended"
    purged = "purged"


class User(SQLModel, table=True):
    """One row per user, identified by the issuer's first name and the subject, never by email."""

    __tablename__ = "users"
    __table_args__ = (
        UniqueConstraint("issuer", "subject"),
        Index("users_by_creation", "created_at", "id"),
        CheckConstraint("char_length(subject) between 1 and 255", name="users_subject_length"),
        CheckConstraint("status in ('active', 'suspended', 'purged')", name="users_status"),
    )

    id: UUID = Field(primary_key=True, sa_column_kwargs={"server_default": text("uuidv7()")})
    issuer: str = Field(sa_type=Text)
    subject: str = Field(sa_type=Text)

    # Better Auth's, updated from claims. `claims_at` is the time of the data that were last written.
    email: str | None = Field(default=None, sa_type=Text)
    email_verified: bool = Field(sa_column_kwargs={"server_default": text("false")})
    name: str | None = Field(default=None, sa_type=Text)
    image: str | None = Field(default=None, sa_type=Text)
    roles: list[str] = Field(sa_type=ARRAY(Text), sa_column_kwargs={"server_default": text("'{}'")})
    is_anonymous: bool = Field(sa_column_kwargs={"server_default": text("false")})
    claims_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))

    # Better Auth's, set by its events. `banned_at` is the time of the last event, which older ones do not overwrite.
    banned: bool = Field(sa_column_kwargs={"server_default": text("false")})
    banned_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))

    # This API's own. A trigger derives `status`: a user is active if neither `suspended_here` nor `banned` is true.
    suspended_here: bool = Field(sa_column_kwargs={"server_default": text("false")})
    status: UserStatus = Field(sa_type=Text, sa_column_kwargs={"server_default": "active"})
    status_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    tokens_valid_after: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    time_zone: str | None = Field(default=None, sa_type=Text)
    locale: str | None = Field(default=None, sa_type=Text)
    created_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})
    updated_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})


class Erasure(SQLModel, table=True):
    """The times and roles of an erased account, kept for 30 days. A trigger copies them to a new row of the user.

    Otherwise a token or an event from before the erasure could restore a role, or become valid again.
    """

    __tablename__ = "erasures"
    __table_args__ = (Index("erasures_by_age", "erased_at"),)

    issuer: str = Field(sa_type=Text, primary_key=True)
    subject: str = Field(sa_type=Text, primary_key=True)
    roles: list[str] = Field(sa_type=ARRAY(Text))
    claims_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    tokens_valid_after: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    status_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    banned_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    erased_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})


class ReceivedEvent(SQLModel, table=True):
    """A security event token that has been applied. Its `jti` is kept to ignore repeated deliveries."""

    __tablename__ = "security_events"
    __table_args__ = (Index("security_events_by_age", "received_at"),)

    issuer: str = Field(sa_type=Text, primary_key=True)
    jti: str = Field(sa_type=Text, primary_key=True)
    received_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})


class AuditSource(StrEnum):
    """The origin of an action: an administrator, the command line, a Better Auth event, or the user."""

    admin = "admin"
    cli = "cli"
    event = "event"
    self = "self"


class AuditEntry(SQLModel, table=True):
    """An action on an account. Never updated, and without a foreign key to `users`, so that it outlives the account."""

    __tablename__ = "audit_log"
    __table_args__ = (
        CheckConstraint("source in ('admin', 'cli', 'event', 'self')", name="audit_log_source"),
        Index("audit_log_by_time", "at", "id"),
        Index("audit_log_by_user", "user_id", "at", "id"),
    )

    id: UUID = Field(primary_key=True, sa_column_kwargs={"server_default": text("uuidv7()")})
    at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.clock_timestamp()})
    actor: UUID | None = None
    source: AuditSource = Field(sa_type=Text)
    action: str = Field(sa_type=Text)
    subject: str = Field(sa_type=Text)
    user_id: UUID | None = None
    details: dict[str, Any] = Field(sa_type=JSONB, sa_column_kwargs={"server_default": text("'{}'")})
    request_id: str | None = Field(default=None, sa_type=Text)
