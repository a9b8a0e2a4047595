"""The local row of a person whom Better Auth knows."""

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import ARRAY, CheckConstraint, DateTime, Text, UniqueConstraint, func, text
from sqlmodel import Field, SQLModel


class UserStatus(StrEnum):
    active = "active"
    suspended = "suspended"
    purged = "purged"


class User(SQLModel, table=True):
    """One row a person: unique on the issuer's first name and the subject. Email is data, never identity."""

    __tablename__ = "users"
    __table_args__ = (
        UniqueConstraint("issuer", "subject"),
        CheckConstraint("char_length(subject) between 1 and 255", name="users_subject_length"),
        CheckConstraint("status in ('active', 'suspended', 'purged')", name="users_status"),
    )

    id: UUID = Field(primary_key=True, sa_column_kwargs={"server_default": text("uuidv7()")})
    issuer: str = Field(sa_type=Text)
    subject: str = Field(sa_type=Text)

    # Better Auth's, kept in step with the claims. `claims_at` is the time that the claims last written speak of.
    email: str | None = Field(default=None, sa_type=Text)
    email_verified: bool = Field(sa_column_kwargs={"server_default": text("false")})
    name: str | None = Field(default=None, sa_type=Text)
    image: str | None = Field(default=None, sa_type=Text)
    roles: list[str] = Field(sa_type=ARRAY(Text), sa_column_kwargs={"server_default": text("'{}'")})
    is_anonymous: bool = Field(sa_column_kwargs={"server_default": text("false")})
    claims_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))

    # This API's own.
    status: UserStatus = Field(sa_type=Text, sa_column_kwargs={"server_default": "active"})
    tokens_valid_after: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    time_zone: str | None = Field(default=None, sa_type=Text)
    locale: str | None = Field(default=None, sa_type=Text)
    created_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})
    updated_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})
