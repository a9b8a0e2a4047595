"""The caller of a request, the permissions in the signatures of handlers, and the route class that enforces them."""

from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, cast

from fastapi import Depends, Request, Response, Security
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, APIWebSocketRoute, RouteContext, iter_route_contexts
from fastapi.security import SecurityScopes
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from backend.auth import Bearer, InvalidToken, Principal, Reason, Requirement, forbidden, judge
from backend.database import Database
from backend.users.provisioning import KnownUser, Users
from backend.web import openapi
from backend.web.arguments import Arguments
from backend.web.rate_limits import count_user
from backend.web.request_state import request_state
from backend.web.requests import JSON, MERGE_PATCH, JSONRequest, with_body
from backend.web.signature import effective_dependant, find_dependencies
from backend.web.start_up import StartError

MISSING_ROLE: Final = "The account does not have the required role."
REFUSALS: Final = openapi.responses(400, 401, 403, 429, 500, 503)


@dataclass(frozen=True, slots=True)
class Caller:
    """The user who sends a request."""

    principal: Principal  # of the verified token
    user: KnownUser  # the local account
    database: Database  # limited to the user's rows


@dataclass(frozen=True, slots=True)
class Permission:
    """What a route requires of its caller.

    `scopes`: OAuth access tokens and API keys need all of them. `session_only`: these tokens are refused. `roles`: of
    the user's row; the token's own roles are ignored, because they may be older.
    """

    scopes: tuple[str, ...] = ()
    session_only: bool = False
    roles: tuple[str, ...] = ()


_PUBLIC: Final = Permission()
_SESSION_ONLY: Final = Permission(session_only=True)


class CallerRequirement(Requirement):
    """A dependency that returns the caller. The `auth.py` of each feature has the aliases that handlers use.

    `session_only`: refuses OAuth access tokens and API keys. `role`: a role of the user's row; implies `session_only`.
    Scopes are those of `Security`: `Annotated[Caller, Security(current_caller, scopes=["tasks:read"])]`. CallerRoute
    enforces all of this before it reads the body. On other routes the dependency does, when FastAPI calls it.
    """

    def __init__(self, *, session_only: bool = False, role: str | None = None) -> None:
        super().__init__()
        self.session_only: Final = session_only or role is not None
        self.role: Final = role

    async def __call__(self, request: Request, security_scopes: SecurityScopes) -> Caller:  # type: ignore[override]  # a caller, not a principal
        permission = _combined([(self, frozenset(security_scopes.scopes))])
        caller = request_state(request.scope).caller
        if permission is None and caller is not None:
            return cast(Caller, caller)
        return await authorize(request, permission or _SESSION_ONLY)


current_caller: Final = CallerRequirement()
# For dependencies that several routes share. It names no permission: that is in the signatures of the handlers.
CurrentCaller = Annotated[Caller, Security(current_caller)]


async def public() -> None:
    """Declare in a handler's signature that the route is public."""


Public = Annotated[None, Depends(public)]


class UnprotectedRoute(StartError):
    """The signature of a handler names no permission, and the route is not declared public."""


async def authorize(request: Request, permission: Permission) -> Caller:
    """Return the caller, if the permission holds.

    Checks in this order: token, rate limit, subject, scopes, account, role. Raises Refusal, DomainError or
    psycopg.Error. A request that has been authorized before is not counted again, and its user not read again.
    """
    principal, state = await judge(request), request_state(request.scope)
    caller = cast(Caller | None, state.caller)
    process: dict[str, Any] = request.scope["state"]  # `request.state` would wrap it anew for each request
    bearer: Bearer = process["bearer"]
    if caller is None:
        await count_user(request.scope, principal)
    bearer.require_person(principal)
    if permission.session_only and principal.scopes is not None:
        raise forbidden("This operation requires a session token. OAuth access tokens and API keys are refused.")
    bearer.require_scopes(principal, *permission.scopes)
    if caller is None:
        users: Users = process["users"]
        user = await users.resolve(principal)
        if principal.issued_at <= user.tokens_valid_after:
            raise bearer.refusal(InvalidToken(Reason.REVOKED))
        state.caller = caller = Caller(principal, user, Database(process["pool"], user.actor))
    for role in permission.roles:
        if role not in caller.user.roles:
            raise forbidden(MISSING_ROLE)
    return caller


class CallerRoute(APIRoute):
    """Authorizes the caller that the signature names before it reads the body.

    Checks in this order: token, rate limit, subject, scopes, account, role, content type, size, then the body. If the
    handler and its dependencies name several permissions, all must hold. A route that names none is not served.
    """

    requirement: type[CallerRequirement] = CallerRequirement
    body_limit: int = 64 * 1024  # bytes

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.built_app = self.app
        self._media_types = MERGE_PATCH if "PATCH" in (self.methods or ()) else JSON

    async def authorize(self, request: Request, permission: Permission) -> Caller:
        """Return the caller. Extend it to make further checks before the body is read."""
        return await authorize(request, permission)

    def permission(self, dependant: Dependant) -> Permission | None:
        """All that the callers in the signature require. None if there is none, and the route is not public."""
        named = list(find_dependencies(dependant, CallerRequirement))
        is_public = not named and any(each.call is public for each in dependant.dependencies)
        return _PUBLIC if is_public else _combined(named)

    async def answer(
        self, permission: Permission | None, arguments: Arguments, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer a request from the compiled dispatcher. FastAPI itself uses `get_route_handler`."""
        request = self._request(scope, receive)
        await self._enforce(request, permission)
        response = await arguments.call(request)
        await response(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        dependant = effective_dependant(self)
        permission = self.permission(dependant)

        async def handler(request: Request) -> Response:
            # A fork's own class reads the body in its own way.
            own = self._request(request.scope, request.receive, request) if type(request) is Request else request
            overrides = getattr(request.scope.get("app"), "dependency_overrides", ())
            required = permission
            if permission and overrides:
                required = _combined(find_dependencies(dependant, CallerRequirement, overrides)) or _PUBLIC
            await self._enforce(own, required)
            try:
                return await answer(own)
            finally:
                with_body(request)

        return handler

    def _request(self, scope: Scope, receive: Receive, source: Request | None = None) -> JSONRequest:
        return JSONRequest(scope, receive, media_types=self._media_types, limit=self.body_limit, source=source)

    async def _enforce(self, request: Request, permission: Permission | None) -> None:
        if permission is None:
            raise UnprotectedRoute(self.path)
        if permission is not _PUBLIC:
            request_state(request.scope).caller = await self.authorize(request, permission)


def require_permissions(routes: Sequence[BaseRoute]) -> None:
    """Raise UnprotectedRoute, with the names of the routes, if any of class CallerRoute names no permission.

    Raises StartError if a WebSocket takes a caller.
    """
    for context in _contexts(routes):
        route = context.original_route
        if isinstance(route, APIWebSocketRoute) and any(find_dependencies(context.dependant, CallerRequirement)):
            name = f"{route.endpoint.__module__}.{route.name}"
            raise StartError(
                f"a caller in the signature of the WebSocket {context.path} ({name}): callers are authorized in HTTP "
                "requests only, so use `CurrentPrincipal`"
            )
    unprotected = [
        f"{'|'.join(sorted(context.methods or ()))} {context.path} ({route.endpoint.__module__}.{route.name})"
        for context in _contexts(routes)
        if isinstance(route := context.original_route, CallerRoute) and route.permission(context.dependant) is None
    ]
    if unprotected:
        raise UnprotectedRoute(
            f"no permission in the signature of {', '.join(unprotected)}: add a parameter such as `caller: Person`, or "
            "`_: Public` if anyone may call it"
        )


def _contexts(routes: Sequence[BaseRoute]) -> Iterator[RouteContext]:
    """The effective routes, those of mounted applications included."""
    for context in iter_route_contexts(routes):
        yield context
        yield from _contexts(getattr(context.original_route, "routes", None) or ())


def _combined(named: Iterable[tuple[CallerRequirement, frozenset[str]]]) -> Permission | None:
    """All requirements together; None if there are none."""
    scopes: set[str] = set()
    roles: set[str] = set()
    session_only = False
    for requirement, own_scopes in named:
        scopes |= own_scopes
        session_only = session_only or requirement.session_only
        if requirement.role is not None:
            roles.add(requirement.role)
    if not (scopes or session_only or roles):
        return None
    return Permission(tuple(sorted(scopes)), session_only, tuple(sorted(roles)))
