"""FastAPI with compiled dispatch in front of it."""

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from starlette.types import ASGIApp

from backend.web import exceptions, openapi
from backend.web.dispatch import CompiledRoutes, Dispatch

_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}


class Application(FastAPI):
    """FastAPI, and `Dispatch` for routes of one class."""

    def __init__(self, *, compiled: type[Any], telemetry: TelemetryConfig | None = None, **options: Any) -> None:
        """`compiled`: a route class with the methods of `dispatch.Route`. Other options: those of FastAPI."""
        super().__init__(
            telemetry=telemetry or _NO_TELEMETRY,
            generate_unique_id_function=_operation_id,
            redirect_slashes=False,  # such a redirect would use the Host header of the request
            redoc_url=None,
            swagger_ui_oauth2_redirect_url=None,
            **options,
        )
        self.compiled_routes = CompiledRoutes(self, compiled)
        exceptions.install(self)

    def build_middleware_stack(self) -> ASGIApp:
        """Put the added middleware around compiled dispatch and FastAPI; FastAPI's own stays around FastAPI alone."""
        added, self.user_middleware = self.user_middleware, []
        app = super().build_middleware_stack()
        self.user_middleware = added
        if self.compiled_routes.is_possible:
            app = Dispatch(app, self.compiled_routes)
        app = exceptions.ExceptionsAsProblems(app)
        for middleware, arguments, options in reversed(added):
            app = middleware(app, *arguments, **options)
        return exceptions.with_added_handler(app, self)

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, generated once."""
        if not self.openapi_schema:
            self.openapi_schema = openapi.corrected(super().openapi())
        return self.openapi_schema


def _operation_id(route: APIRoute) -> str:
    return route.name
