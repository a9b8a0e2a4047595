"""The table of security event tokens that have been applied."""

from datetime import datetime

from sqlalchemy import DateTime, Index, Text, func
from sqlmodel import Field, SQLModel


class ReceivedEvent(SQLModel, table=True):
    """A security event token that has been applied. Its `jti` is kept to ignore repeated deliveries."""

    __tablename__ = "security_events"
    __table_args__ = (Index("security_events_by_age", "received_at"),)

    issuer: str = Field(sa_type=Text, primary_key=True)
    jti: str = Field(sa_type=Text, primary_key=True)
    received_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})
