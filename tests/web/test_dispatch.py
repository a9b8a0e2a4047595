"""Compiled routes support FastAPI's documented features: dependencies, overrides, order, removal, prefixes."""

import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Body, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import SecurityScopes
from pydantic import BaseModel
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from backend.auth import BearerRoute, CurrentPrincipal, Principal, Requirement, current_principal, judge
from backend.auth.testing import LocalIssuer
from backend.settings import Settings
from backend.tasks.router import batch_router, router, tags_router
from backend.users import auth
from backend.users.caller import Caller, CallerRequirement, CallerRoute, Permission
from backend.web.application import Application
from backend.web.arguments import Arguments
from tests.conftest import Api, Person, running

LIST = "/api/v1/tasks"
TASK = "/api/v1/tasks/00000000-0000-4000-8000-000000000000"
Refusal = Callable[..., Any]


def refuse() -> None:
    raise HTTPException(418)


async def refuse_async() -> None:
    raise HTTPException(418)


async def refuse_in_a_generator(request: Request) -> AsyncIterator[None]:
    if request.url.path.startswith("/"):
        raise HTTPException(418)
    yield


REFUSALS = [refuse, refuse_async, refuse_in_a_generator]


async def replacement(_: Request) -> Response:
    return PlainTextResponse("replaced")


async def authorized_replacement(_: auth.Person) -> Response:
    return PlainTextResponse("replaced")


def remove_task_routes(app: FastAPI) -> None:
    """Remove the task routes from the application."""
    removed = (router, batch_router, tags_router)
    app.router.routes[:] = [each for each in app.router.routes if getattr(each, "original_router", None) not in removed]


def include_again(app: FastAPI, **options: Any) -> None:
    """Include the task routes with other options."""
    remove_task_routes(app)
    app.include_router(router, **options)


def include_nested(app: FastAPI, **options: Any) -> None:
    """Include the task routes in a router with these options."""
    remove_task_routes(app)
    outer = APIRouter(**options)
    outer.include_router(router)
    app.include_router(outer)


async def statuses(person: Person) -> list[int]:
    """The statuses of a list, of a task that does not exist, and of a create."""
    asked = (person.get(LIST), person.get(TASK), person.post(LIST, {"title": "a"}))
    return [(await each).status_code for each in asked]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the paths of requests that compiled routes answer."""
    paths: list[str] = []
    answer = CallerRoute.answer

    async def record(
        route: CallerRoute, permission: Permission, arguments: Arguments, scope: Scope, receive: Receive, send: Send
    ) -> None:
        paths.append(scope["path"])
        await answer(route, permission, arguments, scope, receive, send)

    monkeypatch.setattr(CallerRoute, "answer", record)
    return paths


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("include_routes", [include_again, include_nested])
async def test_dependencies_of_include_router_run(
    settings: Settings, issuer: LocalIssuer, include_routes: Callable[..., None], refusal: Refusal
) -> None:
    change = partial(include_routes, dependencies=[Depends(refusal)])
    async with running(settings, issuer, change=change) as api:
        assert await statuses(api.person()) == [418, 418, 418]
        assert (await api.person().get("/api/v1/users/me")).status_code == 200


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_dependencies_of_the_application_run(
    settings: Settings, issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    monkeypatch.setattr("backend.app.Application", partial(Application, dependencies=[Depends(refusal)]))
    async with running(settings, issuer) as api:
        assert await statuses(api.person()) == [418, 418, 418]


async def test_routes_with_async_dependencies_are_compiled(
    settings: Settings, issuer: LocalIssuer, compiled: list[str]
) -> None:
    async with running(settings, issuer, change=partial(include_again, dependencies=[Depends(refuse_async)])) as api:
        assert await statuses(api.person()) == [418, 418, 418]
    assert compiled == [LIST, TASK, LIST]


class OnlyReads(CallerRequirement):
    """A requirement of a fork, with a check of its own."""

    async def __call__(self, request: Request, security_scopes: SecurityScopes) -> Caller:  # type: ignore[override]  # as its base
        caller = await super().__call__(request, security_scopes)
        if request.method != "GET":
            raise HTTPException(418)
        return caller


async def test_a_subclass_of_the_requirement_makes_its_own_checks(settings: Settings, issuer: LocalIssuer) -> None:
    async def subject(caller: Annotated[Caller, Depends(OnlyReads(session_only=True))]) -> Response:
        return PlainTextResponse(caller.principal.subject)

    added = APIRouter(route_class=CallerRoute)
    added.api_route("/subject", methods=["GET", "POST"])(subject)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        ada = api.person()
        assert (await ada.get("/subject")).status_code == 200
        assert (await ada.post("/subject", {})).status_code == 418


class Refusing(Requirement):
    """A dependency of a fork that the route does not enforce."""

    async def __call__(self, _: Request) -> Principal:  # type: ignore[override]  # as its base
        raise HTTPException(418)


async def test_only_the_dependency_that_the_route_enforces_is_not_called(
    settings: Settings, issuer: LocalIssuer
) -> None:
    async def subject(caller: auth.Person, _: Annotated[Principal, Depends(Refusing())]) -> Response:
        return PlainTextResponse(caller.principal.subject)

    added = APIRouter(route_class=CallerRoute)
    added.get("/subject")(subject)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        assert (await api.person().get("/subject")).status_code == 418


async def test_another_prefix_replaces_the_old_path(
    settings: Settings, issuer: LocalIssuer, compiled: list[str]
) -> None:
    async with running(settings, issuer, change=partial(include_again, prefix="/v2")) as api:
        ada = api.person()
        assert await statuses(ada) == [404, 404, 404]
        task = (await ada.post(f"/v2{LIST}", {"title": "a"})).json()
        assert (await ada.get(f"/v2{LIST}/{task['id']}")).json() == task
    assert compiled == [f"/v2{LIST}", f"/v2{LIST}/{task['id']}"]


async def test_a_removed_route_is_not_found(settings: Settings, issuer: LocalIssuer) -> None:
    async with running(settings, issuer, change=remove_task_routes) as api:
        assert await statuses(api.person()) == [404, 404, 404]


async def test_routes_can_be_removed_and_added_at_run_time(settings: Settings, issuer: LocalIssuer) -> None:
    async with running(settings, issuer) as api:
        ada = api.person()
        assert await statuses(ada) == [200, 404, 201]
        remove_task_routes(api.app)
        assert await statuses(ada) == [404, 404, 404]
        api.app.include_router(router, dependencies=[Depends(refuse)])
        assert await statuses(ada) == [418, 418, 418]
        api.app.router.routes.insert(0, APIRoute(LIST, replacement))
        assert (await ada.get(LIST)).text == "replaced"


async def test_a_route_can_be_replaced_by_an_equal_one_at_run_time(
    settings: Settings, issuer: LocalIssuer, compiled: list[str]
) -> None:
    first = CallerRoute("/found", authorized_replacement, methods=["GET"])
    refusing = CallerRoute("/found", authorized_replacement, methods=["GET"], dependencies=[Depends(refuse_async)])
    assert first == refusing
    async with running(settings, issuer, change=insert_first(first)) as api:
        assert (await api.person().get("/found")).text == "replaced"
        api.app.router.routes[0] = refusing
        assert (await api.person().get("/found")).status_code == 418
    assert compiled == ["/found", "/found"]


async def test_an_included_router_can_get_routes_at_run_time(
    settings: Settings, issuer: LocalIssuer, compiled: list[str]
) -> None:
    added = APIRouter(route_class=CallerRoute)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        assert (await api.person().get("/later")).status_code == 404
        added.get("/later")(authorized_replacement)
        assert (await api.person().get("/later")).text == "replaced"
    assert compiled == ["/later"]


def insert_first(route: Any) -> Callable[[FastAPI], None]:
    return lambda app: app.router.routes.insert(0, route)


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        (APIRoute(LIST, replacement), [200, 404, 201]),
        (APIRoute("/api/{rest:path}", replacement), [200, 200, 201]),
        (APIRoute("/api/v1/{part}", replacement), [200, 404, 201]),
        (APIRoute("/api/v1/{part}/{id}", replacement), [200, 200, 201]),
        (APIRoute(TASK, replacement), [200, 200, 201]),
        (APIRoute("/elsewhere/{id}", replacement), [200, 404, 201]),
        (Mount("/api/v1/tasks", PlainTextResponse("replaced")), [200, 200, 201]),
        (Mount("/elsewhere", PlainTextResponse("replaced")), [200, 404, 201]),
    ],
)
async def test_the_first_registered_route_answers(
    settings: Settings, issuer: LocalIssuer, route: Any, expected: list[int]
) -> None:
    async with running(settings, issuer, change=insert_first(route)) as api:
        ada = api.person()
        assert await statuses(ada) == expected
        was_replaced = [(await ada.get(path)).text == "replaced" for path in (LIST, TASK)]
    assert was_replaced == [bool(route.path_regex.match(LIST)), expected[1] == 200]


async def test_routes_with_the_same_path_answer_their_own_methods(settings: Settings, issuer: LocalIssuer) -> None:
    async def both(_: auth.Person) -> Response:
        return PlainTextResponse("both")

    async def any_name(_: auth.Person) -> Response:
        return PlainTextResponse("any name")

    added = APIRouter(route_class=CallerRoute)
    added.get("/found/one")(authorized_replacement)
    added.api_route("/found/one", methods=["GET", "POST"])(both)
    added.post("/found/{name}")(any_name)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        ada = api.person()
        assert (await ada.get("/found/one")).text == "replaced"
        assert (await ada.post("/found/one", {})).text == "both"
        assert (await ada.post("/found/two", {})).text == "any name"


class Named(BaseModel):
    name: str


async def test_an_embedded_body_is_read(settings: Settings, issuer: LocalIssuer) -> None:
    async def embedded(_: auth.Person, named: Annotated[Named, Body(embed=True)]) -> Response:
        return PlainTextResponse(named.name)

    added = APIRouter(route_class=CallerRoute)
    added.post("/embedded")(embedded)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        answer = await api.person().post("/embedded", {"named": {"name": "Ada"}})
    assert (answer.status_code, answer.text) == (200, "Ada")


class Stamped(CallerRoute):
    """A custom route class as in FastAPI's documentation."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def stamp(request: Request) -> Response:
            response = await answer(request)
            response.headers["X-Stamp"] = "stamped"
            return response

        return stamp


async def test_a_custom_route_class_uses_its_own_handler(settings: Settings, issuer: LocalIssuer) -> None:
    added = APIRouter(route_class=Stamped)
    added.get("/stamped")(authorized_replacement)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        assert (await api.person().get("/stamped")).headers["X-Stamp"] == "stamped"
        assert (await api.http.get("/stamped")).status_code == 401


class RefusingHandler(APIRoute):
    """A mixin that `super()` of CallerRoute finds before FastAPI's class."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def refuse(_: Request) -> Response:
            raise HTTPException(418)

        return refuse


class RefusingHandle(APIRoute):
    async def handle(self, *_: Any) -> None:
        raise HTTPException(418)


class MixedHandler(CallerRoute, RefusingHandler):
    pass


class MixedHandle(CallerRoute, RefusingHandle):
    pass


class OwnHandle(RefusingHandle, CallerRoute):
    pass


class Configured(CallerRoute):
    """Defines what compiled routes use, too."""

    body_limit: int = 100

    async def authorize(self, request: Request, permission: Permission) -> Caller:
        return await super().authorize(request, permission)


@pytest.mark.parametrize("route_class", [MixedHandler, MixedHandle, OwnHandle])
async def test_a_mixin_of_a_route_class_is_used(
    settings: Settings, issuer: LocalIssuer, route_class: type[APIRoute]
) -> None:
    added = APIRouter(route_class=route_class)
    added.get("/mixed")(authorized_replacement)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        assert (await api.person().get("/mixed")).status_code == 418


async def refuse_all(*_: Any) -> None:
    raise HTTPException(418)


@pytest.mark.parametrize("name", ["app", "handle"])
async def test_an_edited_route_is_not_compiled(settings: Settings, issuer: LocalIssuer, name: str) -> None:
    route = CallerRoute("/edited", authorized_replacement, methods=["GET"])
    setattr(route, name, refuse_all)
    async with running(settings, issuer, change=insert_first(route)) as api:
        assert (await api.person().get("/edited")).status_code == 418


async def test_a_route_class_with_another_limit_and_authorization_is_compiled(
    settings: Settings, issuer: LocalIssuer, compiled: list[str]
) -> None:
    added = APIRouter(route_class=Configured)
    added.get("/configured")(authorized_replacement)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        assert (await api.person().get("/configured")).text == "replaced"
    assert compiled == ["/configured"]


async def test_a_handler_can_use_url_for(settings: Settings, issuer: LocalIssuer) -> None:
    async def where(request: Request, _: auth.Person) -> Response:
        return PlainTextResponse(str(request.url_for("where")))

    added = APIRouter(route_class=CallerRoute)
    added.get("/where")(where)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        assert (await api.person().get("/where")).text == "http://localhost:8000/where"


def principal_of(**claims: Any) -> Principal:
    now = time.time()
    known = {"sub": "faked", "iss": "http://issuer.test", "iat": now, "exp": now + 60, "email": "faked@example.com"}
    return Principal.from_claims({**known, **claims}, is_access_token=False)


def plain() -> Principal:
    return principal_of()


async def with_dependencies(request: Request, other: Annotated[Principal, Depends(plain)]) -> Principal:
    assert request.method in ("GET", "POST")
    return other


async def with_cleanup() -> AsyncIterator[Principal]:
    yield principal_of()


def override_principal(monkeypatch: pytest.MonkeyPatch, app: FastAPI, override: Callable[..., Any]) -> None:
    monkeypatch.setattr(app, "dependency_overrides", {current_principal: override})


@pytest.mark.parametrize("override", [plain, with_dependencies, with_cleanup])
async def test_overriding_the_principal_fakes_the_caller(
    api: Api, monkeypatch: pytest.MonkeyPatch, override: Callable[..., Any]
) -> None:
    override_principal(monkeypatch, api.app, override)
    created = await api.http.post(LIST, json={"title": "replaced"})
    assert created.status_code == 201, created.text
    assert created.json() in (await api.http.get(LIST)).json()["items"]
    assert (await api.http.get("/api/v1/users/me")).json()["email"] == "faked@example.com"
    assert (await api.http.get("/api/v1/admin/users")).status_code == 403


async def test_a_banned_principal_of_an_override_is_refused(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    override_principal(monkeypatch, api.app, lambda: principal_of(banned=True))
    assert (await api.http.get(LIST)).status_code == 403


async def test_an_override_can_have_required_parameters(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_header(name: Annotated[str, Header()]) -> Principal:
        return principal_of(sub=name)

    override_principal(monkeypatch, api.app, by_header)
    assert (await api.http.get(LIST)).status_code == 422
    assert (await api.http.get(LIST, headers={"Name": "grace"})).status_code == 200


@pytest.mark.parametrize("route_class", [APIRoute, BearerRoute])
async def test_an_override_fakes_the_caller_in_any_application(route_class: type[APIRoute]) -> None:
    """It needs neither a lifespan nor an issuer."""
    app = FastAPI()
    router = APIRouter(route_class=route_class)

    @router.get("/subject")
    async def subject(principal: CurrentPrincipal) -> str:
        return principal.subject

    app.include_router(router)
    app.dependency_overrides[current_principal] = plain
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        assert (await http.get("/subject")).json() == "faked"


@pytest.mark.parametrize("override", [plain, with_dependencies, with_cleanup])
async def test_an_override_fakes_the_principal_in_a_plain_starlette_route(override: Callable[..., Any]) -> None:
    async def subject(request: Request) -> Response:
        return PlainTextResponse((await judge(request)).subject)

    app = FastAPI()
    app.router.routes.append(Route("/subject", subject))
    app.dependency_overrides[current_principal] = override
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        assert (await http.get("/subject")).text == "faked"
