"""Whether this process lives, and whether it can serve."""

import asyncio
from typing import Any, Literal

import psycopg
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from backend import __version__

router = APIRouter(tags=["service"])

_PATIENCE = 2.0  # seconds


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
    """Takes at most two seconds."""
    state = request.state
    if state.stopping.is_set():
        return _said({"process": "is being stopped"})
    database = asyncio.create_task(_database(state))
    # A probe that hangs is left to its own bounds: to cancel it would wait for the server once more.
    done, _ = await asyncio.wait({database}, timeout=_PATIENCE)
    checks = {
        "database": database.result() if done else "unreachable",
        "keys": "ok" if state.keys.ready else "no usable keys",
    }
    return _said(checks)


def _said(checks: dict[str, str]) -> JSONResponse:
    ready = all(check == "ok" for check in checks.values())
    return JSONResponse({"status": "ok" if ready else "unavailable", "checks": checks}, 200 if ready else 503)


async def _database(state: Any) -> str:
    try:
        async with state.pool.connection() as connection:
            cursor = await connection.execute("SELECT version_num FROM alembic_version")
            row = await cursor.fetchone()
    except psycopg.Error as error:
        return "not migrated" if isinstance(error, psycopg.errors.UndefinedTable) else "unreachable"
    return "ok" if row and _suits(row["version_num"], state.revision) else "at another revision than this version needs"


def _suits(found: str, needed: str) -> bool:
    """A newer one does: in a rolling upgrade the migration comes first, and must not take everybody out of service."""
    return found == needed or (found.isdecimal() and needed.isdecimal() and int(found) > int(needed))
