"""Compiled calls of handlers: path, query, headers, JSON body and dependencies, as FastAPI would resolve them."""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from http import HTTPStatus
from inspect import iscoroutinefunction, isfunction, ismethod, unwrap
from json import JSONDecodeError
from types import NoneType
from typing import Any, Final, NamedTuple, get_type_hints

from fastapi import Request, Response
from fastapi.datastructures import DefaultPlaceholder
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import EndpointContext, RequestValidationError
from fastapi.params import Body
from fastapi.routing import _extract_endpoint_context, serialize_response
from fastapi.security import SecurityScopes
from fastapi.utils import is_body_allowed_for_status_code
from starlette.exceptions import HTTPException

from backend.web.parameters import ABSENT, Errors, Field, QueryModel, Unsupported, Values, is_scalar, query_model
from backend.web.request_state import request_state

Call = Callable[..., Awaitable[Any]]
RawHeaders = Sequence[tuple[bytes, bytes]]
# The members of FastAPI's dependency model that this module takes into account.
_TRAITS: Final = frozenset({
    "path_params", "query_params", "header_params", "cookie_params", "body_params", "dependencies", "name", "call",
    "request_param_name", "websocket_param_name", "http_connection_param_name", "response_param_name",
    "background_tasks_param_name", "security_scopes_param_name", "own_oauth_scopes", "parent_oauth_scopes",
    "use_cache", "path", "scope", "concurrency",
})  # fmt: skip


class _Step(NamedTuple):
    """The arguments of one function. `needs`: the numbers of the steps of its dependencies.

    `caller`, `request` and `scopes`: the parameters for the caller, the request and FastAPI's SecurityScopes.
    """

    call: Call
    scope: str | None
    needs: Sequence[int]
    results: Sequence[tuple[int, str]]  # of dependencies, and the parameters for them
    caller: Sequence[str]
    request: Sequence[str]
    scopes: Sequence[str]
    path: Sequence[Field]
    query: QueryModel | None
    headers: Sequence[tuple[bytes, Field]]
    body: Field | None
    has_input: bool  # one of the last four

    def values(
        self, request: Request, query: bytes, headers: RawHeaders, body: Any, results: Sequence[Any]
    ) -> tuple[Values, Errors]:
        values: Values = dict.fromkeys(self.request, request)
        errors: Errors = []
        for name in self.caller:
            values[name] = request_state(request.scope).caller
        for name in self.scopes:
            values[name] = SecurityScopes()
        for number, name in self.results:
            values[name] = results[number]
        if self.has_input:
            for field in self.path:
                text = request.path_params.get(field.loc[1])
                field.read(ABSENT if text is None else text, values, errors)
            if self.query is not None:
                self.query.read(query, values, errors)
            for key, field in self.headers:
                field.read(_header(headers, key), values, errors)
            if self.body is not None:
                self.body.read(body, values, errors)
        return values, errors


class Arguments:
    """The compiled call of one handler. Raises Unsupported for a handler that only FastAPI can call.

    Handlers return a Response; with 204 and a plain Response as the response class they may return None.
    """

    def __init__(self, route: Any, requirement: type[Any] | None = None) -> None:
        """`route`: an effective route of FastAPI. `requirement`: the class of dependencies that it has enforced."""
        dependant: Dependant = route.dependant
        steps: list[_Step] = []
        handler = _step(dependant, steps, requirement)
        self._route = route
        self._handler = handler
        self._dependencies = steps
        self._is_empty = route.status_code == HTTPStatus.NO_CONTENT and route.response_class is Response
        if any(step.body for step in self._dependencies):
            raise Unsupported(f"{handler.call!r} has a dependency that reads the body")
        if not _value(route.strict_content_type):
            raise Unsupported(f"{handler.call!r} accepts a body without a content type")
        try:
            returned = get_type_hints(handler.call).get("return")
        except (NameError, TypeError) as error:
            raise Unsupported(f"{handler.call!r} has annotations that cannot be resolved") from error
        kinds = (Response, NoneType) if self._is_empty else Response
        if not (isinstance(returned, type) and issubclass(returned, kinds)):
            raise Unsupported(f"{handler.call!r} returns something other than a Response")

    async def call(self, request: Request) -> Response:
        """Call the handler and return its response. Raises what `of` raises, and errors of the handler."""
        result = await self._handler.call(**await self.of(request))
        if isinstance(result, Response):
            return result
        if result is None and self._is_empty:
            return Response(status_code=204)
        return await self._serialized(result, request)

    async def of(self, request: Request) -> Values:
        """The arguments for a request. Raises RequestValidationError with all errors, and errors of dependencies."""
        body = ABSENT if self._handler.body is None else await self._body(request)
        # FastAPI reads both before it calls the first dependency, which may replace them.
        query, headers = request.scope["query_string"], request.scope["headers"]
        results: list[Any] = []
        invalid: dict[int, Errors] = {}  # steps with errors, or whose dependencies have some; they are not called
        for step in self._dependencies:
            values, errors = step.values(request, query, headers, body, results)
            if errors or (invalid and not invalid.keys().isdisjoint(step.needs)):
                invalid[len(results)] = errors
                results.append(None)
            else:
                results.append(await step.call(**values))
        values, errors = self._handler.values(request, query, headers, body, results)
        if errors or invalid:
            errors = [*self._errors(self._handler, invalid), *errors]
            raise self._invalid(request, errors, None if body is ABSENT else body)
        return values

    def _errors(self, step: _Step, invalid: Mapping[int, Errors]) -> Iterator[Any]:
        """The errors of the dependencies of a step. FastAPI reports them once for each use of a dependency."""
        for number in step.needs:
            if number in invalid:
                yield from self._errors(self._dependencies[number], invalid)
                yield from map(dict, invalid[number])

    async def _body(self, request: Request) -> Any:
        is_json = _is_json(request.scope["headers"])
        try:
            body = await request.body()
            if not body:
                return ABSENT
            return await request.json() if is_json else body
        except JSONDecodeError as error:
            invalid = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "input": {}}
            raise self._invalid(request, [{**invalid, "ctx": {"error": error.msg}}], error.doc) from error
        except HTTPException:
            raise
        except Exception as error:  # as FastAPI: a client that disconnects, and text that is no UTF-8
            raise HTTPException(400, "There was an error parsing the body") from error

    def _invalid(self, request: Request, errors: Errors, body: Any) -> RequestValidationError:
        return RequestValidationError(errors, body=body, endpoint_ctx=self._context(request))

    def _context(self, request: Request) -> EndpointContext:
        """Where the handler is defined, for messages of errors."""
        context = _extract_endpoint_context(self._handler.call)
        context["path"] = f"{request.method} {self._route.dependant.path}"
        return context

    async def _serialized(self, result: Any, request: Request) -> Response:
        """FastAPI's response for a result that is no Response, although the handler's annotation says so."""
        route = self._route
        is_json = route.response_field is not None and isinstance(route.response_class, DefaultPlaceholder)
        content = await serialize_response(
            field=route.response_field,
            response_content=result,
            include=route.response_model_include,
            exclude=route.response_model_exclude,
            by_alias=route.response_model_by_alias,
            exclude_unset=route.response_model_exclude_unset,
            exclude_defaults=route.response_model_exclude_defaults,
            exclude_none=route.response_model_exclude_none,
            endpoint_ctx=self._context(request),
            dump_json=is_json,
        )
        options = {"status_code": route.status_code} if route.status_code else {}
        response: Response = (
            Response(content, media_type="application/json", **options)
            if is_json
            else _value(route.response_class)(content, **options)
        )
        if not is_body_allowed_for_status_code(response.status_code):
            response.body = b""
        return response


def _add(dependant: Dependant, steps: list[_Step], requirement: type[Any] | None) -> int:
    """Add a dependency after its own dependencies and return the number of its step. Each is called once."""
    for number, step in enumerate(steps):
        if (step.call, step.scope) == (dependant.call, dependant.scope):
            _require_known_traits(dependant)
            return number
    steps.append(_step(dependant, steps, requirement))
    return len(steps) - 1


def _step(dependant: Dependant, steps: list[_Step], requirement: type[Any] | None) -> _Step:
    """The step of a function, after its dependencies have been added to `steps`."""
    call = _require_known_traits(dependant)
    if not all(map(is_scalar, (*dependant.path_params, *dependant.header_params))):
        raise Unsupported(f"{call!r} has a path parameter or header with more than one value")
    query = [query_model(field) for field in dependant.query_params]
    body = [Field(field, ("body",)) for field in dependant.body_params]
    if len(query) > 1 or len(body) > 1:
        raise Unsupported(f"{call!r} has several models for the query or the body")
    if not all(map(_is_whole_body, dependant.body_params)):
        raise Unsupported(f"{call!r} has a form, or a member of the body, as a parameter")
    callers = [each.name for each in dependant.dependencies if _is_caller(each, requirement)]
    called = [each for each in dependant.dependencies if not _is_caller(each, requirement)]
    needs = [(_add(each, steps, requirement), each.name) for each in called]
    return _Step(
        call=call,
        scope=dependant.scope,
        needs=[number for number, _ in needs],
        results=[(number, name) for number, name in needs if name is not None],
        caller=[name for name in callers if name],
        request=[name for name in (dependant.request_param_name, dependant.http_connection_param_name) if name],
        scopes=[name for name in (dependant.security_scopes_param_name,) if name],
        path=[Field(field, ("path", field.alias)) for field in dependant.path_params],
        query=query[0] if query else None,
        headers=[
            (field.alias.lower().encode("latin-1"), Field(field, ("header", field.alias)))
            for field in dependant.header_params
        ],
        body=body[0] if body else None,
        has_input=bool(dependant.path_params or query or dependant.header_params or body),
    )


def _require_known_traits(dependant: Dependant) -> Call:
    """The function of a dependency or handler. Raises Unsupported for traits that only FastAPI knows."""
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
    return call


def _is_caller(dependant: Dependant, requirement: type[Any] | None) -> bool:
    """Whether the value is the caller, whom the route has authorized with the scopes of the dependency.

    A subclass is a dependency like others, because it may make checks of its own.
    """
    return type(dependant.call) is requirement and dependant.concurrency is None


def _is_plain_coroutine(call: Call) -> bool:
    """Whether FastAPI would only await it: it is no generator, class or sync function, and has no decorator.

    FastAPI caches results by function, so it needs a hash.
    """
    function = call if isfunction(call) or ismethod(call) else type(call).__call__
    is_hashable = type(call).__hash__ is not None
    return iscoroutinefunction(function) and unwrap(call) is call and unwrap(function) is function and is_hashable


def _is_whole_body(field: Any) -> bool:
    """Whether the JSON document itself is the value: no form, no member of the document, no default to validate."""
    info = field.field_info
    return type(info) is Body and not info.embed and not info.validate_default


def _header(headers: RawHeaders, name: bytes) -> Any:
    for given, value in headers:
        if given == name:
            return value.decode("latin-1")
    return ABSENT


def _is_json(headers: RawHeaders) -> bool:
    """Whether the content type is JSON, as FastAPI reads it."""
    given = _header(headers, b"content-type")
    if given is ABSENT or given == "application/json":
        return given is not ABSENT
    kind, _, subtype = given.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and "/" not in subtype and (subtype == "json" or subtype.endswith("+json"))


def _value(option: Any) -> Any:
    """The value of an option of a route, whether it is set or a default."""
    return option.value if isinstance(option, DefaultPlaceholder) else option
