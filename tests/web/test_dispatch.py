"""What a fork does to routes and dependencies with FastAPI's documented features holds for compiled routes, too."""

import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Body, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.responses import PlainTextResponse
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from backend.auth import BearerRoute, CurrentPrincipal, Principal, current_principal
from backend.auth.testing import LocalIssuer
from backend.settings import Settings
from backend.tasks.router import batch_router, router, tags_router
from backend.users.caller import PersonRoute
from backend.web.application import Application
from backend.web.arguments import Arguments
from tests.conftest import Api, Person, running

LIST = "/api/v1/tasks"
TASK = "/api/v1/tasks/00000000-0000-4000-8000-000000000000"
Refuse = Callable[..., Any]


def refuse() -> None:
    raise HTTPException(418)


async def refuse_async() -> None:
    raise HTTPException(418)


async def refuse_in_a_generator(request: Request) -> AsyncIterator[None]:
    if request.url.path.startswith("/"):
        raise HTTPException(418)
    yield


REFUSALS = [refuse, refuse_async, refuse_in_a_generator]


async def mine(_: Request) -> Response:
    return PlainTextResponse("mine")


def take_out(app: FastAPI) -> None:
    """Remove the routes of tasks, as one removes them from a list."""
    ours = (router, batch_router, tags_router)
    app.router.routes[:] = [each for each in app.router.routes if getattr(each, "original_router", None) not in ours]


def include(app: FastAPI, **options: Any) -> None:
    """Include the routes of tasks in another way."""
    take_out(app)
    app.include_router(router, **options)


def include_deeper(app: FastAPI, **options: Any) -> None:
    take_out(app)
    outer = APIRouter(**options)
    outer.include_router(router)
    app.include_router(outer)


async def statuses(person: Person) -> list[int]:
    """Of routes with and without parameters in their path, and of one with a body."""
    asked = (person.get(LIST), person.get(TASK), person.post(LIST, {"title": "a"}))
    return [(await each).status_code for each in asked]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the requests that a compiled route answered."""
    paths: list[str] = []
    answer = PersonRoute.answer

    async def noted(route: PersonRoute, arguments: Arguments, scope: Scope, receive: Receive, send: Send) -> None:
        paths.append(scope["path"])
        await answer(route, arguments, scope, receive, send)

    monkeypatch.setattr(PersonRoute, "answer", noted)
    return paths


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("way", [include, include_deeper])
async def test_dependencies_of_an_inclusion_run(
    settings: Settings, issuer: LocalIssuer, way: Callable[..., None], refusal: Refuse
) -> None:
    change = partial(way, dependencies=[Depends(refusal)])
    async with running(settings, issuer, change=change) as api:
        assert await statuses(api.person()) == [418, 418, 418]
        assert (await api.person().get("/api/v1/users/me")).status_code == 200


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_dependencies_of_the_application_run(
    settings: Settings, issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch, refusal: Refuse
) -> None:
    monkeypatch.setattr("backend.app.Application", partial(Application, dependencies=[Depends(refusal)]))
    async with running(settings, issuer) as api:
        assert await statuses(api.person()) == [418, 418, 418]


async def test_an_async_dependency_of_an_inclusion_is_compiled(
    settings: Settings, issuer: LocalIssuer, compiled: list[str]
) -> None:
    async with running(settings, issuer, change=partial(include, dependencies=[Depends(refuse_async)])) as api:
        assert await statuses(api.person()) == [418, 418, 418]
    assert compiled == [LIST, TASK, LIST]


async def test_another_prefix_takes_the_place_of_the_old_path(
    settings: Settings, issuer: LocalIssuer, compiled: list[str]
) -> None:
    async with running(settings, issuer, change=partial(include, prefix="/v2")) as api:
        ada = api.person()
        assert await statuses(ada) == [404, 404, 404]
        task = (await ada.post(f"/v2{LIST}", {"title": "a"})).json()
        assert (await ada.get(f"/v2{LIST}/{task['id']}")).json() == task
    assert compiled == [f"/v2{LIST}", f"/v2{LIST}/{task['id']}"]


async def test_a_route_that_was_removed_is_not_there(settings: Settings, issuer: LocalIssuer) -> None:
    async with running(settings, issuer, change=take_out) as api:
        assert await statuses(api.person()) == [404, 404, 404]


async def test_routes_may_be_removed_and_added_while_it_runs(settings: Settings, issuer: LocalIssuer) -> None:
    async with running(settings, issuer) as api:
        ada = api.person()
        assert await statuses(ada) == [200, 404, 201]
        take_out(api.app)
        assert await statuses(ada) == [404, 404, 404]
        api.app.include_router(router, dependencies=[Depends(refuse)])
        assert await statuses(ada) == [418, 418, 418]
        api.app.router.routes.insert(0, APIRoute(LIST, mine))
        assert (await ada.get(LIST)).text == "mine"


async def test_a_router_that_is_included_may_grow_while_it_runs(settings: Settings, issuer: LocalIssuer) -> None:
    added = APIRouter(route_class=PersonRoute)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        assert (await api.person().get("/later")).status_code == 404
        added.get("/later")(mine)
        assert (await api.person().get("/later")).text == "mine"


def first(route: Any) -> Callable[[FastAPI], None]:
    return lambda app: app.router.routes.insert(0, route)


@pytest.mark.parametrize(
    ("route", "found"),
    [
        (APIRoute(LIST, mine), [200, 404, 201]),
        (APIRoute("/api/{rest:path}", mine), [200, 200, 201]),
        (APIRoute("/api/v1/{what}", mine), [200, 404, 201]),
        (APIRoute("/api/v1/{what}/{id}", mine), [200, 200, 201]),
        (APIRoute(TASK, mine), [200, 200, 201]),
        (APIRoute("/elsewhere/{id}", mine), [200, 404, 201]),
        (Mount("/api/v1/tasks", PlainTextResponse("mine")), [200, 200, 201]),
        (Mount("/elsewhere", PlainTextResponse("mine")), [200, 404, 201]),
    ],
)
async def test_a_route_that_was_registered_before_answers(
    settings: Settings, issuer: LocalIssuer, route: Any, found: list[int]
) -> None:
    async with running(settings, issuer, change=first(route)) as api:
        ada = api.person()
        assert await statuses(ada) == found
        was_mine = [(await ada.get(path)).text == "mine" for path in (LIST, TASK)]
    assert was_mine == [bool(route.path_regex.match(LIST)), found[1] == 200]


async def test_of_two_routes_with_one_path_each_answers_its_own_methods(
    settings: Settings, issuer: LocalIssuer
) -> None:
    async def both(_: Request) -> Response:
        return PlainTextResponse("both")

    async def any_name(_: Request) -> Response:
        return PlainTextResponse("any name")

    added = APIRouter(route_class=PersonRoute)
    added.get("/found/one")(mine)
    added.api_route("/found/one", methods=["GET", "POST"])(both)
    added.post("/found/{name}")(any_name)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        ada = api.person()
        assert (await ada.get("/found/one")).text == "mine"
        assert (await ada.post("/found/one", {})).text == "both"
        assert (await ada.post("/found/two", {})).text == "any name"


class Named(BaseModel):
    name: str


async def test_a_body_may_be_a_member_of_the_document(settings: Settings, issuer: LocalIssuer) -> None:
    async def embedded(named: Annotated[Named, Body(embed=True)]) -> Response:
        return PlainTextResponse(named.name)

    added = APIRouter(route_class=PersonRoute)
    added.post("/embedded")(embedded)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        answer = await api.person().post("/embedded", {"named": {"name": "Ada"}})
    assert (answer.status_code, answer.text) == (200, "Ada")


class Stamped(PersonRoute):
    """A custom route class, as FastAPI's documentation shows them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def stamp(request: Request) -> Response:
            response = await answer(request)
            response.headers["X-Stamp"] = "stamped"
            return response

        return stamp


async def test_a_custom_route_class_keeps_its_own_handler(settings: Settings, issuer: LocalIssuer) -> None:
    added = APIRouter(route_class=Stamped)
    added.get("/stamped")(mine)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        assert (await api.person().get("/stamped")).headers["X-Stamp"] == "stamped"
        assert (await api.http.get("/stamped")).status_code == 401


async def test_a_handler_can_make_the_address_of_a_route(settings: Settings, issuer: LocalIssuer) -> None:
    async def where(request: Request) -> Response:
        return PlainTextResponse(str(request.url_for("where")))

    added = APIRouter(route_class=PersonRoute)
    added.get("/where")(where)
    async with running(settings, issuer, change=lambda app: app.include_router(added)) as api:
        assert (await api.person().get("/where")).text == "http://localhost:8000/where"


def faked(**claims: Any) -> Principal:
    now = time.time()
    known = {"sub": "faked", "iss": "http://issuer.test", "iat": now, "exp": now + 60, "email": "faked@example.com"}
    return Principal.from_claims({**known, **claims}, is_access_token=False)


def plain() -> Principal:
    return faked()


async def with_dependencies(request: Request, other: Annotated[Principal, Depends(plain)]) -> Principal:
    assert request.method in ("GET", "POST")
    return other


async def with_an_end() -> AsyncIterator[Principal]:
    yield faked()


def override_principal(monkeypatch: pytest.MonkeyPatch, app: FastAPI, override: Callable[..., Any]) -> None:
    monkeypatch.setattr(app, "dependency_overrides", {current_principal: override})


@pytest.mark.parametrize("override", [plain, with_dependencies, with_an_end])
async def test_overriding_the_principal_fakes_the_caller(
    api: Api, monkeypatch: pytest.MonkeyPatch, override: Callable[..., Any]
) -> None:
    override_principal(monkeypatch, api.app, override)
    created = await api.http.post(LIST, json={"title": "mine"})
    assert created.status_code == 201, created.text
    assert created.json() in (await api.http.get(LIST)).json()["items"]
    assert (await api.http.get("/api/v1/users/me")).json()["email"] == "faked@example.com"
    assert (await api.http.get("/api/v1/admin/users")).status_code == 403


async def test_an_override_is_judged_as_a_token_is(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    override_principal(monkeypatch, api.app, lambda: faked(banned=True))
    assert (await api.http.get(LIST)).status_code == 403


async def test_an_override_may_ask_for_what_a_request_lacks(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(who: Annotated[str, Header()]) -> Principal:
        return faked(sub=who)

    override_principal(monkeypatch, api.app, named)
    assert (await api.http.get(LIST)).status_code == 422
    assert (await api.http.get(LIST, headers={"Who": "grace"})).status_code == 200


@pytest.mark.parametrize("route_class", [APIRoute, BearerRoute])
async def test_an_override_fakes_the_caller_in_any_application(route_class: type[APIRoute]) -> None:
    """Without a lifespan, too: a test that fakes the caller needs no issuer."""
    app = FastAPI()
    router = APIRouter(route_class=route_class)

    @router.get("/who")
    async def who(principal: CurrentPrincipal) -> str:
        return principal.subject

    app.include_router(router)
    app.dependency_overrides[current_principal] = plain
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        assert (await http.get("/who")).json() == "faked"
