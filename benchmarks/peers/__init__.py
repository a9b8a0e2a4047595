"""The servers of the comparison: for each the command that runs it, and its workloads.

A peer's environment has the names of this API's settings: DATABASE_URL, BETTER_AUTH_URL (the tokens' issuer),
BETTER_AUTH_JWKS_URL and PUBLIC_URL (their audience).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from backend.dev.issuer import IssuerError, find_node
from benchmarks.errors import BenchmarkError

FASTIFY = Path(__file__).with_name("fastify")

ALL = frozenset({"list", "one", "create", "refused"})


@dataclass(frozen=True)
class Peer:
    """One server of the comparison.

    command: its command line for a port of 127.0.0.1, beginning with the program's full path. Raises BenchmarkError
        if something is not installed.
    workloads: the names of the workloads that it supports.
    """

    name: str
    title: str
    command: Callable[[int], list[str]]
    workloads: frozenset[str] = ALL


def uvicorn(module: str) -> Callable[[int], list[str]]:
    """One uvicorn worker with the same fast options as this API's `serve`."""

    def command(port: int) -> list[str]:
        fast = ["--loop=uvloop", "--http=httptools", "--no-access-log", "--no-proxy-headers", "--no-server-header"]
        application = f"benchmarks.peers.{module}:create_app"
        return [sys.executable, "-m", "uvicorn", "--factory", application, f"--port={port}", *fast]

    return command


def fastify(mode: str) -> Callable[[int], list[str]]:
    """One Node.js process."""

    def command(port: int) -> list[str]:
        if not (FASTIFY / "node_modules" / "fastify").is_dir():
            raise BenchmarkError("Fastify is not installed: run `python3 bootstrap.py bench`, which installs it")
        try:
            return [find_node(), str(FASTIFY / "server.mjs"), str(port), mode]
        except IssuerError as error:
            raise BenchmarkError(f"Fastify needs Node.js: {error}") from error

    return command


def serve(port: int, *, workers: int = 1) -> list[str]:
    """This API as in production."""
    return [sys.executable, "-m", "backend.cli", "serve", f"--port={port}", f"--workers={workers}"]


OURS = Peer("ours", "this API, everything on", serve)
PEERS = (
    Peer(
        "bare_uvicorn",
        "bare uvicorn: fixed bytes of the same length",
        uvicorn("bare_uvicorn"),
        frozenset({"list", "one", "refused"}),
    ),
    Peer(
        "bare_fastapi",
        "bare FastAPI: 20 fixed objects through a response model, no token, no database",
        uvicorn("bare_fastapi"),
        frozenset({"list"}),
    ),
    Peer(
        "fastify_cached",
        "Fastify, jose, pg: prepared statements, schemas both ways, verified tokens and user cached",
        fastify("cached"),
    ),
    Peer("fastify_verifying", "the same, which verifies the token of each request", fastify("verifying")),
    Peer(
        "async_session",
        "async SQLModel session per request, ORM objects through response models, PyJWT, claims and user cached",
        uvicorn("async_session"),
    ),
    Peer(
        "tutorial",
        "sync SQLModel session per request, sync routes, PyJWT for each request, its user loaded each time",
        uvicorn("tutorial"),
    ),
)
