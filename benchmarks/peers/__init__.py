"""Who is compared: each peer is a command that serves HTTP, and the workloads that it has.

What a peer finds in its environment has the names of this API's own settings: DATABASE_URL, BETTER_AUTH_URL (the
tokens' issuer), BETTER_AUTH_JWKS_URL and PUBLIC_URL (their audience).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

ALL = frozenset({"list", "one", "create", "refused"})


@dataclass(frozen=True)
class Peer:
    """One server of the comparison.

    command: its command line for a port of 127.0.0.1; the program's full path comes first.
    workloads: the names of those that it answers.
    """

    name: str
    title: str
    command: Callable[[int], list[str]]
    workloads: frozenset[str] = ALL


def uvicorn(module: str) -> Callable[[int], list[str]]:
    """One worker with everything that makes uvicorn fast, as this API's own `serve` sets it."""

    def command(port: int) -> list[str]:
        fast = ["--loop=uvloop", "--http=httptools", "--no-access-log", "--no-proxy-headers", "--no-server-header"]
        application = f"benchmarks.peers.{module}:create_app"
        return [sys.executable, "-m", "uvicorn", "--factory", application, f"--port={port}", *fast]

    return command


def serve(port: int) -> list[str]:
    """This API as it runs in production."""
    return [sys.executable, "-m", "backend.cli", "serve", f"--port={port}", "--workers=1"]


OURS = Peer("ours", "this API, everything on", serve)
PEERS = (
    Peer(
        "bare_fastapi",
        "bare FastAPI: 20 fixed objects through a response model, no token, no database",
        uvicorn("bare_fastapi"),
        frozenset({"list"}),
    ),
    Peer(
        "async_session",
        "async SQLModel session per request, ORM objects through response models, PyJWT, claims and user cached",
        uvicorn("async_session"),
    ),
)
