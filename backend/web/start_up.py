"""Start-up: its errors in one line each, and requests to an application whose lifespan has not run."""

import sys
from contextlib import suppress
from http import HTTPStatus
from typing import Final, NoReturn

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.web.problems import respond

# Routes that need no lifespan. All others need the settings, at least for hosts, origins and rate limits.
WITHOUT_LIFESPAN: Final = frozenset({"/livez"})
STATE: Final = "security_events"  # a name that the state of another application does not have


class StartError(Exception):
    """The application cannot start. The message tells the operator the reasons, one in each line."""


class LifespanNotRun(RuntimeError):
    """The lifespan of this application has not run.

    In a test, use `with TestClient(app)`. Use a server with the lifespan protocol on. In a parent application, run it
    in the parent's lifespan: `async with app.router.lifespan_context(app) as state: yield state`.
    """

    def __init__(self) -> None:
        super().__init__(" ".join(str(self.__doc__).split()))


async def refuse(scope: Scope, receive: Receive, send: Send) -> NoReturn:
    """Respond to a request without a lifespan with 500, and raise LifespanNotRun for the log or the test client."""
    if scope["type"] == "http":
        detail = "The server has not started this application. The reason is in its log."
        response = respond(Request(scope), HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", detail)
        await response(scope, receive, send)
    raise LifespanNotRun


async def start(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run a lifespan. Sends the message of a StartError to the server, in place of Starlette's traceback."""

    async def send_reason(message: Message) -> None:
        error = sys.exception()  # Starlette sends while it handles the error
        if message["type"] == "lifespan.startup.failed" and isinstance(error, StartError):
            message = {**message, "message": str(error)}
        await send(message)

    with suppress(StartError):  # the server has its reason, and would log the traceback
        await app(scope, receive, send_reason)
