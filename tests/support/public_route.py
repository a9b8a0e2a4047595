"""The route class of the API, without authentication, for tests that need no issuer and no database."""

from types import SimpleNamespace
from typing import cast

from fastapi import Request
from fastapi.dependencies.models import Dependant

from backend.users.caller import Caller, CallerRoute, Permission

CALLER = cast(Caller, SimpleNamespace(user=SimpleNamespace(actor=SimpleNamespace(id=None))))


class PublicRoute(CallerRoute):
    """Every request has the same caller."""

    def permission(self, _: Dependant) -> Permission:
        return Permission()

    async def authorize(self, _: Request, __: Permission) -> Caller:
        return CALLER
