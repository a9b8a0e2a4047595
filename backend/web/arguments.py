"""Compiled arguments of a handler: path, query, headers, JSON body and dependencies, as FastAPI would resolve them."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields
from http import HTTPStatus
from inspect import iscoroutinefunction, isfunction, ismethod, unwrap
from json import JSONDecodeError
from types import NoneType
from typing import Any, Final, NamedTuple, get_type_hints

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.params import Body
from fastapi.security import SecurityScopes
from starlette.types import Scope

from backend.web.parameters import ABSENT, Errors, Field, QueryModel, Unsupported, Values, is_scalar, query_model
from backend.web.request_state import request_state
from backend.web.signature import CallerDependency

Call = Callable[..., Awaitable[Any]]
# The members of FastAPI's dependency model that this module takes into account.
_TRAITS: Final = frozenset({
    "path_params", "query_params", "header_params", "cookie_params", "body_params", "dependencies", "name", "call",
    "request_param_name", "websocket_param_name", "http_connection_param_name", "response_param_name",
    "background_tasks_param_name", "security_scopes_param_name", "own_oauth_scopes", "parent_oauth_scopes",
    "use_cache", "path", "scope", "concurrency",
})  # fmt: skip


class _Step(NamedTuple):
    """The arguments of one function. `needs`: the numbers of earlier steps and the parameters for their results.

    `caller`, `request` and `scopes`: the parameters for the caller, the request and FastAPI's SecurityScopes.
    """

    call: Call
    scope: str | None
    needs: Sequence[tuple[int, str | None]]
    caller: Sequence[str]
    request: Sequence[str]
    scopes: Sequence[str]
    path: Sequence[Field]
    query: QueryModel | None
    headers: Sequence[tuple[bytes, Field]]
    body: Field | None

    def values(self, request: Request, body: Any, results: Sequence[Any], errors: Errors) -> Values | None:
        """None: this step or one that it needs is invalid."""
        values: Values = dict.fromkeys(self.request, request)
        for parameter in self.caller:
            values[parameter] = request_state(request.scope).caller
        for parameter in self.scopes:
            values[parameter] = SecurityScopes()
        before, is_incomplete = len(errors), False
        for number, name in self.needs:
            if results[number] is ABSENT:
                is_incomplete = True
            elif name is not None:
                values[name] = results[number]
        for field in self.path:
            field.read(request.path_params[field.loc[1]], values, errors)
        if self.query is not None:
            self.query.read(request.scope["query_string"], values, errors)
        for key, field in self.headers:
            field.read(_header(request.scope, key), values, errors)
        if self.body is not None:
            self.body.read(body, values, errors)
        return None if is_incomplete or len(errors) > before else values


class Arguments:
    """The arguments of one handler, compiled. Raises Unsupported for a handler that only FastAPI can call.

    `status` and `response_class`: those of the route. Only 204 with a plain Response is supported as an empty response.
    """

    def __init__(self, dependant: Dependant, status: int | None = None, response_class: Any = None) -> None:
        steps: list[_Step] = []
        _add(dependant, steps)
        *self._dependencies, self._handler = steps
        if any(step.body for step in self._dependencies):
            raise Unsupported(f"{self._handler.call!r} has a dependency that reads the body")
        try:
            returned = get_type_hints(self._handler.call).get("return")
        except (NameError, TypeError) as error:
            raise Unsupported(f"{self._handler.call!r} has annotations that cannot be resolved") from error
        may_be_empty = status == HTTPStatus.NO_CONTENT and response_class is Response
        kinds = (Response, NoneType) if may_be_empty else Response
        if not (isinstance(returned, type) and issubclass(returned, kinds)):
            raise Unsupported(f"{self._handler.call!r} returns something other than a Response")

    async def of(self, request: Request) -> Values:
        """The arguments for a request. Raises RequestValidationError with all errors, and errors of dependencies."""
        body = ABSENT if self._handler.body is None else await _json(request)
        errors: Errors = []
        results: list[Any] = []
        for step in self._dependencies:
            values = step.values(request, body, results, errors)
            results.append(ABSENT if values is None else await step.call(**values))
        values = self._handler.values(request, body, results, errors)
        if values is None:
            raise RequestValidationError(errors, body=None if body is ABSENT else body)
        return values


def _add(dependant: Dependant, steps: list[_Step]) -> int:
    """Add a function after its dependencies and return the number of its step. Each function is called once."""
    call = dependant.call
    if not _TRAITS.issuperset(field.name for field in fields(dependant)):
        raise Unsupported("this version of FastAPI has an unknown kind of dependency")
    others = (
        dependant.cookie_params,
        dependant.websocket_param_name,
        dependant.response_param_name,
        dependant.background_tasks_param_name,
        dependant.own_oauth_scopes,
        dependant.parent_oauth_scopes,
        dependant.concurrency,
        not dependant.use_cache,
    )
    if call is None or any(others) or not _is_plain_coroutine(call):
        raise Unsupported(
            f"{call!r} has parameters besides request, path, query, headers and JSON body, or is not async"
        )
    for number, step in enumerate(steps):
        if (step.call, step.scope) == (call, dependant.scope):
            return number
    if not all(map(is_scalar, (*dependant.path_params, *dependant.header_params))):
        raise Unsupported(f"{call!r} has a path parameter or header with more than one value")
    query = [query_model(field) for field in dependant.query_params]
    body = [Field(field, ("body",)) for field in dependant.body_params]
    if len(query) > 1 or len(body) > 1:
        raise Unsupported(f"{call!r} has several models for the query or the body")
    if not all(map(_is_whole_body, dependant.body_params)):
        raise Unsupported(f"{call!r} has a form, or a member of the body, as a parameter")
    needs = [(_add(each, steps), each.name) for each in dependant.dependencies if not _is_caller(each)]
    steps.append(
        _Step(
            call=call,
            scope=dependant.scope,
            needs=needs,
            caller=[each.name for each in dependant.dependencies if _is_caller(each) and each.name],
            request=[name for name in (dependant.request_param_name, dependant.http_connection_param_name) if name],
            scopes=[name for name in (dependant.security_scopes_param_name,) if name],
            path=[Field(field, ("path", field.alias)) for field in dependant.path_params],
            query=query[0] if query else None,
            headers=[
                (field.alias.lower().encode(), Field(field, ("header", field.alias)))
                for field in dependant.header_params
            ],
            body=body[0] if body else None,
        )
    )
    return len(steps) - 1


def _is_caller(dependant: Dependant) -> bool:
    """Whether the value is the caller, whom the route has authorized with the scopes of the dependency."""
    call: object = dependant.call
    return isinstance(call, CallerDependency) and dependant.concurrency is None


def _is_plain_coroutine(call: Call) -> bool:
    """Whether FastAPI would only await it: it is no generator, class or sync function, and has no decorator."""
    function = call if isfunction(call) or ismethod(call) else type(call).__call__
    return iscoroutinefunction(function) and unwrap(call) is call and unwrap(function) is function


def _is_whole_body(field: Any) -> bool:
    """Whether the JSON document itself is the value: no form, no member of the document, no default to validate."""
    info = field.field_info
    return type(info) is Body and not info.embed and not info.validate_default


def _header(scope: Scope, name: bytes) -> Any:
    for given, value in scope["headers"]:
        if given == name:
            return value.decode("latin-1")
    return ABSENT


async def _json(request: Request) -> Any:
    try:
        return await request.json() if await request.body() else ABSENT
    except JSONDecodeError as error:
        invalid = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "input": {}}
        raise RequestValidationError([{**invalid, "ctx": {"error": error.msg}}], body=error.doc) from error
