"""The way good tutorials do it: an AsyncSession per request, ORM objects through response models, PyJWT.

It is given what they often leave out: indexes that lead with the owner, and caches for the verified claims and the
user.
"""

import asyncio
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID, uuid4

import jwt
from cachetools import TTLCache
from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from sqlalchemy import DateTime, Text, tuple_
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession


class Priority(StrEnum):
    low = "low"
    normal = "normal"
    high = "high"
    urgent = "urgent"


class Table(SQLModel, registry=registry()):
    """Tables of this module alone: the same ones as this API's, in a catalogue of their own."""


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
    tags: list[str] = []  # none of the tasks has any, and this peer does not even look
    is_overdue: bool
    completed_at: datetime | None
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None
    version: int


class Page(BaseModel):
    items: list[TaskRead]
    next_cursor: str | None


async def open_session(request: Request) -> AsyncIterator[AsyncSession]:
    async with request.state.sessions() as session:
        yield session


Session = Annotated[AsyncSession, Depends(open_session)]
Credentials = Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]


async def get_claims(request: Request, credentials: Credentials) -> dict[str, Any]:
    state, token = request.state, credentials.credentials
    if claims := state.claims.get(token):
        return claims  # type: ignore[no-any-return]  # the lifespan's state is untyped
    try:
        key = await asyncio.to_thread(state.keys.get_signing_key_from_jwt, token)
        claims = jwt.decode(token, key, ["EdDSA"], issuer=state.issuer, audience=state.audience)
    except jwt.PyJWTError as error:
        raise HTTPException(401, "Invalid token", {"WWW-Authenticate": "Bearer"}) from error
    state.claims[token] = claims
    return claims


async def get_user(request: Request, session: Session, claims: Annotated[dict[str, Any], Depends(get_claims)]) -> User:
    subject = claims["sub"]
    user: User | None = request.state.users.get(subject)
    if user is None:
        known = select(User).where(User.issuer == claims["iss"], User.subject == subject)
        user = (await session.exec(known)).first()
        if user is None:
            user = User(issuer=claims["iss"], subject=subject, email=claims["email"], name=claims["name"])
            session.add(user)
            await session.commit()
        request.state.users[subject] = user
    return user


CurrentUser = Annotated[User, Depends(get_user)]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    url = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://", 1)
    engine = create_async_engine(url, pool_size=10, max_overflow=0)
    yield {
        "sessions": async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False),
        "keys": jwt.PyJWKClient(os.environ["BETTER_AUTH_JWKS_URL"]),
        "issuer": os.environ["BETTER_AUTH_URL"],
        "audience": os.environ["PUBLIC_URL"],
        "claims": TTLCache[str, dict[str, Any]](4096, 300),
        "users": TTLCache[str, User](10_000, 60),
    }
    await engine.dispose()


def create_app() -> FastAPI:
    app = FastAPI(lifespan=lifespan)

    @app.get("/api/v1/tasks", response_model=Page)
    async def list_tasks(
        session: Session,
        user: CurrentUser,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        cursor: str | None = None,
    ) -> dict[str, Any]:
        query = select(Task).where(Task.owner_id == user.id, col(Task.deleted_at).is_(None))
        if cursor:
            created_at, id = urlsafe_b64decode(cursor).decode().split()
            here = tuple_(col(Task.created_at), col(Task.id))
            query = query.where(here < (datetime.fromisoformat(created_at), UUID(id)))
        query = query.order_by(col(Task.created_at).desc(), col(Task.id).desc()).limit(limit + 1)
        tasks = (await session.exec(query)).all()
        last = tasks[limit - 1] if len(tasks) > limit else None
        next_cursor = urlsafe_b64encode(f"{last.created_at.isoformat()} {last.id}".encode()).decode() if last else None
        return {"items": tasks[:limit], "next_cursor": next_cursor}

    @app.get("/api/v1/tasks/{id}", response_model=TaskRead)
    async def get_task(session: Session, user: CurrentUser, id: UUID) -> Task:
        query = select(Task).where(Task.id == id, Task.owner_id == user.id, col(Task.deleted_at).is_(None))
        task = (await session.exec(query)).first()
        if task is None:
            raise HTTPException(404, "Task not found")
        return task

    @app.post("/api/v1/tasks", response_model=TaskRead, status_code=201)
    async def create_task(session: Session, user: CurrentUser, data: TaskWrite) -> Task:
        completed_at = now() if data.status == "done" else None
        task = Task(**data.model_dump(), owner_id=user.id, completed_at=completed_at)
        session.add(task)
        await session.commit()
        await session.refresh(task)
        return task

    return app
