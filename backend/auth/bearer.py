"""Authenticates requests with bearer tokens and answers refused ones with a challenge (RFC 6750)."""

import re
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from math import ceil
from typing import Annotated, Any, Final

from fastapi import Request, Response, Security
from fastapi.dependencies.utils import get_dependant, solve_dependencies
from fastapi.exceptions import RequestValidationError
from fastapi.params import Depends
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer, SecurityScopes
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from .errors import AuthError, InvalidRequest, KeysUnavailable, MissingToken, UnusableKeys
from .principal import Principal
from .verifier import TokenVerifier

# The scheme in any case, one or more spaces, a b64token (RFC 6750, 2.1; RFC 9110, 11.1).
_CREDENTIALS: Final = re.compile(rb"(?i:bearer) +([A-Za-z0-9._~+/-]+=*)")
_NOT_IN_DESCRIPTION: Final = re.compile(r"[^\x20\x21\x23-\x5b\x5d-\x7e]")
_NOT_IN_SCOPE: Final = re.compile(r"[^\x21\x23-\x5b\x5d-\x7e]")

_STACKS: Final = ("fastapi_inner_astack", "fastapi_function_astack")  # of a FastAPI route, in the scope

# Stored in the connection's scope, not in its state: some servers share one state between requests.
_JUDGED: Final = "better_auth.principal"


class Refusal(HTTPException):
    """The HTTP error for a refused request, with its challenge. `code` is stable and meant for problem details."""

    def __init__(self, status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, detail, headers)
        self.code = code


def forbidden(detail: str) -> Refusal:
    """Return a 403: the caller is authenticated, but not allowed to do this."""
    return Refusal(403, "forbidden", detail)


class Bearer:
    """Verifies the Authorization header of a request. Add it to the lifespan state: `yield {"bearer": Bearer(...)}`.

    `resource_metadata` is the URL of this API's protected resource metadata, named in each challenge (RFC 9728, 5.1).
    Raises ValueError if it contains characters that a header must not contain.
    """

    def __init__(self, verifier: TokenVerifier, *, resource_metadata: str | None = None) -> None:
        if resource_metadata is not None and _NOT_IN_SCOPE.search(resource_metadata):
            raise ValueError("resource_metadata must be a URL in ASCII, without spaces, quotes and backslashes")
        self.verifier: Final = verifier
        self._metadata = {"resource_metadata": resource_metadata} if resource_metadata else {}

    async def __call__(self, connection: HTTPConnection) -> Principal:
        """Return the principal of a request. Raises Refusal."""
        try:
            return await self.verifier.verify(read_token(connection))
        except AuthError as error:
            raise self.refusal(error) from None

    def refusal(self, error: AuthError) -> Refusal:
        """Return the response for an error: status, code and challenge (RFC 6750, 3)."""
        match error:
            case KeysUnavailable() | UnusableKeys():
                detail = "The token cannot be verified now, because the keys of the issuer are unavailable. Try again."
                headers = {"Retry-After": str(ceil(getattr(error, "retry_after", 1)))}
                return Refusal(503, "keys_unavailable", detail, headers)
            case MissingToken():
                return self._challenge(401, "unauthorized", "A bearer token is required.", {})
            case InvalidRequest():
                return self._refused(400, "invalid_request", str(error))
            case _:
                return self._refused(401, "invalid_token", str(error))

    def require_scopes(self, principal: Principal, *scopes: str) -> None:
        """Refuse an access token, or the token of an API key, without all of `scopes`. A `/token` JWT needs none."""
        if principal.scopes is None:
            return
        missing = [scope for scope in scopes if scope not in principal.scopes]
        if missing:
            detail = "The access token lacks a scope."
            raise self._refused(403, "insufficient_scope", detail, {"scope": " ".join(missing)})

    def require_person(self, principal: Principal) -> None:
        """Refuse OAuth clients that act for themselves, and banned users."""
        if principal.is_machine:
            raise forbidden(
                "This operation requires a user: the token belongs to an OAuth client that acts for itself."
            )
        if principal.is_banned(self.verifier.clock()):
            raise forbidden("The account is banned.")

    def require_role(self, principal: Principal, *roles: str) -> None:
        """Refuse a token without one of `roles`. Access tokens and tokens of API keys have none."""
        if principal.scopes is not None or not set(roles).intersection(principal.roles or ()):
            raise forbidden("The account does not have the required role.")

    def _refused(self, status: int, code: str, detail: str, more: dict[str, str] | None = None) -> Refusal:
        error = {"error": code, "error_description": _NOT_IN_DESCRIPTION.sub("?", detail)}
        return self._challenge(status, code, detail, error | (more or {}))

    def _challenge(self, status: int, code: str, detail: str, parameters: dict[str, str]) -> Refusal:
        rendered = ", ".join(f'{name}="{value}"' for name, value in (parameters | self._metadata).items())
        return Refusal(status, code, detail, {"WWW-Authenticate": f"Bearer {rendered}".rstrip()})


def read_token(connection: HTTPConnection) -> str:
    """The token of the one Authorization header (RFC 6750, 2.1). Raises MissingToken or InvalidRequest."""
    values = [value for name, value in connection.scope["headers"] if name == b"authorization"]
    if len(values) > 1:
        raise InvalidRequest("There is more than one Authorization header.")
    if not values:
        raise MissingToken("no Authorization header")
    value = values[0].strip(b" \t")  # not part of the value (RFC 9110, 5.5), but some servers pass it on
    credentials = _CREDENTIALS.fullmatch(value)
    if credentials:
        return credentials[1].decode()
    if re.split(rb"[ \t]", value, maxsplit=1)[0].lower() != b"bearer":
        raise MissingToken("another scheme than Bearer")
    raise InvalidRequest("The Authorization header is not: Bearer, a space, and a token.")


async def judge(connection: HTTPConnection) -> Principal:
    """Return the principal of a request; the token is verified once. Raises Refusal.

    An override of `current_principal` in `app.dependency_overrides` takes the place of the token.
    """
    principal = verified_principal(connection.scope)
    if principal is None:
        app = connection.scope.get("app")
        if current_principal in getattr(app, "dependency_overrides", ()):
            principal = await _overridden(connection, app)
        else:
            principal = await bearer_of(connection)(connection)
        connection.scope[_JUDGED] = connection.scope.setdefault("state", {})["principal"] = principal
    return principal


def verified_principal(scope: Mapping[str, Any]) -> Principal | None:
    """Return the principal of a request that has been authenticated, for logs and middleware; None before."""
    principal: Principal | None = scope.get(_JUDGED)
    return principal


async def _overridden(connection: HTTPConnection, app: Any) -> Principal:
    """Return the result of the function that overrides `current_principal`, with its own dependencies.

    FastAPI resolves dependencies after it has read the body; a route of ours needs the principal before that. Outside
    of FastAPI's routes, which have stacks for the cleanup of dependencies, the cleanup follows at once.
    """
    override = app.dependency_overrides[current_principal]

    def dependent(principal: Annotated[Principal, Depends(override)]) -> None:
        """Declares the dependency. It is not called."""

    path = "".join(f"{{{name}}}" for name in connection.path_params)  # from which FastAPI takes their names
    async with AsyncExitStack() as stack:
        added = {name: stack for name in _STACKS if name not in connection.scope}
        connection.scope.update(added)
        try:
            solved = await solve_dependencies(
                request=connection,  # type: ignore[arg-type]  # a Request or a WebSocket: FastAPI makes no others
                dependant=get_dependant(path=path, call=dependent),
                dependency_overrides_provider=app,
                async_exit_stack=connection.scope["fastapi_inner_astack"],
                embed_body_fields=False,
            )
        finally:
            for name in added:
                del connection.scope[name]
    if solved.errors:
        raise RequestValidationError(solved.errors)
    principal: Principal = solved.values["principal"]
    return principal


def bearer_of(connection: HTTPConnection) -> Bearer:
    """Return the Bearer of the app's lifespan state. Raises RuntimeError if there is none."""
    bearer: Bearer | None = connection.scope.get("state", {}).get("bearer")
    if bearer is None:
        raise RuntimeError('no Bearer in the lifespan state: yield {"bearer": Bearer(verifier)} from the lifespan')
    return bearer


class BearerRoute(APIRoute):
    """A route that authenticates the request before it reads the body or runs a dependency.

    It sets `request.state.principal`. Extend `judge` to make further checks at that point.
    """

    async def judge(self, request: Request) -> None:
        """Authenticate the request. Raises Refusal."""
        await judge(request)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def handler(request: Request) -> Response:
            await self.judge(request)
            return await answer(request)

        return handler


class Requirement(HTTPBearer):
    """A dependency that returns the principal if it meets the requirements; named BetterAuth in OpenAPI.

    The scopes of `Security(..., scopes=[...])` are required in addition to `scopes`.
    """

    def __init__(self, *, person: bool = False, scopes: tuple[str, ...] = (), roles: tuple[str, ...] = ()) -> None:
        super().__init__(
            bearerFormat="JWT",
            scheme_name="BetterAuth",
            description="A JWT from Better Auth. OAuth access tokens and API keys need the scopes of the operation.",
        )
        if not all(scope and not _NOT_IN_SCOPE.search(scope) for scope in scopes):
            raise ValueError("a scope is visible ASCII without quotes and backslashes (RFC 6749, 3.3)")
        self.scopes: Final = scopes
        self._person = person
        self._roles = roles

    async def __call__(  # type: ignore[override]  # a principal, not a string
        self, request: HTTPConnection, security_scopes: SecurityScopes
    ) -> Principal:
        principal = await judge(request)
        if self._person:
            bearer_of(request).require_person(principal)
        if scopes := (*self.scopes, *security_scopes.scopes):
            bearer_of(request).require_scopes(principal, *scopes)
        if self._roles:
            bearer_of(request).require_role(principal, *self._roles)
        return principal


current_principal: Final = Requirement()
CurrentPrincipal = Annotated[Principal, Security(current_principal)]
CurrentPerson = Annotated[Principal, Security(Requirement(person=True))]


def requires_scope(*scopes: str) -> Depends:
    """Require all of `scopes` of tokens that have scopes: `Annotated[Principal, requires_scope("tasks:read")]`."""
    return Security(Requirement(scopes=scopes))  # type: ignore[no-any-return]  # FastAPI types its markers as Any


def requires_role(*roles: str) -> Depends:
    """Require one of `roles`: `dependencies=[requires_role("admin")]`."""
    return Security(Requirement(roles=roles))  # type: ignore[no-any-return]  # FastAPI types its markers as Any
