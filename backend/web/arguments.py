"""Compiled arguments of a handler: path, query, headers, JSON body and dependencies, as FastAPI would resolve them."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import fields
from functools import lru_cache
from http import HTTPStatus
from inspect import iscoroutinefunction, isfunction, ismethod, unwrap
from json import JSONDecodeError
from types import NoneType
from typing import Any, Final, NamedTuple, get_args, get_origin, get_type_hints

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.params import Body
from fastapi.security import SecurityScopes
from pydantic import BaseModel
from starlette.datastructures import QueryParams
from starlette.types import Scope

from backend.web.request_state import request_state
from backend.web.signature import CallerDependency

Call = Callable[..., Awaitable[Any]]
Errors = list[Any]
Values = dict[str, Any]

MAX_QUERIES: Final = 256  # cached for each route
MAX_QUERY: Final = 256  # bytes of a cached query string

_ABSENT: Final = object()
_TEXT: Final = (str, bytes)  # collections, but single values in a request
_EMPTY: Final = (None, tuple, frozenset)  # default factories whose result is the same for every request
_SHAREABLE: Final = (str, int, float, bool, NoneType)
# The members of FastAPI's dependency model that this module takes into account.
_TRAITS: Final = frozenset({
    "path_params", "query_params", "header_params", "cookie_params", "body_params", "dependencies", "name", "call",
    "request_param_name", "websocket_param_name", "http_connection_param_name", "response_param_name",
    "background_tasks_param_name", "security_scopes_param_name", "own_oauth_scopes", "parent_oauth_scopes",
    "use_cache", "path", "scope", "concurrency",
})  # fmt: skip


class Unsupported(TypeError):
    """The handler has parameters that only FastAPI can resolve."""


class _Field(NamedTuple):
    """A parameter: FastAPI's field, which validates it, and its location."""

    field: Any
    loc: tuple[str, ...]

    def read(self, given: Any, values: Values, errors: Errors) -> None:
        field = self.field
        if given is _ABSENT:
            if field.field_info.is_required():
                errors.append({"type": "missing", "loc": self.loc, "msg": "Field required", "input": None})
            else:
                values[field.name] = field.default
            return
        value, invalid = field.validate(given, {}, loc=self.loc)
        if invalid:
            errors.extend(invalid)
        else:
            values[field.name] = value


class _Unshareable(Exception):
    """The values of a query string cannot be cached."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values


class _Query:
    """A model of query parameters. Frozen models are cached by query string.

    A model is not cached if a member can be modified, as a list can, or has a default from a function.
    """

    def __init__(self, field: _Field, model: type[BaseModel]) -> None:
        self._field = field
        self._names = frozenset(model.model_fields)
        self._lists = {name for name, member in model.model_fields.items() if _is_list(member.annotation)}
        is_fixed = all(member.default_factory in _EMPTY for member in model.model_fields.values())
        is_shareable = is_fixed and model.model_config.get("frozen")
        self._cached = lru_cache(MAX_QUERIES)(self._validate_shareable) if is_shareable else self._validate

    def read(self, given: bytes, values: Values, errors: Errors) -> None:
        try:
            parsed, invalid = (self._cached if len(given) <= MAX_QUERY else self._validate)(given)
        except _Unshareable as error:  # exceptions are not cached
            parsed, invalid = error.values, []
        values.update(parsed)
        errors.extend(invalid)

    def _validate(self, given: bytes) -> tuple[Values, Errors]:
        values: Values = {}
        errors: Errors = []
        self._field.read(self._parse(given), values, errors)
        return values, errors

    def _validate_shareable(self, given: bytes) -> tuple[Values, Errors]:
        """Raises _Unshareable for a model that requests cannot share: one that can be modified has no hash."""
        values, errors = self._validate(given)
        try:
            hash(tuple(values.values()))
        except TypeError:
            raise _Unshareable(values) from None
        return values, errors

    def _parse(self, given: bytes) -> Values:
        """Parse a query string. A repeated parameter has its last value; lists and unknown names have all values.

        One pass: the cost is linear in the length of the query string.
        """
        found: dict[str, list[str]] = {}
        for name, value in QueryParams(given).multi_items():
            found.setdefault(name, []).append(value)
        return {
            name: values if name in self._lists or (len(values) > 1 and name not in self._names) else values[-1]
            for name, values in found.items()
        }


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
    path: Sequence[_Field]
    query: _Query | None
    headers: Sequence[tuple[bytes, _Field]]
    body: _Field | None

    def values(self, request: Request, body: Any, results: Sequence[Any], errors: Errors) -> Values | None:
        """None: this step or one that it needs is invalid."""
        values: Values = dict.fromkeys(self.request, request)
        for parameter in self.caller:
            values[parameter] = request_state(request.scope).caller
        for parameter in self.scopes:
            values[parameter] = SecurityScopes()
        before, is_incomplete = len(errors), False
        for number, name in self.needs:
            if results[number] is _ABSENT:
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
        body = _ABSENT if self._handler.body is None else await _json(request)
        errors: Errors = []
        results: list[Any] = []
        for step in self._dependencies:
            values = step.values(request, body, results, errors)
            results.append(_ABSENT if values is None else await step.call(**values))
        values = self._handler.values(request, body, results, errors)
        if values is None:
            raise RequestValidationError(errors, body=None if body is _ABSENT else body)
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
    if not all(map(_is_scalar, (*dependant.path_params, *dependant.header_params))):
        raise Unsupported(f"{call!r} has a path parameter or header with more than one value")
    query = [_query(field) for field in dependant.query_params]
    body = [_Field(field, ("body",)) for field in dependant.body_params]
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
            path=[_Field(field, ("path", field.alias)) for field in dependant.path_params],
            query=query[0] if query else None,
            headers=[
                (field.alias.lower().encode(), _Field(field, ("header", field.alias)))
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


def _is_scalar(field: Any) -> bool:
    """Whether a path parameter or header has one name, one value, and a default that requests can share as it is."""
    info = field.field_info
    if info.validate_default:
        return False
    shareable = info.is_required() or (info.default_factory is None and isinstance(info.default, _SHAREABLE))
    has_one_name = info.validation_alias in (None, field.alias)
    return shareable and has_one_name and not _is_list(info.annotation) and not _is_model(info.annotation)


def _is_whole_body(field: Any) -> bool:
    """Whether the JSON document itself is the value: no form, no member of the document, no default to validate."""
    info = field.field_info
    return type(info) is Body and not info.embed and not info.validate_default


def _query(field: Any) -> _Query:
    model = field.field_info.annotation
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise Unsupported(f"the query parameter {field.name} is not part of a model")
    if any(member.alias or member.validation_alias for member in model.model_fields.values()):
        raise Unsupported(f"{model.__name__} has members with an alias")
    return _Query(_Field(field, ("query",)), model)


def _header(scope: Scope, name: bytes) -> Any:
    for given, value in scope["headers"]:
        if given == name:
            return value.decode("latin-1")
    return _ABSENT


def _is_list(annotation: Any) -> bool:
    """Whether a value may be a collection."""
    kinds = (kind for each in (annotation, *get_args(annotation)) for kind in (each, get_origin(each)))
    return any(
        isinstance(kind, type) and issubclass(kind, Collection) and not issubclass(kind, _TEXT) for kind in kinds
    )


def _is_model(annotation: Any) -> bool:
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in (annotation, *get_args(annotation)))


async def _json(request: Request) -> Any:
    try:
        return await request.json() if await request.body() else _ABSENT
    except JSONDecodeError as error:
        invalid = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "input": {}}
        raise RequestValidationError([{**invalid, "ctx": {"error": error.msg}}], body=error.doc) from error
