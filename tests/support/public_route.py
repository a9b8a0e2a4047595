"""The route class of the API without authentication, and requests without start-up: for tests without a database."""

from types import SimpleNamespace
from typing import cast

from fastapi import Request
from fastapi.dependencies.models import Dependant
from starlette.types import ASGIApp, Receive, Scope, Send

from backend.users.caller import Caller, CallerRoute, Permission
from backend.web.start_up import STATE

CALLER = cast(Caller, SimpleNamespace(user=SimpleNamespace(actor=SimpleNamespace(id=None))))


class PublicRoute(CallerRoute):
    """Every request has the same caller."""

    def permission(self, _: Dependant) -> Permission:
        return Permission()

    async def authorize(self, _: Request, __: Permission) -> Caller:
        return CALLER


def started(app: ASGIApp) -> ASGIApp:
    """The application with the state by which it knows that its lifespan has run."""

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {STATE: None, **scope.get("state", {})}}, receive, send)

    return with_state
