"""Compiled dispatch: finds a route and its arguments as FastAPI would, in a fraction of the time.

FastAPI takes longer to find a route and its arguments than the database takes for the statement, so both are compiled
for routes that use only supported features. FastAPI handles all others, and still declares, validates and documents all
routes. A test sends requests to every operation both ways.
"""

import logging
import re
from collections.abc import Iterator, Set
from http import HTTPStatus
from operator import is_
from typing import Any, Final, NamedTuple, Protocol, cast

from fastapi import APIRouter, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import RouteContext, iter_route_contexts
from starlette.convertors import Convertor
from starlette.routing import Mount, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.web import exceptions
from backend.web.arguments import Arguments, Call
from backend.web.parameters import Unsupported
from backend.web.start_up import start

logger = logging.getLogger(__name__)

# What a subclass or mixin of the route class may define: members that both ways use, and those of every class. Routes
# of any other class are not compiled.
_COMPILED_MEMBERS: Final = frozenset({
    "body_limit", "authorize", "__module__", "__doc__", "__dict__", "__weakref__", "__annotations__",
    "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__",
})  # fmt: skip


class Route(Protocol):
    """A route that can answer requests without FastAPI, given its permission and its compiled arguments.

    `requirement`: the class of dependencies that return the caller. `answer` enforces them, so they are not called.
    `built_app`: the `app` that FastAPI has made for the route.
    """

    requirement: type[Any]
    built_app: ASGIApp

    def permission(self, dependant: Dependant) -> Any: ...

    async def answer(
        self, permission: Any, arguments: Arguments, scope: Scope, receive: Receive, send: Send
    ) -> None: ...


class _Compiled(NamedTuple):
    """An effective route: with the prefixes and dependencies of its routers and the application."""

    route: Route
    endpoint: Call
    permission: Any
    arguments: Arguments
    methods: frozenset[str]
    pattern: re.Pattern[str]
    convertors: dict[str, Convertor[Any]]


class _Table:
    """The compiled routes of one application, in the order in which FastAPI would try them."""

    def __init__(self, router: APIRouter, kind: type[Any]) -> None:
        routers = list(_routers(router))
        self.compiled: list[_Compiled] = []
        self._router = router
        self._routers = routers
        self._routes = list(router.routes)
        self._versions = _versions(routers)
        self._fixed: dict[tuple[str, str], _Compiled] = {}
        self._rest: dict[str, list[_Compiled]] = {}
        self._overrides = router.dependency_overrides_provider
        if all(type(each) is APIRouter and each.middleware_stack == each.app for each in routers):
            self._compile(kind)

    def is_current(self) -> bool:
        """Whether no route was added, removed or replaced since. Routes that are equal may have other dependencies."""
        routes = self._router.routes
        is_same = len(routes) == len(self._routes) and all(map(is_, routes, self._routes))
        return is_same and self._versions == _versions(self._routers)

    def find(self, scope: Scope) -> _Compiled | None:
        """The compiled route of a request, with `scope` set as by FastAPI; None if FastAPI has to handle it."""
        method, path = scope["method"], scope["path"]
        found, parameters = self._fixed.get((method, path)), {}
        if found is None:
            if path[-1:] == "\n":
                return None  # the patterns of fixed paths match it, too
            for each in self._rest.get(method, ()):
                if match := each.pattern.match(path):
                    given = match.groupdict().items()
                    found, parameters = each, {name: each.convertors[name].convert(text) for name, text in given}
                    break
            else:
                return None
        scope.setdefault("router", self._router)  # that of an application around this one
        scope["route"] = found.route
        scope["endpoint"] = found.endpoint
        scope["path_params"] = {**scope.get("path_params", {}), **parameters}  # a Host route may have some
        return found

    def _compile(self, kind: type[Any]) -> None:
        """Add each supported route, unless an earlier one may match the same request."""
        before: list[RouteContext] = []
        opaque: list[RouteContext] = []
        for context in iter_route_contexts(self._routes):
            route = _compiled(context, kind, self._overrides)
            if route is None:
                opaque.append(context)
            elif not route.convertors:
                if any(_matches(each, route.methods, str(context.path)) for each in before):
                    opaque.append(context)  # it may still be the first that answers another of its methods
                else:
                    self.compiled.append(route)
                    self._fixed.update(((method, str(context.path)), route) for method in route.methods)
            elif any(_may_overlap(each, context) for each in opaque):
                opaque.append(context)
            else:
                self.compiled.append(route)
                for method in route.methods:
                    self._rest.setdefault(method, []).append(route)
            before.append(context)


def _routers(router: APIRouter) -> Iterator[APIRouter]:
    """The router and all routers that it includes, recursively."""
    yield router
    for route in router.routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from _routers(included)


def _versions(routers: list[APIRouter]) -> list[int]:
    """Numbers that grow with each route that is added to a router. FastAPI itself checks them, too."""
    return [each._routes_version for each in routers]  # noqa: SLF001  # the method that adds them up is slow


def _compiled(context: RouteContext, kind: type[Any], overrides: Any) -> _Compiled | None:
    """`overrides`: the application, whose `dependency_overrides` are looked at for each request."""
    route = context.original_route
    if not isinstance(route, kind) or context.max_body_size is not None:
        return None
    added = [each for each in type(route).__mro__ if each not in kind.__mro__]
    if not all(_COMPILED_MEMBERS.issuperset(vars(each)) for each in added):
        return None  # a custom route class
    if not vars(route).keys().isdisjoint(dir(type(route))):
        return None  # a method of its own
    if context.dependency_overrides_provider not in (None, overrides):
        return None
    compiled = cast(Route, route)
    if compiled.built_app is not route.app:
        return None  # another application answers
    try:
        arguments = Arguments(context, compiled.requirement)
    except Unsupported:
        return None
    return _Compiled(
        compiled,
        context.dependant.call,
        compiled.permission(context.dependant),
        arguments,
        frozenset(context.methods or ()),
        context.path_regex,
        context.param_convertors,
    )


def _matches(context: RouteContext, methods: Set[str], path: str) -> bool:
    """Whether a route matches one of these methods and a path. True if that is unknown."""
    pattern = getattr(context, "path_regex", None)
    own_methods: Set[str] | None = getattr(context, "methods", None)
    if isinstance(context.original_route, WebSocketRoute):
        return False
    if pattern is None:
        return True
    return bool(pattern.match(path)) and (own_methods is None or not own_methods.isdisjoint(methods))


def _may_overlap(context: RouteContext, other: RouteContext) -> bool:
    """Whether a route may match a request that `other`, whose path has parameters, matches too."""
    path, methods = getattr(context, "path", None), frozenset(other.methods or ())
    if path is None or isinstance(context.original_route, Mount) or "{" in path:
        prefix = None if path is None else path.partition("{")[0]
        other_prefix = str(other.path).partition("{")[0]
        is_apart = prefix is not None and not (prefix.startswith(other_prefix) or other_prefix.startswith(prefix))
        return not is_apart and not isinstance(context.original_route, WebSocketRoute)
    return _matches(context, methods, path) and bool(other.path_regex.match(path))


class CompiledRoutes:
    """The compiled routes of an application. They are compiled again after its routes have changed."""

    def __init__(self, app: FastAPI, kind: type[Any]) -> None:
        """`kind`: a route class with the methods of `Route`."""
        self._app = app
        self._kind = kind
        self._is_on = True
        self._table: _Table | None = None

    @property
    def is_possible(self) -> bool:
        """Whether the application itself has only supported features."""
        app = self._app
        return not app.debug and app.max_body_size is None and app.router.dependency_overrides_provider is app

    def start(self, *, is_on: bool) -> None:
        """Switch compiled dispatch on or off at start-up, and log the number of routes on each way."""
        self._is_on = is_on
        fast = len(self._current().compiled) if is_on and self.is_possible else 0
        every = sum(1 for _ in iter_route_contexts(self._app.router.routes))
        logger.info("routes: %d by fast dispatch, %d by FastAPI", fast, every - fast)

    def find(self, scope: Scope) -> _Compiled | None:
        """The compiled route of a request; None if FastAPI has to handle it."""
        return self._current().find(scope) if self._is_on else None

    def _current(self) -> _Table:
        table = self._table
        if table is None or not table.is_current():
            table = self._table = _Table(self._app.router, self._kind)
        return table


class Dispatch:
    """ASGI middleware in front of FastAPI: dispatches requests to compiled routes.

    FastAPI handles all other requests, and every request that is traced, while a dependency is overridden or the
    application is mounted under a path.
    """

    def __init__(self, app: ASGIApp, routes: CompiledRoutes) -> None:
        self._app = app
        self._routes = routes
        self._is_possible = routes.is_possible

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_plain = scope["type"] == "http" and "fastapi.telemetry" not in scope and not scope.get("root_path")
        is_fast = is_plain and self._is_possible and not scope["app"].dependency_overrides
        if is_fast and (found := self._routes.find(scope)) is not None:
            try:
                await found.route.answer(found.permission, found.arguments, scope, receive, send)
            except Exception as error:  # noqa: BLE001  # raised again unless it has a handler
                await exceptions.handle(error, scope, receive, send)
            return
        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._answer_head(scope, receive, send)
        elif scope["type"] == "lifespan":
            await start(self._app, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _answer_head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the route or mounted application for HEAD; without one, as GET (RFC 9110, section 9.3.2)."""
        is_refused = False

        async def send_unless_refused(message: Message) -> None:
            nonlocal is_refused
            if message["type"] == "http.response.start" and message["status"] == HTTPStatus.METHOD_NOT_ALLOWED:
                is_refused = "HEAD" not in (getattr(inner.get("route"), "methods", None) or ())
            if not is_refused:
                await send(message)

        inner = dict(scope)
        try:
            await self._app(inner, receive, send_unless_refused)
            if is_refused:
                inner = {**scope, "method": "GET", "headers_only": True}
                await self(inner, receive, send)
        finally:
            scope.update({**inner, **scope})  # route and principal, for the access log
