"""Route classes that authenticate and authorize the caller before the body is read, and the caller's database."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from starlette.types import Receive, Scope, Send

from backend.auth import Bearer, BearerRoute, CurrentPrincipal, InvalidToken, Reason, forbidden, judge
from backend.database import Database
from backend.users.provisioning import Users
from backend.web import openapi
from backend.web.arguments import Arguments
from backend.web.rate_limits import count_user
from backend.web.request_state import request_state
from backend.web.requests import JSON, MERGE_PATCH, JSONRequest

MISSING_ROLE = "The account does not have the required role."
REFUSALS = openapi.responses(400, 401, 403, 429, 500, 503)


def route_for(*, read: str, write: str, body_limit: int = 64 * 1024) -> type["PersonRoute"]:
    """A route class for users. OAuth access tokens and API keys need the scope `read` for GET, else `write`.

    `body_limit`: in bytes.
    """
    limit = body_limit

    class Route(PersonRoute):
        scopes = (read, write)
        body_limit = limit

    return Route


def require_role(role: str) -> type["PersonRoute"]:
    """A route class for users whose row has the role. OAuth access tokens and API keys are refused.

    The token's own roles are ignored, because they may be older than the row's.
    """
    required = role

    class Route(PersonRoute):
        role = required

    return Route


class PersonRoute(BearerRoute):
    """Checks in this order: token, rate limit, subject, scope, account, role, content type, size, then the body."""

    scopes: tuple[str, ...] = ()  # for GET, for other methods; if empty, OAuth access tokens and API keys are refused
    role: str | None = None
    body_limit: int = 64 * 1024  # bytes

    async def judge(self, request: Request) -> None:
        principal = await judge(request)
        await count_user(request.scope, principal)
        state: dict[str, Any] = request.scope["state"]  # `request.state` would wrap it anew for each request
        users: Users = state["users"]
        bearer: Bearer = state["bearer"]
        bearer.require_person(principal)
        if self.scopes:
            bearer.require_scopes(principal, self.scopes[request.scope["method"] != "GET"])
        elif principal.scopes is not None:
            raise forbidden("This operation requires a session token. OAuth access tokens and API keys are refused.")
        user = await users.resolve(principal)
        if principal.issued_at <= user.tokens_valid_after:
            raise bearer.refusal(InvalidToken(Reason.REVOKED))
        request_state(request.scope).user = user
        if self.role is not None and self.role not in user.roles:
            raise forbidden(MISSING_ROLE)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._media_types = MERGE_PATCH if "PATCH" in (self.methods or ()) else JSON

    async def answer(self, arguments: Arguments, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request from the compiled dispatcher. FastAPI itself uses `get_route_handler`."""
        request = self._request(scope, receive)
        await self.judge(request)
        answer = await self.endpoint(**await arguments.of(request))
        await (Response(status_code=204) if answer is None else answer)(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await answer(self._request(request.scope, request.receive))

        return handler

    def _request(self, scope: Scope, receive: Receive) -> JSONRequest:
        return JSONRequest(scope, receive, media_types=self._media_types, limit=self.body_limit)


async def caller_database(request: Request, _: CurrentPrincipal) -> Database:
    """The database, limited to the caller's rows."""
    return Database(request.scope["state"]["pool"], request_state(request.scope).caller.actor)


CallerDatabase = Annotated[Database, Depends(caller_database)]
