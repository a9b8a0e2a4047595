"""The tables, schemas and queries that both SQLModel peers share."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid4

from pydantic import BaseModel
from sqlalchemy import DateTime, Text, tuple_
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel, col, select
from sqlmodel.sql.expression import SelectOfScalar


class Priority(StrEnum):
    low = "low"
    normal = "normal"
    high = "high"
    urgent = "urgent"


class Table(SQLModel, registry=registry()):
    """Base of this module's tables: the same as this API's, but in a registry of their own."""


class User(Table, table=True):
    __tablename__ = "users"

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    issuer: str
    subject: str
    email: str | None = None
    name: str | None = None


class TaskWrite(SQLModel):
    title: str = Field(min_length=1, max_length=200)
    description: str | None = Field(default=None, max_length=10_000)
    status: str = "todo"
    priority: Priority = Priority.normal
    due_at: datetime | None = None


def now() -> datetime:
    return datetime.now(UTC)


def moment(**options: Any) -> Any:
    return Field(sa_type=DateTime(timezone=True), **options)


class Task(Table, table=True):
    __tablename__ = "tasks"

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    owner_id: UUID = Field(foreign_key="users.id", primary_key=True)
    title: str = Field(sa_type=Text)
    description: str | None = Field(default=None, sa_type=Text)
    status: str = Field(sa_type=Text)
    priority: Priority = Field(sa_type=Text)
    due_at: datetime | None = moment(default=None)
    completed_at: datetime | None = moment(default=None)
    created_at: datetime = moment(default_factory=now)
    updated_at: datetime = moment(default_factory=now)
    deleted_at: datetime | None = moment(default=None)
    version: int = 1

    @property
    def is_overdue(self) -> bool:
        return self.due_at is not None and self.due_at < now() and self.status != "done"


class TaskRead(SQLModel):
    id: UUID
    title: str
    description: str | None
    status: str
    priority: Priority
    due_at: datetime | None
    tags: list[str] = []  # the tasks have no tags, and these peers do not query them
    is_overdue: bool
    completed_at: datetime | None
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None
    version: int


class Page(BaseModel):
    items: list[TaskRead]
    next_cursor: str | None


def known(issuer: str, subject: str) -> SelectOfScalar[User]:
    return select(User).where(User.issuer == issuer, User.subject == subject)


def newest(owner: UUID, limit: int, cursor: str | None) -> SelectOfScalar[Task]:
    """One more than fit on the page, which tells whether there is another."""
    query = select(Task).where(Task.owner_id == owner, col(Task.deleted_at).is_(None))
    if cursor:
        created_at, id = urlsafe_b64decode(cursor).decode().split()
        here = tuple_(col(Task.created_at), col(Task.id))
        query = query.where(here < (datetime.fromisoformat(created_at), UUID(id)))
    return query.order_by(col(Task.created_at).desc(), col(Task.id).desc()).limit(limit + 1)


def page(tasks: Sequence[Task], limit: int) -> dict[str, Any]:
    last = tasks[limit - 1] if len(tasks) > limit else None
    next_cursor = urlsafe_b64encode(f"{last.created_at.isoformat()} {last.id}".encode()).decode() if last else None
    return {"items": tasks[:limit], "next_cursor": next_cursor}


def one(owner: UUID, id: UUID) -> SelectOfScalar[Task]:
    return select(Task).where(Task.id == id, Task.owner_id == owner, col(Task.deleted_at).is_(None))


def new(owner: UUID, data: TaskWrite) -> Task:
    return Task(**data.model_dump(), owner_id=owner, completed_at=now() if data.status == "done" else None)
