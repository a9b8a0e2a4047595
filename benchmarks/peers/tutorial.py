"""A typical tutorial: a Session per request in a dependency, sync routes, the user loaded for each request, PyJWT.

It has two things that tutorials often omit but applications soon add: indexes that begin with the owner, and one
PyJWKClient for all requests, which caches the keys.
"""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any
from uuid import UUID

import jwt
from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlmodel import Session, create_engine

from benchmarks.peers.tables import Page, Task, TaskRead, TaskWrite, User, known, new, newest, one, page


def open_session(request: Request) -> Iterator[Session]:
    with Session(request.state.engine) as session:
        yield session


OpenSession = Annotated[Session, Depends(open_session)]
Credentials = Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]


def get_user(request: Request, session: OpenSession, credentials: Credentials) -> User:
    state, token = request.state, credentials.credentials
    try:
        key = state.keys.get_signing_key_from_jwt(token)
        claims = jwt.decode(token, key, ["EdDSA"], issuer=state.issuer, audience=state.audience)
    except jwt.PyJWTError as error:
        raise HTTPException(401, "Invalid token", {"WWW-Authenticate": "Bearer"}) from error
    user = session.exec(known(claims["iss"], claims["sub"])).first()
    if user is None:
        user = User(issuer=claims["iss"], subject=claims["sub"], email=claims["email"], name=claims["name"])
        session.add(user)
        session.commit()
    return user


CurrentUser = Annotated[User, Depends(get_user)]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    engine = create_engine(os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://", 1))
    yield {
        "engine": engine,
        "keys": jwt.PyJWKClient(os.environ["BETTER_AUTH_JWKS_URL"]),
        "issuer": os.environ["BETTER_AUTH_URL"],
        "audience": os.environ["PUBLIC_URL"],
    }
    engine.dispose()


def create_app() -> FastAPI:
    app = FastAPI(lifespan=lifespan)

    @app.get("/api/v1/tasks", response_model=Page)
    def list_tasks(
        session: OpenSession,
        user: CurrentUser,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        cursor: str | None = None,
    ) -> dict[str, Any]:
        return page(session.exec(newest(user.id, limit, cursor)).all(), limit)

    @app.get("/api/v1/tasks/{id}", response_model=TaskRead)
    def get_task(session: OpenSession, user: CurrentUser, id: UUID) -> Task:
        task = session.exec(one(user.id, id)).first()
        if task is None:
            raise HTTPException(404, "Task not found")
        return task

    @app.post("/api/v1/tasks", response_model=TaskRead, status_code=201)
    def create_task(session: OpenSession, user: CurrentUser, data: TaskWrite) -> Task:
        task = new(user.id, data)
        session.add(task)
        session.commit()
        session.refresh(task)
        return task

    return app
