"""Whether this process lives, and whether it can serve."""

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

PATIENCE: Final = 1.0  # seconds, as the next one
FRESH: Final = 1.0


class Service(BaseModel):
    """What answers here."""

    name: str = Field(description="Of the API")
    version: str = Field(description="Of the running server")
    docs: str = Field(description="Path of the interactive documentation")
    openapi: str = Field(description="Path of the OpenAPI document")


class Liveness(BaseModel):
    """Being asked, it answers."""

    status: Literal["ok"] = Field(description="There is no other")


@router.get("/", summary="Name and version")
async def get_service(request: Request) -> Service:
    """Of the API and of the server that answers; and where to read on."""
    return Service(name=request.app.title, version=__version__, docs="/docs", openapi="/openapi.json")


@router.get("/livez", summary="The process answers")
async def get_liveness() -> Liveness:
    """For a supervisor: it asks nobody else, so nothing but a hanging process fails it."""
    return Liveness(status="ok")


class Readiness(BaseModel):
    """Whether requests can be served."""

    status: Literal["ok", "unavailable"] = Field(description="`ok` if every check is")
    checks: dict[str, str] = Field(description="`ok`, or what is wrong, for each part", examples=[{"database": "ok"}])


@router.get(
    "/readyz",
    summary="Database, migrations and keys are there",
    response_model=Readiness,
    responses={503: {"description": "Something is missing: `checks` says what.", "model": Readiness}},
)
async def get_readiness(request: Request) -> JSONResponse:
    """Takes at most one second. What it says of the database is at most one second old."""
    state = request.state
    if state.stopping.is_set():
        return _said({"process": "is being stopped"})
    schema: SchemaCheck = state.schema
    checks = {
        "database": await schema.status(),
        "keys": "ok" if state.keys.ready else "no usable keys",
    }
    return _said(checks)


def _said(checks: dict[str, str]) -> JSONResponse:
    ready = all(check == "ok" for check in checks.values())
    return JSONResponse({"status": "ok" if ready else "unavailable", "checks": checks}, 200 if ready else 503)


class _Answer(NamedTuple):
    status: str
    at: float  # by the loop's clock


class SchemaCheck:
    """Asks the database for its revision, on a connection of its own: users who load the pool do not fail the check.

    `/readyz` is public and has no rate limit, so requests that come at once share one question, and the answer is kept
    for one second.
    """

    def __init__(self, probe: Probe, revision: str) -> None:
        """`revision`: the one that this version needs."""
        self._probe = probe
        self._revision = revision
        self._last = _Answer("unreachable", -inf)
        self._question: asyncio.Task[str] | None = None

    async def status(self) -> str:
        """`ok`, or what is wrong."""
        loop = asyncio.get_running_loop()
        if self._last.at + FRESH > loop.time():
            return self._last.status
        if self._question is None:
            self._question = loop.create_task(self._ask(), name="readiness")
        question = self._question
        # A question that is not answered in time is left to its own limits, and the next request waits for it, too.
        done, _ = await asyncio.wait({question}, timeout=PATIENCE)
        return question.result() if done else "unreachable"

    async def _ask(self) -> str:
        try:
            rows = await self._probe.rows("SELECT version_num FROM alembic_version")
        except psycopg.errors.UndefinedTable:
            status = "not migrated"
        except psycopg.Error:
            status = "unreachable"
        else:
            suits = bool(rows) and _suits(rows[0]["version_num"], self._revision)
            status = "ok" if suits else "at another revision than this version needs"
        finally:
            self._question = None
        self._last = _Answer(status, asyncio.get_running_loop().time())
        return status


@asynccontextmanager
async def checking(pool: Pool, revision: str) -> AsyncIterator[SchemaCheck]:
    """`revision`: the one that this version needs."""
    probe = pool.probe(PATIENCE)
    try:
        yield SchemaCheck(probe, revision)
    finally:
        await probe.close()


def _suits(found: str, needed: str) -> bool:
    """A newer one does: in a rolling upgrade the migration comes first, and must not take everybody out of service."""
    return found == needed or (found.isdecimal() and needed.isdecimal() and int(found) > int(needed))
