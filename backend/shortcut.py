"""The short way from a request to its handler: what FastAPI finds out anew at each request is found out once.

FastAPI declares, validates and describes routes and parameters as ever. Between a request and its handler it asks each
router for the route, and each parameter for its kind, which takes longer than to ask the database; here is the same for
such routes and parameters as this project has. A test asks every operation both ways.
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import lru_cache
from http import HTTPStatus
from inspect import iscoroutinefunction
from json import JSONDecodeError
from types import NoneType
from typing import Any, Final, NamedTuple, Protocol, get_args, get_origin, get_type_hints

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.convertors import Convertor
from starlette.datastructures import QueryParams
from starlette.types import ASGIApp, Receive, Scope, Send

Call = Callable[..., Awaitable[Any]]
Errors = list[Any]
Values = dict[str, Any]

MOST_QUERIES: Final = 256  # that are remembered for each route
LONGEST_QUERY: Final = 256  # bytes, of those

_ABSENT: Final = object()
_LISTS = (list, set, tuple)


class Route(Protocol):
    """What the short way leads to: a route of FastAPI's that can answer by itself."""

    path: str
    methods: set[str] | None
    path_regex: re.Pattern[str]
    param_convertors: dict[str, Convertor[Any]]

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class Shortcut:
    """Pure ASGI, in front of FastAPI.

    Whoever overrides dependencies, wants traces, or mounts the whole under a path goes FastAPI's own way, and so does
    what matches none of `routes`.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[Route]) -> None:
        self._app = app
        self._fixed: dict[tuple[str, str], Route] = {}
        self._rest: dict[str, list[Route]] = {}
        for route in routes:
            for method in route.methods or ():
                if route.param_convertors:
                    self._rest.setdefault(method, []).append(route)
                else:
                    self._fixed[method, route.path] = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_plain = scope["type"] == "http" and "fastapi.telemetry" not in scope and not scope.get("root_path")
        route = self._find(scope) if is_plain and not scope["app"].dependency_overrides else None
        await (self._app if route is None else route.answer)(scope, receive, send)

    def _find(self, scope: Scope) -> Route | None:
        method, path = scope["method"], scope["path"]
        route = self._fixed.get((method, path))
        if route is not None:
            scope["route"] = route
            return route
        for route in self._rest.get(method, ()):
            match = route.path_regex.match(path)
            if match:
                given = match.groupdict().items()
                scope["path_params"] = {name: route.param_convertors[name].convert(text) for name, text in given}
                scope["route"] = route
                return route
        return None


class Unsupported(TypeError):
    """A handler asks for something that only FastAPI itself can give."""


class _Field(NamedTuple):
    """One parameter: FastAPI's field knows how to judge it, `loc` is where it stands."""

    field: Any
    loc: tuple[str, ...]

    def take(self, given: Any, values: Values, errors: Errors) -> None:
        field = self.field
        if given is _ABSENT:
            if field.field_info.is_required():
                errors.append({"type": "missing", "loc": self.loc, "msg": "Field required", "input": None})
            else:
                values[field.name] = field.default
            return
        taken, wrong = field.validate(given, {}, loc=self.loc)
        if wrong:
            errors.extend(wrong)
        else:
            values[field.name] = taken


class _Query:
    """A model whose members are the query parameters. One that is frozen is made once for each query string."""

    def __init__(self, field: _Field, model: type[BaseModel]) -> None:
        self._field = field
        self._names = frozenset(model.model_fields)
        self._lists = {name for name, member in model.model_fields.items() if _is_list(member.annotation)}
        self._remembered = lru_cache(MOST_QUERIES)(self._judge) if model.model_config.get("frozen") else self._judge

    def take(self, given: bytes, values: Values, errors: Errors) -> None:
        taken, wrong = (self._remembered if len(given) <= LONGEST_QUERY else self._judge)(given)
        values.update(taken)
        errors.extend(wrong)

    def _judge(self, given: bytes) -> tuple[Values, Errors]:
        values: Values = {}
        errors: Errors = []
        self._field.take(self._read(QueryParams(given)), values, errors)
        return values, errors

    def _read(self, given: QueryParams) -> Values:
        """Of what is repeated the last counts, unless a list is asked for, or nothing of that name."""
        found: Values = dict(given)
        if len(found) < len(given.multi_items()) or not self._lists.isdisjoint(found):
            for name in found:
                several = given.getlist(name)
                if name in self._lists or (len(several) > 1 and name not in self._names):
                    found[name] = several
        return found


class _Step(NamedTuple):
    """What one function asks for. `needs`: results of steps before, by their number, and what they are called here."""

    call: Call
    needs: Sequence[tuple[int, str | None]]
    request: Sequence[str]
    path: Sequence[_Field]
    query: _Query | None
    headers: Sequence[tuple[bytes, _Field]]
    body: _Field | None

    def values(self, request: Request, body: Any, results: Sequence[Any], errors: Errors) -> Values | None:
        """None: something is wrong, here or in a step before."""
        values: Values = dict.fromkeys(self.request, request)
        before, lacks = len(errors), False
        for number, name in self.needs:
            if results[number] is _ABSENT:
                lacks = True
            elif name is not None:
                values[name] = results[number]
        for field in self.path:
            field.take(request.path_params[field.loc[1]], values, errors)
        if self.query is not None:
            self.query.take(request.scope["query_string"], values, errors)
        for key, field in self.headers:
            field.take(_header(request.scope, key), values, errors)
        if self.body is not None:
            self.body.take(body, values, errors)
        return None if lacks or len(errors) > before else values


class Arguments:
    """The arguments of one handler. Raises Unsupported, of which FastAPI's own way is the cure.

    `status`: what it answers with, unless it says so itself. Of 204 alone no content is the whole of an answer.
    """

    def __init__(self, dependant: Dependant, status: int | None = None) -> None:
        steps: list[_Step] = []
        _add(dependant, steps)
        *self._dependencies, self._handler = steps
        if any(step.body for step in self._dependencies):
            raise Unsupported(f"{self._handler.call!r} depends on something that reads the body")
        answer = get_type_hints(self._handler.call).get("return")
        kinds = (Response, NoneType) if status == HTTPStatus.NO_CONTENT else Response
        if not (isinstance(answer, type) and issubclass(answer, kinds)):
            raise Unsupported(f"{self._handler.call!r} leaves it to FastAPI to make its answer")

    async def of(self, request: Request) -> Values:
        """Raises RequestValidationError, with all that is wrong, and whatever a dependency raises."""
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
    """Add what a function asks for, behind all that it depends on, and say which step it is. Each is called once."""
    call = dependant.call
    others = (
        dependant.cookie_params,
        dependant.websocket_param_name,
        dependant.response_param_name,
        dependant.background_tasks_param_name,
        dependant.security_scopes_param_name,
        dependant.concurrency,
        not dependant.use_cache,
    )
    if call is None or any(others) or not (iscoroutinefunction(call) or iscoroutinefunction(type(call).__call__)):
        raise Unsupported(f"{call!r} asks for more than a request, its path, query, headers and JSON, or is not async")
    for number, step in enumerate(steps):
        if step.call is call:
            return number
    if any(_is_list(field.field_info.annotation) for field in (*dependant.path_params, *dependant.header_params)):
        raise Unsupported(f"{call!r} takes a header several times")
    query = [_query(field) for field in dependant.query_params]
    body = [_Field(field, ("body",)) for field in dependant.body_params]
    if len(query) > 1 or len(body) > 1:
        raise Unsupported(f"{call!r} takes several models where one would say it all")
    needs = [(_add(each, steps), each.name) for each in dependant.dependencies]
    steps.append(
        _Step(
            call=call,
            needs=needs,
            request=[name for name in (dependant.request_param_name, dependant.http_connection_param_name) if name],
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


def _query(field: Any) -> _Query:
    model = field.field_info.annotation
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise Unsupported(f"the query parameter {field.name} stands outside of a model")
    if any(member.alias for member in model.model_fields.values()):
        raise Unsupported(f"{model.__name__} has members of two names")
    return _Query(_Field(field, ("query",)), model)


def _header(scope: Scope, name: bytes) -> Any:
    for given, value in scope["headers"]:
        if given == name:
            return value.decode("latin-1")
    return _ABSENT


def _is_list(annotation: Any) -> bool:
    return any(kind in _LISTS for each in (annotation, *get_args(annotation)) for kind in (each, get_origin(each)))


async def _json(request: Request) -> Any:
    try:
        return await request.json() if await request.body() else _ABSENT
    except JSONDecodeError as error:
        wrong = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "input": {}}
        raise RequestValidationError([{**wrong, "ctx": {"error": error.msg}}], body=error.doc) from error
