"""Liveness and readiness checks, and the version of the service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from typing import Final, Literal, NamedTuple

import psycopg
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from backend import __version__
from backend.database import Pool, Probe

router = APIRouter(tags=["service"])

TIMEOUT: Final = 1.0  # seconds of a readiness check
MAX_AGE: Final = 1.0  # seconds that its result is cached


class Service(BaseModel):
    """The service and its version."""

    name: str = Field(description="Name of the API")
    version: str = Field(description="Version of the running server")
    docs: str = Field(description="Path of the interactive documentation")
    openapi: str = Field(description="Path of the OpenAPI document")


class Liveness(BaseModel):
    """The process is running."""

    status: Literal["ok"] = Field(description="Always `ok`")


@router.get("/", summary="Name and version")
async def get_service(request: Request) -> Service:
    """The name and version of the API, and the paths of its documentation."""
    root = request.scope.get("root_path", "").rstrip("/")
    return Service(name=request.app.title, version=__version__, docs=f"{root}/docs", openapi=f"{root}/openapi.json")


@router.get("/livez", summary="Liveness")
async def get_liveness() -> Liveness:
    """The process is running. Checks no other service, so only a blocked process fails."""
    return Liveness(status="ok")


class Readiness(BaseModel):
    """Whether requests can be served."""

    status: Literal["ok", "unavailable"] = Field(description="`ok` if all checks are `ok`")
    checks: dict[str, str] = Field(
        description="Result of each check: `ok` or the problem", examples=[{"database": "ok"}]
    )


@router.get(
    "/readyz",
    summary="Readiness",
    response_model=Readiness,
    responses={503: {"description": "Requests cannot be served; `checks` contains the reason.", "model": Readiness}},
)
async def get_readiness(request: Request) -> JSONResponse:
    """Whether the database, its schema and the issuer's keys are available. Takes at most one second.

    The result for the database is cached for one second.
    """
    state = request.state
    if state.stopping.is_set():
        return _response({"process": "shutting down"})
    schema: SchemaCheck = state.schema
    checks = {"database": await schema.status(), "keys": "ok" if state.keys.ready else "no usable keys"}
    return _response(checks)


def _response(checks: dict[str, str]) -> JSONResponse:
    is_ready = all(check == "ok" for check in checks.values())
    return JSONResponse({"status": "ok" if is_ready else "unavailable", "checks": checks}, 200 if is_ready else 503)


class _Result(NamedTuple):
    status: str
    at: float  # time of the event loop


class SchemaCheck:
    """Reads the revision of the database on a connection of its own, so that a busy pool does not fail the check.

    `/readyz` is public and has no rate limit, so concurrent requests share one query, and its result is cached.
    """

    def __init__(self, probe: Probe, revision: str) -> None:
        """`revision`: the schema revision that this version needs."""
        self._probe = probe
        self._revision = revision
        self._last = _Result("unreachable", -inf)
        self._query: asyncio.Task[str] | None = None

    async def status(self) -> str:
        """`ok` or the problem."""
        loop = asyncio.get_running_loop()
        if self._last.at + MAX_AGE > loop.time():
            return self._last.status
        if self._query is None:
            self._query = loop.create_task(self._run_query(), name="readiness")
        query = self._query
        # After the timeout the query continues until its own limits, and the next request waits for it, too.
        done, _ = await asyncio.wait({query}, timeout=TIMEOUT)
        return query.result() if done else "unreachable"

    async def _run_query(self) -> str:
        try:
            rows = await self._probe.rows("SELECT version_num FROM alembic_version")
        except psycopg.errors.UndefinedTable:
            status = "not migrated"
        except psycopg.Error:
            status = "unreachable"
        else:
            is_compatible = bool(rows) and _is_compatible(rows[0]["version_num"], self._revision)
            status = "ok" if is_compatible else "schema revision does not match this version"
        finally:
            self._query = None
        self._last = _Result(status, asyncio.get_running_loop().time())
        return status


@asynccontextmanager
async def checking(pool: Pool, revision: str) -> AsyncIterator[SchemaCheck]:
    """Open the schema check. `revision`: the schema revision that this version needs."""
    probe = pool.probe(TIMEOUT)
    try:
        yield SchemaCheck(probe, revision)
    finally:
        await probe.close()


def _is_compatible(found: str, needed: str) -> bool:
    """Newer revisions are compatible: a rolling upgrade migrates first, and old workers must stay ready meanwhile."""
    return found == needed or (found.isdecimal() and needed.isdecimal() and int(found) > int(needed))
