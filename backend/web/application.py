"""FastAPI with compiled dispatch in front of it."""

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from starlette.types import ASGIApp

from backend.web import openapi, problems
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
        self.compiled_routes = CompiledRoutes(self.router, compiled)
        problems.install(self)

    def build_middleware_stack(self) -> ASGIApp:
        """Put the added middleware around compiled dispatch and FastAPI; FastAPI's own stays around FastAPI alone."""
        added, self.user_middleware = self.user_middleware, []
        dispatch = Dispatch(super().build_middleware_stack(), self.compiled_routes)
        self.user_middleware = added
        app: ASGIApp = problems.ExceptionsAsProblems(dispatch)
        for middleware, arguments, options in reversed(added):
            app = middleware(app, *arguments, **options)
        return app

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, generated once."""
        if not self.openapi_schema:
            self.openapi_schema = openapi.corrected(super().openapi())
        return self.openapi_schema


def _operation_id(route: APIRoute) -> str:
    return route.name
