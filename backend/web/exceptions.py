"""Handlers of exceptions: those that turn them into problems, and those that a fork adds."""

import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import psycopg
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette._utils import is_async_callable
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from backend.web import problems
from backend.web.request_state import request_state
from backend.web.requests import with_body

Handler = Callable[[Request, Exception], Any]

logger = logging.getLogger(__name__)


def install(app: FastAPI) -> None:
    app.add_exception_handler(problems.DomainError, problems.domain_error)
    app.add_exception_handler(HTTPException, problems.http_exception)
    app.add_exception_handler(RequestValidationError, problems.invalid_request)
    app.add_exception_handler(psycopg.Error, problems.database_error)
    app.add_exception_handler(Exception, _raise)


async def handle(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Respond to an error of a compiled route with the registered handler, as Starlette does around FastAPI's routes.

    Raises the error if it has no handler. A handler may raise another error, which is handled once more, as Starlette
    looks for handlers at the route and again around the router.
    """
    for is_last in (False, True):
        handler = _registered_handler(scope["app"].exception_handlers, error)
        if handler is None:
            raise error
        if request_state(scope).status is not None:
            raise RuntimeError("Caught handled exception, but response already started.") from error
        try:
            response = await _call(handler, with_body(Request(scope, receive, send)), error)
        except Exception as raised:
            if is_last:
                raise
            error = raised
        else:
            if response is not None:
                await response(scope, receive, send)
            error.__traceback__ = None  # an error that is raised again would collect the tracebacks of all requests
            return


async def _call(handler: Handler, request: Request, error: Exception) -> Any:
    if is_async_callable(handler):
        return await handler(request, error)
    return await run_in_threadpool(handler, request, error)


class ExceptionsAsProblems:
    """ASGI middleware around added middleware: logs unexpected exceptions, and turns them into problems.

    The log contains the type and the traceback of an error, but not its message, which may quote the request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http":
                raise
            trace = "".join(traceback.format_tb(error.__traceback__))
            logger.error("unexpected %s\n%s", type(error).__qualname__, trace)  # noqa: TRY400  # omits the message
            if request_state(scope).status is not None:
                return
            handler = _added_handler(scope["app"]) or problems.internal_error
            response = await _call(handler, Request(scope), error)
            await response(scope, receive, send)


def only_expected(handlers: Mapping[Any, Handler]) -> dict[Any, Handler]:
    """The handlers for FastAPI's own stack, which leaves unexpected errors to ExceptionsAsProblems."""
    return {**handlers, 500: _raise, Exception: _raise}


def with_added_handler(app: ASGIApp, owner: FastAPI) -> ASGIApp:
    """Use a handler of a fork for errors of all middleware, too, as FastAPI does; other errors do not get that far."""
    handler = _added_handler(owner)
    return ServerErrorMiddleware(app, handler) if handler else app


def _added_handler(app: FastAPI) -> Handler | None:
    """The handler of unexpected errors that a fork has added."""
    handler: Handler = app.exception_handlers.get(500, app.exception_handlers[Exception])
    return None if handler is _raise else handler


def _registered_handler(handlers: Mapping[Any, Handler], error: Exception) -> Handler | None:
    """The handler of an error by its status or type, as Starlette looks it up; None for unexpected errors."""
    statuses = [error.status_code] if isinstance(error, HTTPException) else []
    kinds = [kind for kind in (*statuses, *type(error).__mro__) if kind not in (500, Exception)]
    return next((handlers[kind] for kind in kinds if kind in handlers), None)


async def _raise(_: Request, error: Exception) -> NoReturn:
    """Replaces the handler of FastAPI's outermost middleware, which would respond in plain text."""
    raise error
