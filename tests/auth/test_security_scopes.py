"""Scopes that a route names with FastAPI's `Security` are required of access tokens."""

from typing import Annotated

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Security
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from backend.auth import Bearer, BearerRoute, CurrentPrincipal, Principal, current_principal
from backend.auth.testing import LocalIssuer


async def subject(principal: CurrentPrincipal) -> str:
    return principal.subject


async def named(_: Annotated[Principal, Security(current_principal, scopes=["notes:read"])]) -> str:
    return "served"


async def inherited(subject: Annotated[str, Security(subject, scopes=["notes:read"])]) -> str:
    return subject


@pytest.mark.parametrize("route_class", [APIRoute, BearerRoute])
async def test_scopes_of_security_are_required(issuer: LocalIssuer, route_class: type[APIRoute]) -> None:
    router, app = APIRouter(route_class=route_class), FastAPI()
    router.get("/named")(named)
    router.get("/inherited")(inherited)
    router.get("/none", dependencies=[Depends(current_principal)])(lambda: "served")
    app.include_router(router)
    app.include_router(router, prefix="/included", dependencies=[Security(current_principal, scopes=["notes:write"])])

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {"bearer": Bearer(issuer.verifier())}}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(with_state), base_url="http://api") as http:
        for path, needed in (
            ("/named", {"notes:read"}),
            ("/inherited", {"notes:read"}),
            ("/none", set()),
            ("/included/named", {"notes:read", "notes:write"}),
            ("/included/none", {"notes:write"}),
        ):
            for scope in "", "notes:read", "notes:write", "notes:read notes:write":
                headers = {"Authorization": f"Bearer {issuer.access_token(scope=scope)}"}
                is_allowed = needed <= set(scope.split())
                assert (await http.get(path, headers=headers)).status_code == (200 if is_allowed else 403), (
                    path,
                    scope,
                )
            assert (await http.get(path, headers={"Authorization": f"Bearer {issuer.token()}"})).status_code == 200
