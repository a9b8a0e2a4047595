"""A good tutorial: an AsyncSession per request, ORM objects through response models, PyJWT.

It has what tutorials often omit: indexes that begin with the owner, and caches of verified claims and users.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any
from uuid import UUID

import jwt
from cachetools import TTLCache
from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlmodel.ext.asyncio.session import AsyncSession

from benchmarks.peers.tables import Page, Task, TaskRead, TaskWrite, User, known, new, newest, one, page


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
        user = (await session.exec(known(claims["iss"], subject))).first()
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
        return page((await session.exec(newest(user.id, limit, cursor))).all(), limit)

    @app.get("/api/v1/tasks/{id}", response_model=TaskRead)
    async def get_task(session: Session, user: CurrentUser, id: UUID) -> Task:
        task = (await session.exec(one(user.id, id))).first()
        if task is None:
            raise HTTPException(404, "Task not found")
        return task

    @app.post("/api/v1/tasks", response_model=TaskRead, status_code=201)
    async def create_task(session: Session, user: CurrentUser, data: TaskWrite) -> Task:
        task = new(user.id, data)
        session.add(task)
        await session.commit()
        await session.refresh(task)
        return task

    return app
