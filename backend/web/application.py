"""FastAPI with compiled dispatch in front of it."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.telemetry import TelemetryConfig
from starlette.types import ASGIApp

from backend.web import exceptions, openapi, problems
from backend.web.dispatch import CompiledRoutes, Dispatch

_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}


class Application(FastAPI):
    """FastAPI, and `Dispatch` for routes of one class."""

    def __init__(
        self,
        *,
        compiled: type[Any],
        outer: Sequence[Callable[[ASGIApp], ASGIApp]] = (),
        telemetry: TelemetryConfig | None = None,
        **options: Any,
    ) -> None:
        """`compiled`: a route class with the methods of `dispatch.Route`. Other options: those of FastAPI.

        `outer`: middleware around all that `add_middleware` adds, from the innermost to the outermost. One of it is the
        access log's, because the response to an unexpected exception needs its RequestState.
        """
        super().__init__(
            telemetry=telemetry or _NO_TELEMETRY,
            generate_unique_id_function=_operation_id,
            redirect_slashes=False,  # such a redirect would use the Host header of the request
            redoc_url=None,
            swagger_ui_oauth2_redirect_url=None,
            **options,
        )
        self._compiled = compiled
        self.outer_middleware = outer
        self.compiled_routes = CompiledRoutes(self, compiled)
        exceptions.install(self)

    def build_middleware_stack(self) -> ASGIApp:
        """Put the added middleware around compiled dispatch and FastAPI; FastAPI's own stays around FastAPI alone.

        As in FastAPI, added middleware sees unexpected exceptions.
        """
        added, handlers = self.user_middleware, self.exception_handlers
        self.user_middleware, self.exception_handlers = [], exceptions.only_expected(handlers)
        app: ASGIApp = Dispatch(super().build_middleware_stack(), self.compiled_routes)
        self.user_middleware, self.exception_handlers = added, handlers
        for middleware, arguments, options in reversed(added):
            app = middleware(app, *arguments, **options)
        app = exceptions.ExceptionsAsProblems(app)
        for surround in self.outer_middleware:
            app = surround(app)
        return exceptions.with_added_handler(app, self)

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, generated again after a change of the routes."""
        before = self.openapi_schema
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Duplicate Operation ID")  # `correct` makes them unique
            document = super().openapi()
        if document is not before:
            own = {
                (str(route.path_format), method.lower())
                for route in iter_route_contexts(self.routes)
                if isinstance(route.original_route, self._compiled)
                for method in route.methods or ()
            }
            handler = self.exception_handlers.get(RequestValidationError)
            openapi.correct(document, own, problems=handler is problems.invalid_request)
        return document


def _operation_id(route: APIRoute) -> str:
    return route.name
