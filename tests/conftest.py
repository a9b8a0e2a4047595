"""Fixtures of all tests: a PostgreSQL database, a test issuer, and the application that uses both."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import httpx
import psycopg
import pytest
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.types import Receive, Scope, Send

from backend import migrations
from backend.app import create_app
from backend.auth.testing import LocalIssuer
from backend.settings import Settings
from backend.users.provisioning import Users
from benchmarks.issuer import serve_keys

pytest_plugins = [
    "tests.support.postgres",
    "tests.support.issuers",
    "tests.contract.packages",
    "tests.contract.serving",
    "tests.support.programs",
    "tests.support.results",
]

# Files that take longest. They start first, so that at the end no process runs one of them while the others are idle.
LONGEST = (
    "tests/docs/test_adding_a_resource.py",
    "tests/contract/test_web.py",
    "tests/database/test_autogenerate.py",
    "tests/docs/test_agents.py",
    "tests/contract/test_typescript.py",
    "tests/web/test_fast_dispatch.py",
    "tests/contract/test_mobile.py",
    "tests/docs/test_removing_tasks.py",
    "tests/faults/test_machines.py",
    "tests/dev/test_up.py",
)

ISSUER = "http://issuer.test"
BASE = f"{ISSUER}/api/auth"
AUDIENCE = "http://localhost:8000"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


def create_database(postgres: str, name: str) -> str:
    """Create an empty database on the server `postgres`, and return its URL."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    return postgres.replace("/postgres?", f"/{name}?", 1)


@pytest.fixture(scope="session")
def database_url(postgres: str) -> str:
    """A migrated database that all tests share: each test creates its own users, and every row has an owner."""
    url = create_database(postgres, f"api_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    return url


@pytest.fixture(scope="session")
def issuer() -> LocalIssuer:
    return LocalIssuer(ISSUER, audience=AUDIENCE)


@pytest.fixture(scope="session")
def jwks_url(issuer: LocalIssuer) -> Iterator[str]:
    with serve_keys(issuer) as url:
        yield url


@pytest.fixture(scope="session")
def settings(database_url: str, jwks_url: str) -> Settings:
    return Settings(
        _env_file=None,
        database_url=database_url,
        database_pool_size=12,
        better_auth_url=ISSUER,
        better_auth_jwks_url=jwks_url,
        cors_origins=("https://app.example.com",),
        rate_limit="off",  # the requests of all tests together would exceed it
    )


@dataclass
class Api:
    """The running application: the state of its lifespan, and a client that calls it in this process."""

    app: FastAPI
    state: Mapping[str, Any]
    http: httpx.AsyncClient
    issuer: LocalIssuer

    def person(self, **claims: Any) -> "Person":
        """A new user, with a token that contains `claims`."""
        return Person(self, claims.pop("sub", None) or uuid4().hex, claims)


@dataclass
class Person:
    """A user who calls the API with their own token."""

    api: Api
    subject: str
    claims: dict[str, Any]

    def token(self, **claims: Any) -> str:
        return self.api.issuer.token(sub=self.subject, **self.claims | claims)

    def __post_init__(self) -> None:
        self.bearer = {"Authorization": f"Bearer {self.token()}"}

    async def request(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, **options: Any
    ) -> httpx.Response:
        return await self.api.http.request(method, path, headers={**self.bearer, **(headers or {})}, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.request("GET", path, **options)

    async def post(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        return await self.request("POST", path, json=json, **options)

    async def put(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        return await self.request("PUT", path, json=json, **options)

    async def patch(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        return await self.request("PATCH", path, json=json, **options)

    async def delete(self, path: str, **options: Any) -> httpx.Response:
        return await self.request("DELETE", path, **options)

    async def task(self, title: str = "a task", **members: Any) -> dict[str, Any]:
        """Create a task and return it."""
        response = await self.post("/api/v1/tasks", {"title": title, **members})
        assert response.status_code == 201, response.text
        task: dict[str, Any] = response.json()
        return task


@asynccontextmanager
async def running(
    settings: Settings,
    issuer: LocalIssuer,
    telemetry: TelemetryConfig | None = None,
    change: Callable[[FastAPI], object] = lambda _: None,
) -> AsyncIterator[Api]:
    """The application with its lifespan, called without a server. `change` may edit it before it starts."""
    app = create_app(settings, telemetry=telemetry)
    change(app)
    async with app.router.lifespan_context(app) as state:
        assert state is not None

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = dict(state)
            await app(scope, receive, send)

        transport = httpx.ASGITransport(with_state)
        headers = {"Accept-Encoding": "identity"}  # httpx would ask for gzip
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000", headers=headers) as http:
            yield Api(app, state, http, issuer)


@pytest.fixture(scope="session")
async def api(settings: Settings, issuer: LocalIssuer) -> AsyncIterator[Api]:
    async with running(settings, issuer) as api:
        yield api


async def caught_up(users: Users) -> None:
    """Wait until the cache `users` has received the notification of every change that is committed now."""
    now, done, confirm = users._monotonic(), asyncio.Event(), users.confirm

    def confirm_and_compare(at: float) -> None:
        confirm(at)
        if at >= now:
            done.set()

    with patch.object(users, "confirm", confirm_and_compare):
        async with asyncio.timeout(20):
            await done.wait()
