"""Permissions in the signatures of handlers: required at start-up, enforced before the body is read, overridable."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any
from uuid import UUID, uuid4

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response, Security, WebSocket
from fastapi.routing import APIRoute
from starlette.responses import PlainTextResponse

from backend.app import create_app
from backend.auth import CurrentPrincipal
from backend.auth.testing import LocalIssuer
from backend.database import Actor
from backend.settings import Settings
from backend.tasks.auth import TasksRead, TasksWrite
from backend.users.admin.auth import Admin, current_admin
from backend.users.auth import Person, current_person
from backend.users.caller import (
    Caller,
    CallerRoute,
    CurrentCaller,
    Permission,
    Public,
    UnprotectedRoute,
    current_caller,
)
from backend.users.models import UserStatus
from backend.users.provisioning import KnownUser
from backend.web.start_up import StartError
from tests.conftest import Api, running

TASKS = "/api/v1/tasks"
TAGS = "/api/v1/tags"
ME = "/api/v1/users/me"
ADMIN = "/api/v1/admin"
SCOPES = {"tasks:read", "tasks:write", "profile"}

# The scope of each operation, or the alias of operations that refuse tokens with scopes.
OPERATIONS = {
    ("GET", TASKS): "tasks:read",
    ("POST", TASKS): "tasks:write",
    ("POST", f"{TASKS}/batch"): "tasks:write",
    ("GET", f"{TASKS}/summary"): "tasks:read",
    ("GET", f"{TASKS}/changes"): "tasks:read",
    ("GET", f"{TASKS}/events"): "tasks:read",
    ("GET", f"{TASKS}/{{id}}"): "tasks:read",
    ("PUT", f"{TASKS}/{{id}}"): "tasks:write",
    ("PATCH", f"{TASKS}/{{id}}"): "tasks:write",
    ("DELETE", f"{TASKS}/{{id}}"): "tasks:write",
    ("POST", f"{TASKS}/{{id}}/restore"): "tasks:write",
    ("GET", TAGS): "tasks:read",
    ("POST", TAGS): "tasks:write",
    ("PATCH", f"{TAGS}/{{id}}"): "tasks:write",
    ("DELETE", f"{TAGS}/{{id}}"): "tasks:write",
    ("GET", ME): "profile",
    ("PATCH", ME): "profile",
    ("DELETE", ME): "Person",
    ("GET", f"{ME}/export"): "Person",
    ("GET", f"{ADMIN}/users"): "Admin",
    ("GET", f"{ADMIN}/users/{{id}}"): "Admin",
    ("POST", f"{ADMIN}/users/{{id}}/suspend"): "Admin",
    ("POST", f"{ADMIN}/users/{{id}}/reinstate"): "Admin",
    ("GET", f"{ADMIN}/audit"): "Admin",
}


def included(*handlers: Callable[..., Any], route_class: type[APIRoute] = CallerRoute, **options: Any) -> Any:
    """Include POST routes for handlers, each at a path of its name. `options` are those of the inclusion."""
    router = APIRouter(route_class=route_class)
    for handler in handlers:
        router.post(f"/{handler.__name__}")(handler)
    return lambda app: app.include_router(router, **options)


def unused() -> None:
    """While a dependency is overridden, FastAPI handles all requests."""


@pytest.fixture(params=["compiled", "FastAPI"])
def way(request: pytest.FixtureRequest) -> Callable[[FastAPI], None]:
    """Makes an application use compiled dispatch or FastAPI's own way."""
    overrides = {unused: unused} if request.param == "FastAPI" else {}
    return lambda app: app.dependency_overrides.update(overrides)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def with_scopes(api: Api, *scopes: str) -> dict[str, str]:
    return bearer(api.issuer.access_token(sub=uuid4().hex, scope=" ".join(scopes)))


def test_the_openapi_document_names_the_scope_of_each_operation() -> None:
    documented = {
        (method.upper(), path): operation["security"]
        for path, methods in create_app().openapi()["paths"].items()
        for method, operation in methods.items()
        if "security" in operation and path.startswith((TASKS, TAGS, ME, ADMIN))
    }
    expected = {name: [{"BetterAuth": [needed] if needed in SCOPES else []}] for name, needed in OPERATIONS.items()}
    assert documented == expected


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda part: part.strip("/"))
async def test_each_operation_requires_its_permission(
    api: Api, monkeypatch: pytest.MonkeyPatch, way: Callable[[FastAPI], None], method: str, path: str
) -> None:
    monkeypatch.setattr(api.app, "dependency_overrides", {})
    way(api.app)
    needed, url = OPERATIONS[method, path], path.replace("{id}", str(uuid4()))

    async def ask(headers: dict[str, str]) -> tuple[int, str, str]:
        # An invalid body, and an invalid event id: streams would not end.
        headers |= {"Content-Type": "application/json", "Last-Event-ID": "invalid"}
        response = await api.http.request(method, url, headers=headers, content=b"{")
        is_problem = response.headers.get("content-type") == "application/problem+json"
        code = response.json()["code"] if is_problem else ""
        return response.status_code, code, response.headers.get("www-authenticate", "")

    assert (await ask({}))[0] == 401
    status, code, challenge = await ask(with_scopes(api, *SCOPES - {needed}))
    if needed in SCOPES:
        assert (status, code) == (403, "insufficient_scope")
        assert f'scope="{needed}"' in challenge
        assert (await ask(with_scopes(api, needed)))[0] not in (401, 403)
    else:
        assert (status, code) == (403, "forbidden")
        assert ((await ask(api.person().bearer))[0] == 403) is (needed == "Admin")
        assert (await ask(api.person(role="admin").bearer))[0] not in (401, 403)


async def no_caller() -> Response:
    return PlainTextResponse("served")


async def principal_alone(_: CurrentPrincipal) -> Response:
    return PlainTextResponse("served")


async def caller_without_permission(_: CurrentCaller) -> Response:
    return PlainTextResponse("served")


async def shared(_: Public) -> None:
    """A dependency cannot declare the routes public that use it."""


async def public_by_a_dependency(_: Annotated[None, Depends(shared)]) -> Response:
    return PlainTextResponse("served")


async def public_with_a_caller(_: Public, __: CurrentCaller) -> Response:
    return PlainTextResponse("served")


UNPROTECTED = [no_caller, principal_alone, caller_without_permission, public_by_a_dependency, public_with_a_caller]


@pytest.mark.parametrize("handler", UNPROTECTED)
async def test_a_route_without_a_permission_stops_the_start(
    settings: Settings, issuer: LocalIssuer, handler: Callable[..., Any]
) -> None:
    name = handler.__name__
    with pytest.raises(UnprotectedRoute) as error:
        async with running(settings, issuer, change=included(handler)):
            pass
    assert str(error.value) == (
        f"no permission in the signature of POST /{name} ({__name__}.{name}): add a parameter such as "
        "`caller: Person`, or `_: Public` if anyone may call it"
    )


async def test_a_mounted_route_without_a_permission_stops_the_start(settings: Settings, issuer: LocalIssuer) -> None:
    mounted = FastAPI()
    included(no_caller)(mounted)
    with pytest.raises(UnprotectedRoute, match="POST /no_caller"):
        async with running(settings, issuer, change=lambda app: app.mount("/mounted", mounted)):
            pass


async def socket_of_a_person(websocket: WebSocket, _: Person) -> None:
    """Is not served: callers are authorized in HTTP requests."""


def include_socket(app: FastAPI) -> None:
    router = APIRouter()
    router.websocket("/socket")(socket_of_a_person)
    app.include_router(router, prefix="/v2")


def mount_socket(app: FastAPI) -> None:
    mounted = FastAPI()
    mounted.websocket("/v2/socket", dependencies=[Depends(current_person)])(socket_of_a_person)
    app.mount("/mounted", mounted)


@pytest.mark.parametrize("add", [include_socket, mount_socket])
async def test_a_websocket_with_a_caller_stops_the_start(
    settings: Settings, issuer: LocalIssuer, add: Callable[[FastAPI], None]
) -> None:
    with pytest.raises(StartError) as error:
        async with running(settings, issuer, change=add):
            pass
    assert str(error.value) == (
        f"a caller in the signature of the WebSocket /v2/socket ({__name__}.socket_of_a_person): callers are "
        "authorized in HTTP requests only, so use `CurrentPrincipal`"
    )


@pytest.mark.parametrize("handler", UNPROTECTED)
async def test_a_route_without_a_permission_that_is_added_later_is_not_served(
    settings: Settings, issuer: LocalIssuer, way: Callable[[FastAPI], None], handler: Callable[..., Any]
) -> None:
    async with running(settings, issuer, change=way) as api:
        included(handler)(api.app)
        for headers in {}, api.person(role="admin").bearer:
            assert (await api.http.post(f"/{handler.__name__}", headers=headers)).status_code == 500


async def test_a_public_route_needs_no_token(
    settings: Settings, issuer: LocalIssuer, way: Callable[[FastAPI], None]
) -> None:
    async def anyone(_: Public) -> Response:
        return PlainTextResponse("served")

    def change(app: FastAPI) -> None:
        way(app)
        included(anyone)(app)
        included(anyone, prefix="/gated", dependencies=[Security(current_person)])(app)

    async with running(settings, issuer, change=change) as api:
        assert (await api.http.post("/anyone")).text == "served"
        assert (await api.http.post("/gated/anyone")).status_code == 401
        assert (await api.http.post("/gated/anyone", headers=api.person().bearer)).text == "served"


async def test_plain_routes_are_left_alone(settings: Settings, issuer: LocalIssuer) -> None:
    async with running(settings, issuer, change=included(no_caller, route_class=APIRoute)) as api:
        assert (await api.http.post("/no_caller")).text == "served"


async def writing(caller: TasksWrite) -> Caller:
    return caller


async def in_the_signature(caller: TasksWrite, data: dict[str, Any]) -> Response:
    return PlainTextResponse(f"{caller.user.id} {data}")


async def in_a_dependency(caller: Annotated[Caller, Depends(writing)], data: dict[str, Any]) -> Response:
    return PlainTextResponse(f"{caller.user.id} {data}")


async def for_the_router(caller: CurrentCaller, data: dict[str, Any]) -> Response:
    return PlainTextResponse(f"{caller.user.id} {data}")


async def with_a_sync_dependency(
    caller: TasksWrite, data: dict[str, Any], _: Annotated[None, Depends(unused)]
) -> Response:
    return PlainTextResponse(f"{caller.user.id} {data}")


async def with_a_model(caller: TasksWrite, data: dict[str, Any]) -> str:
    return f"{caller.user.id} {data}"


async def of_the_generator(caller: TasksWrite) -> AsyncIterator[Caller]:
    yield caller


async def in_a_generator(caller: Annotated[Caller, Depends(of_the_generator)], data: dict[str, Any]) -> Response:
    return PlainTextResponse(f"{caller.user.id} {data}")


@pytest.mark.parametrize(
    "handler",
    [in_the_signature, in_a_dependency, for_the_router, with_a_sync_dependency, with_a_model, in_a_generator],
)
async def test_the_permission_is_enforced_before_the_body_is_read(
    settings: Settings, issuer: LocalIssuer, way: Callable[[FastAPI], None], handler: Callable[..., Any]
) -> None:
    was_read = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal was_read
        was_read = True
        yield b"{}"

    def change(app: FastAPI) -> None:
        way(app)
        needed = [Security(current_caller, scopes=["tasks:write"])]
        included(handler, dependencies=needed if handler is for_the_router else [])(app)

    async with running(settings, issuer, change=change) as api:
        person = api.person()
        tokens: list[tuple[dict[str, str], int]] = [
            ({}, 401),
            (with_scopes(api, "tasks:read"), 403),
            (bearer(person.token(banned=True)), 403),
            (with_scopes(api, "tasks:write"), 200),
            (person.bearer, 200),
        ]
        for headers, status in tokens:
            was_read = False
            headers = {"Content-Type": "application/json", **headers}
            response = await api.http.post(f"/{handler.__name__}", headers=headers, content=body())
            assert (response.status_code, was_read) == (status, status == 200)
        assert response.text.strip('"') == f"{(await person.get(ME)).json()['id']} {{}}"


async def test_of_several_permissions_all_must_hold(
    settings: Settings, issuer: LocalIssuer, way: Callable[[FastAPI], None]
) -> None:
    async def both_scopes(_: TasksRead, __: Annotated[Caller, Depends(writing)]) -> Response:
        return PlainTextResponse("served")

    async def scope_and_session(_: TasksRead, __: Person) -> Response:
        return PlainTextResponse("served")

    async def scope_and_role(_: Admin, __: TasksRead) -> Response:
        return PlainTextResponse("served")

    def change(app: FastAPI) -> None:
        way(app)
        included(both_scopes, scope_and_session, scope_and_role)(app)

    async with running(settings, issuer, change=change) as api:
        person, admin = api.person().bearer, api.person(role="admin").bearer
        read, write, both = (
            with_scopes(api, *scopes) for scopes in (["tasks:read"], ["tasks:write"], ["tasks:read", "tasks:write"])
        )
        for handler, allowed in (
            (both_scopes, [both, person, admin]),
            (scope_and_session, [person, admin]),
            (scope_and_role, [admin]),
        ):
            for headers in read, write, both, person, admin:
                response = await api.http.post(f"/{handler.__name__}", headers=headers)
                assert response.status_code == (200 if headers in allowed else 403), (handler, headers)
        refused = await api.http.post("/both_scopes", headers=with_scopes(api))
        assert 'scope="tasks:read tasks:write"' in refused.headers["www-authenticate"]


async def test_each_inclusion_of_a_route_has_its_own_permission(
    settings: Settings, issuer: LocalIssuer, way: Callable[[FastAPI], None]
) -> None:
    router = APIRouter(route_class=CallerRoute)
    router.post("/tried")(writing_alone)

    def change(app: FastAPI) -> None:
        way(app)
        app.include_router(router)
        app.include_router(router, prefix="/beta", dependencies=[Security(current_caller, scopes=["beta"])])

    async with running(settings, issuer, change=change) as api:
        token = with_scopes(api, "tasks:write")
        assert (await api.http.post("/tried", headers=token)).status_code == 200
        assert (await api.http.post("/beta/tried", headers=token)).status_code == 403
        token = with_scopes(api, "tasks:write", "beta")
        assert (await api.http.post("/beta/tried", headers=token)).status_code == 200
        metadata = (await api.http.get("/.well-known/oauth-protected-resource")).json()
        assert set(metadata["scopes_supported"]) >= {"beta", *SCOPES}


async def writing_alone(_: TasksWrite) -> Response:
    return PlainTextResponse("served")


async def subject(caller: TasksRead) -> str:
    return caller.principal.subject


async def subject_of_a_caller_without_permission(caller: CurrentCaller) -> str:
    return caller.principal.subject


async def test_a_plain_route_enforces_the_permission_as_any_dependency_does(
    settings: Settings, issuer: LocalIssuer
) -> None:
    change = included(subject, subject_of_a_caller_without_permission, route_class=APIRoute)
    async with running(settings, issuer, change=change) as api:
        person = api.person()
        for path, needs_session in ("/subject", False), ("/subject_of_a_caller_without_permission", True):
            assert (await api.http.post(path)).status_code == 401
            assert (await api.http.post(path, headers=with_scopes(api, "tasks:write"))).status_code == 403
            reading = await api.http.post(path, headers=with_scopes(api, "tasks:read"))
            assert reading.status_code == (403 if needs_session else 200)
            assert (await person.post(path)).json() == person.subject


async def test_several_callers_in_one_signature_count_as_one_request(settings: Settings, issuer: LocalIssuer) -> None:
    async def twice(_: TasksRead, caller: Annotated[Caller, Depends(writing)]) -> str:
        return caller.principal.subject

    config = settings.model_copy(update={"rate_limit": "9/hour"})
    async with running(config, issuer, change=included(twice)) as api:
        response = await api.person().post("/twice")
        assert response.headers["ratelimit"].startswith('"user";r=8;')
        assert api.state["users"].loads == 1


class Suspecting(CallerRoute):
    """A route class of a fork, with a caller of its own."""

    async def authorize(self, request: Request, permission: Permission) -> Caller:
        caller = await super().authorize(request, permission)
        return Caller(caller.principal, fake_user("suspect"), caller.database)


async def roles(caller: Person) -> Response:
    return PlainTextResponse(" ".join(caller.user.roles))


async def test_a_route_class_may_extend_the_authorization(
    settings: Settings, issuer: LocalIssuer, way: Callable[[FastAPI], None]
) -> None:
    def change(app: FastAPI) -> None:
        way(app)
        included(roles, route_class=Suspecting)(app)

    async with running(settings, issuer, change=change) as api:
        assert (await api.person().post("/roles")).text == "suspect"


def fake_user(*roles: str) -> KnownUser:
    id = uuid4()
    return KnownUser(
        id=id,
        status=UserStatus.active,
        roles=roles,
        tokens_valid_after=0,
        claims_at=0,
        profile={},
        actor=Actor.user(id),
    )


class Tags:
    """In the place of a database."""

    async def rows(self, *_: object) -> list[dict[str, Any]]:
        return [{"id": UUID(int=1), "name": "faked", "task_count": 0}]


def faked() -> Caller:
    database: Any = Tags()
    return Caller(LocalIssuer().principal("ada"), fake_user(), database)


async def person_alone(caller: Person) -> str:
    return caller.principal.subject


async def admin_alone(caller: Admin) -> str:
    return caller.principal.subject


async def person_and_scope(caller: Person, _: TasksRead) -> str:
    return caller.principal.subject


@pytest.mark.parametrize(
    ("overridden", "answered"),
    [
        ([current_caller], {TAGS, "/in_a_dependency"}),
        ([current_person], {"/person_alone"}),
        ([current_admin], {"/admin_alone"}),
        ([current_caller, current_person], {TAGS, "/in_a_dependency", "/person_alone", "/person_and_scope"}),
        ([writing], {"/in_a_dependency"}),
    ],
)
async def test_an_overridden_dependency_requires_no_permission(
    settings: Settings, issuer: LocalIssuer, overridden: list[Any], answered: set[str]
) -> None:
    change = included(person_alone, admin_alone, person_and_scope, in_a_dependency)
    async with running(settings, issuer, change=change) as api:
        api.app.dependency_overrides.update(dict.fromkeys(overridden, faked))
        for path in TAGS, "/person_alone", "/admin_alone", "/person_and_scope", "/in_a_dependency":
            response = await api.http.request("GET" if path == TAGS else "POST", path, json={})
            assert response.status_code == (200 if path in answered else 401), path


async def test_an_override_may_itself_require_a_permission(settings: Settings, issuer: LocalIssuer) -> None:
    async def only_for_admins(caller: Admin) -> Caller:
        return caller

    async with running(settings, issuer, change=included(subject, person_and_scope)) as api:
        api.app.dependency_overrides[current_caller] = only_for_admins
        for person, status in (api.person(), 403), (api.person(role="admin"), 200):
            for path in "/subject", "/person_and_scope":
                assert (await person.post(path)).status_code == status
