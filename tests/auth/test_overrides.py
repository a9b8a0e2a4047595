"""An override of `current_principal` replaces the token, also on routes that authenticate before reading the body."""

from typing import Annotated

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Header
from starlette.types import Receive, Scope, Send

from backend.auth import BearerRoute, CurrentPrincipal, Principal, current_principal


def from_header(caller: Annotated[str, Header()], item: str) -> Principal:
    """An override with parameters of its own: a header and a path parameter."""
    return Principal(f"{caller} {item}", "http://localhost:3000", 0, 1)


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    authenticated = APIRouter(route_class=BearerRoute)

    async def subject(principal: CurrentPrincipal) -> str:
        return principal.subject

    app.get("/plain/{item}")(subject)
    authenticated.get("/authenticated/{item}")(subject)
    app.include_router(authenticated)
    app.dependency_overrides[current_principal] = from_header
    return app


async def test_an_override_replaces_the_token(app: FastAPI) -> None:
    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {}}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(with_state), base_url="http://api") as http:
        for path in "/plain/x", "/authenticated/x":
            assert (await http.get(path, headers={"Caller": "ada"})).json() == "ada x"
            assert (await http.get(path)).status_code == 422
