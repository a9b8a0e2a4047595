"""Compiled dispatch gives the same responses as FastAPI's own dispatch."""

from dataclasses import dataclass, fields
from itertools import product
from pkgutil import resolve_name
from time import time
from typing import Annotated, Any
from uuid import uuid4

import pytest
from fastapi import APIRouter, Body, Cookie, Depends, Header, Query, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from backend.app import ROUTERS
from backend.auth import forbidden
from backend.auth.testing import LocalIssuer
from backend.settings import Settings
from backend.tasks.service import TaskService
from backend.users import auth
from backend.users.caller import CallerRoute, Permission
from backend.web.arguments import Arguments
from backend.web.dispatch import _Table
from backend.web.parameters import Unsupported, cacheable
from backend.web.problems import NotFound
from tests.conftest import Api, Person, running


def unused() -> None:
    """A dependency of no route. Any override switches compiled dispatch off."""


async def does_nothing() -> None:
    """A dependency that dispatch compiles."""


async def send(person: Person, method: str, url: str, headers: dict[str, str], body: bytes | None) -> tuple[Any, ...]:
    content_type = {"Content-Type": "application/json"} if body is not None else {}
    answer = await person.request(
        method, url, headers={"X-Request-ID": "same", **content_type, **headers}, content=body
    )
    headers_sent = {name: sorted(value.split(", ")) for name, value in answer.headers.items() if name != "ratelimit"}
    return answer.status_code, headers_sent, answer.content


async def test_dependency_overrides_are_used(settings: Settings, issuer: LocalIssuer) -> None:
    async def word() -> str:
        return "own"

    async def get_word(_: auth.Person, found: Annotated[str, Depends(word)]) -> Response:
        return Response(found)

    router = APIRouter(route_class=CallerRoute)
    router.get("/word")(get_word)
    async with running(settings, issuer, change=lambda app: app.include_router(router)) as api:
        ada = api.person()
        assert (await ada.get("/word")).text == "own"
        api.app.dependency_overrides[word] = lambda: "overridden"
        assert (await ada.get("/word")).text == "overridden"


class CustomError(Exception):
    """An error of code that a fork adds."""


def handle_custom_error(_: Request, error: Exception) -> Response:
    return Response(f"custom: {error}", 400, media_type="text/plain")


async def answer_gone(_: Request, __: Exception) -> Response:
    return Response("removed", 410)


ADDED: dict[int | type[Exception], Any] = {CustomError: handle_custom_error, 403: answer_gone}


@pytest.mark.parametrize(
    ("error", "added", "status"),
    [
        (CustomError("indeed"), ADDED, 400),
        (CustomError("indeed"), {}, 500),
        (forbidden("no"), ADDED, 410),
        (forbidden("no"), {}, 403),
        (NotFound(), ADDED, 404),
        (RuntimeError("secret"), ADDED, 500),
        (RuntimeError("secret"), {500: answer_gone}, 410),
        (RuntimeError("secret"), {Exception: answer_gone}, 410),
        (HTTPException(500), {500: answer_gone}, 500),
    ],
)
async def test_both_dispatchers_use_added_exception_handlers(
    api: Api,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    added: dict[int | type[Exception], Any],
    status: int,
) -> None:
    async def summary(_: object) -> None:
        raise error

    ada, found = api.person(), []
    monkeypatch.setattr(TaskService, "summary", summary)
    for kind, handler in added.items():
        monkeypatch.setitem(api.app.exception_handlers, kind, handler)
    monkeypatch.setattr(api.app, "middleware_stack", None)  # FastAPI reads its handlers when it builds the stack
    for overrides, encoding in product(({}, {unused: unused}), ("identity", "gzip")):
        monkeypatch.setattr(api.app, "dependency_overrides", overrides)
        caplog.clear()
        answer = await send(ada, "GET", "/api/v1/tasks/summary", {"Accept-Encoding": encoding}, None)
        logged = [record.getMessage().partition("\n")[0] for record in caplog.records if record.levelname == "ERROR"]
        found.append((*answer, logged))
    assert all(each == found[0] for each in found)
    *_, logged = found[0]
    assert found[0][0] == status
    unexpected = isinstance(error, RuntimeError) or (isinstance(error, CustomError) and not added)
    assert logged == ([f"unexpected {type(error).__name__}"] if unexpected else [])


async def test_both_dispatchers_run_added_middleware(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Recording:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope["path"])
            await self.app(scope, receive, send)

    monkeypatch.setattr(api.app, "middleware_stack", None)
    monkeypatch.setattr(api.app, "user_middleware", api.app.user_middleware[:])
    api.app.add_middleware(Recording)
    for path in "/api/v1/tasks/summary", "/livez":
        assert (await api.person().get(path)).status_code == 200
    assert seen == ["/api/v1/tasks/summary", "/livez"]


async def test_only_matching_requests_reach_compiled_routes(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    ada, paths = api.person(), []
    task = await ada.task()
    answer = CallerRoute.answer

    async def record(
        route: CallerRoute, permission: Permission, arguments: Arguments, scope: Scope, receive: Receive, send: Send
    ) -> None:
        paths.append(route.path)
        await answer(route, permission, arguments, scope, receive, send)

    monkeypatch.setattr(CallerRoute, "answer", record)
    for path in "/api/v1/tasks", f"/api/v1/tasks/{task['id']}", "/api/v1/users/me":
        assert (await ada.get(path)).status_code == 200
    assert paths == ["/api/v1/tasks", "/api/v1/tasks/{id:uuid}", "/api/v1/users/me"]
    for method, path in ("GET", "/api/v1/tasks/1"), ("PUT", "/api/v1/tasks"), ("GET", "/livez"):
        await ada.request(method, path)
    assert len(paths) == 3


class Paging(BaseModel):
    limit: int = 1


class Renamed(BaseModel):
    limit: int = Field(default=1, alias="most")


async def reads_a_cookie(key: Annotated[str, Cookie()]) -> Response:
    return Response(key)


async def reads_one_parameter(limit: int) -> Response:
    return Response(str(limit))


async def reads_two_models(a: Annotated[Paging, Query()], b: Annotated[Renamed, Query()]) -> Response:
    return Response(f"{a}{b}")


async def reads_an_alias(a: Annotated[Renamed, Query()]) -> Response:
    return Response(f"{a}")


async def reads_a_header_twice(key: Annotated[list[str] | None, Header()] = None) -> Response:
    return Response(f"{key}")


async def changes_the_response(response: Response) -> Response:
    return response


async def returns_a_model(limit: Annotated[Paging, Query()]) -> Paging:
    return limit


async def has_no_return_type(request: Request):  # type: ignore[no-untyped-def]  # noqa: ANN201
    return {"method": request.method}


async def returns_none() -> None:
    return


def is_sync(request: Request) -> Response:
    return Response(request.method)


async def depends_on_a_sync_function(_: Annotated[Response, Depends(is_sync)]) -> Response:
    return Response()


class Name(BaseModel):
    name: str


async def reads_a_body(name: Name) -> str:
    return name.name


async def depends_on_a_body(_: Annotated[str, Depends(reads_a_body)]) -> Response:
    return Response()


async def reads_an_embedded_body(name: Annotated[str, Body(embed=True)]) -> Response:
    return Response(name)


async def validates_the_default_of_a_body(name: Annotated[int, Body(validate_default=True)] = "1") -> Response:  # type: ignore[assignment]
    return Response(f"{name}")


async def validates_the_default_of_a_header(name: Annotated[int, Header(validate_default=True)] = "1") -> Response:  # type: ignore[assignment]
    return Response(f"{name}")


async def depends_without_cache(_: Annotated[Response, Depends(reads_a_cookie, use_cache=False)]) -> Response:
    return Response()


@pytest.mark.parametrize(
    "handler",
    [
        reads_a_cookie,
        reads_one_parameter,
        reads_two_models,
        reads_an_alias,
        reads_a_header_twice,
        changes_the_response,
        returns_a_model,
        has_no_return_type,
        returns_none,
        is_sync,
        depends_on_a_sync_function,
        depends_on_a_body,
        reads_an_embedded_body,
        validates_the_default_of_a_body,
        validates_the_default_of_a_header,
        depends_without_cache,
    ],
)
def test_unsupported_handlers_are_left_to_fastapi(handler: Any) -> None:
    router = APIRouter(route_class=CallerRoute)
    router.get("/")(handler)
    (route,) = router.routes
    assert isinstance(route, CallerRoute)
    with pytest.raises(Unsupported):
        Arguments(route)


@dataclass
class NewerDependant(Dependant):
    """As of a FastAPI with one more kind of dependency."""

    of_a_new_kind: bool = False


async def adds_nothing(_: Annotated[None, Depends(does_nothing)]) -> Response:
    return Response()


def newer(dependant: Dependant) -> Dependant:
    return NewerDependant(**{each.name: getattr(dependant, each.name) for each in fields(dependant)})


def test_an_unknown_kind_of_dependency_is_left_to_fastapi() -> None:
    route = CallerRoute("/", adds_nothing)
    Arguments(route)
    route.dependant.dependencies[0] = newer(route.dependant.dependencies[0])
    with pytest.raises(Unsupported, match="unknown kind"):
        Arguments(route)


def test_a_handler_of_an_unknown_kind_is_left_to_fastapi() -> None:
    route = CallerRoute("/", adds_nothing)
    route.dependant = newer(route.dependant)
    with pytest.raises(Unsupported, match="unknown kind"):
        Arguments(route)


@cacheable
class Frozen(Paging):
    model_config = ConfigDict(frozen=True)


class NotDeclared(Frozen):
    pass


@cacheable
class WithList(Frozen):
    names: list[str] = []


@cacheable
class WithTime(Frozen):
    read_at: float = Field(default_factory=time)


async def reads_a_list(page: Annotated[WithList, Query()]) -> Response:
    return Response(f"{page}")


async def reads_a_time(page: Annotated[WithTime, Query()]) -> Response:
    return Response(f"{page}")


async def reads_a_frozen_model(page: Annotated[Frozen, Query()]) -> Response:
    return Response(f"{page}")


async def reads_a_subclass(page: Annotated[NotDeclared, Query()]) -> Response:
    return Response(f"{page}")


async def reads_a_mutable_model(page: Annotated[Paging, Query()]) -> Response:
    return Response(f"{page}")


@pytest.mark.parametrize(
    ("handler", "query", "cached"),
    [
        (reads_a_frozen_model, "limit=2", True),
        (reads_a_frozen_model, f"limit={2:0256}", False),  # too long to be cached
        (reads_a_mutable_model, "limit=2", False),
        (reads_a_subclass, "limit=2", False),
        (reads_a_list, "limit=2&names=a", False),
        (reads_a_time, "limit=2", False),
    ],
)
async def test_a_frozen_query_model_is_cached_by_query_string(handler: Any, query: str, cached: bool) -> None:
    router = APIRouter(route_class=CallerRoute)
    router.get("/")(handler)
    (route,) = router.routes
    assert isinstance(route, CallerRoute)
    arguments = Arguments(route)

    async def page(query: str) -> Any:
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": query.encode()}
        return (await arguments.of(Request(scope)))["page"]

    first, other = await page(query), await page("limit=3")
    assert (first.limit, other.limit) == (2, 3)
    assert ((await page(query)) is first) is cached
    for _ in range(2):
        with pytest.raises(RequestValidationError):
            await page("limit=many")


async def test_every_route_of_the_project_is_compiled(api: Api) -> None:
    routes = [route for name in ROUTERS for route in resolve_name(name).routes if isinstance(route, CallerRoute)]
    assert len(routes) > 20
    table = _Table(api.app.router, CallerRoute)
    for route in routes:
        for method in route.methods or ():
            path = route.path.replace("{id:uuid}", str(uuid4()))
            found = table.find({"type": "http", "method": method, "path": path})
            assert found is not None, (method, path)
            assert found.route is route
