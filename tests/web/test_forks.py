"""Routes that a fork or a third-party package adds with FastAPI's documented features behave as FastAPI documents."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.base import RequestResponseEndpoint
from starlette.routing import Host, Mount, Route, Router
from starlette.types import Receive, Scope, Send

from backend.auth.testing import LocalIssuer
from backend.operations.log_lines import JsonLines
from backend.settings import Settings
from backend.tasks.auth import TasksRead
from backend.users.caller import CallerRoute
from tests.conftest import Api, running

OWN_POLICIES = {
    "content-security-policy": "script-src 'self'",
    "referrer-policy": "same-origin",
    "x-content-type-options": "none",
    "cache-control": "public, max-age=60",
    "strict-transport-security": "max-age=1",
    "x-request-id": "chosen-by-the-route",
}
router = APIRouter()


async def raw(scope: Scope, _: Receive, send: Send) -> None:
    """An ASGI application that sends no headers at all, as the specification allows."""
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": scope["method"].encode()})


@router.get("/page")
async def page() -> HTMLResponse:
    return HTMLResponse("<p>page", headers=OWN_POLICIES)


@router.get("/varies")
async def varies() -> PlainTextResponse:
    return PlainTextResponse("x" * 2000, headers={"Vary": "X-Origin, Cookie"})


@router.head("/only-head")
async def only_head() -> Response:
    return Response(headers={"X-Handler": "head"})


@router.get("/both")
async def both_get() -> Response:
    return PlainTextResponse("get", headers={"X-Handler": "get"})


@router.head("/both")
async def both_head() -> Response:
    return Response(headers={"X-Handler": "head"})


@router.get("/refusing-head")
async def refusing_get() -> Response:
    return PlainTextResponse("get")


@router.head("/refusing-head")
async def refusing_head() -> Response:
    raise HTTPException(405, headers={"X-Handler": "head"})


@router.api_route("/either", methods=["GET", "HEAD"])
async def either(request: Request) -> Response:
    return PlainTextResponse("content", headers={"X-Method": request.method})


@router.get("/endless")
async def endless(request: Request) -> StreamingResponse:
    async def parts() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0)
        finally:
            request.app.state.ended.set()

    return StreamingResponse(parts(), headers={"X-Stream": "yes"})


@router.get("/file")
async def file() -> FileResponse:
    return FileResponse(__file__)


@router.options("/options")
async def options() -> Response:
    return Response(status_code=204, headers={"Allow": "OPTIONS", "X-Handler": "options"})


@router.get("/status/{status}")
async def fail(status: int) -> None:
    raise HTTPException(status, detail={"reason": "a detail may be any JSON"})


def mounted_application() -> FastAPI:
    app = FastAPI()
    app.get("/refusing-head")(refusing_get)
    app.head("/refusing-head")(refusing_head)

    @app.get("/get")
    async def get() -> str:
        return "get"

    @app.head("/head")
    async def head() -> Response:
        return Response(headers={"X-Handler": "head"})

    return app


def add_routes(app: FastAPI) -> None:
    app.state.ended = asyncio.Event()
    app.include_router(router)
    app.mount("/raw", raw)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent))
    app.mount("/mounted", mounted_application())
    app.router.routes.append(Mount("/bare", Router([Route("/only-post", raw, methods=["POST"])])))
    app.router.routes.append(Host("other.example", Router([Route("/host", raw)])))


@pytest.fixture(scope="module")
async def fork(settings: Settings, issuer: LocalIssuer) -> AsyncIterator[Api]:
    async with running(settings, issuer, change=add_routes) as api:
        yield api


@pytest.mark.parametrize("origin", [{}, {"Origin": "https://app.example.com", "Accept-Encoding": "gzip"}])
async def test_headers_that_a_route_sets_stand_alone(fork: Api, origin: dict[str, str]) -> None:
    answer = await fork.http.get("https://localhost:8000/page", headers=origin)
    assert {name: answer.headers.get_list(name) for name in OWN_POLICIES} == {
        name: [value] for name, value in OWN_POLICIES.items()
    }


async def test_other_headers_are_added_to_a_response_that_has_none(fork: Api) -> None:
    answer = await fork.http.get("https://localhost:8000/raw/")
    assert (answer.status_code, answer.text) == (200, "GET")
    assert set(OWN_POLICIES) <= set(answer.headers)


@pytest.mark.parametrize(
    "headers", [{"Accept-Encoding": "identity"}, {"Origin": "https://app.example.com", "Accept-Encoding": "gzip"}]
)
async def test_vary_has_the_fields_of_the_route_and_of_the_middleware(fork: Api, headers: dict[str, str]) -> None:
    await fork.http.get("/livez")  # the next request without Origin skips CORS and gzip
    answer = await fork.http.get("/varies", headers=headers)
    fields = [field.strip() for line in answer.headers.get_list("vary") for field in line.split(",")]
    assert sorted(fields) == ["Accept-Encoding", "Cookie", "Origin", "X-Origin"]


@pytest.mark.parametrize(
    ("path", "handler"), [("/only-head", "head"), ("/both", "head"), ("/mounted/head", "head"), ("/mounted/get", None)]
)
async def test_head_is_answered_by_its_own_route(fork: Api, path: str, handler: str | None) -> None:
    answer = await fork.http.head(path)
    assert (answer.status_code, answer.headers.get("x-handler"), answer.content) == (200, handler, b"")


@pytest.mark.parametrize("prefix", ["", "/mounted"])
async def test_a_405_of_a_handler_for_head_is_its_answer(fork: Api, prefix: str) -> None:
    answer = await fork.http.head(f"{prefix}/refusing-head")
    assert (answer.status_code, answer.headers.get("x-handler")) == (405, "head")


async def test_a_route_for_get_and_head_sees_the_method(fork: Api) -> None:
    get, head = await fork.http.get("/either"), await fork.http.head("/either")
    assert [answer.headers["x-method"] for answer in (get, head)] == ["GET", "HEAD"]
    assert [answer.content for answer in (get, head)] == [b"content", b""]


async def test_get_of_a_route_for_head_alone_is_a_405(fork: Api) -> None:
    answer = await fork.http.get("/only-head")
    assert (answer.status_code, answer.headers["allow"]) == (405, "HEAD")


async def test_head_ends_an_endless_stream(fork: Api) -> None:
    fork.app.state.ended.clear()
    async with asyncio.timeout(10):
        answer = await fork.http.head("/endless")
        await fork.app.state.ended.wait()
    assert (answer.status_code, answer.headers["x-stream"], answer.content) == (200, "yes", b"")


@pytest.mark.parametrize("path", ["/file", f"/static/{Path(__file__).name}"])
async def test_head_of_a_file_has_the_headers_of_get(fork: Api, path: str) -> None:
    get, head = await fork.http.get(path), await fork.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    for name in "content-length", "content-type", "etag", "last-modified":
        assert head.headers[name] == get.headers[name]


@pytest.mark.parametrize("path", ["/nowhere", "/static/nowhere", "/mounted/nowhere"])
async def test_head_of_an_unknown_path_is_a_404(fork: Api, path: str) -> None:
    assert (await fork.http.head(path)).status_code == 404


async def test_head_of_a_route_for_post_is_a_405(fork: Api) -> None:
    answer = await fork.http.head("/api/v1/tasks/batch")
    assert (answer.status_code, answer.headers["allow"], answer.content) == (405, "POST", b"")


async def test_the_log_line_of_head_has_route_and_subject(fork: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "backend.access")
    ada = fork.person()
    assert (await ada.request("HEAD", "/api/v1/tasks")).status_code == 200
    await asyncio.sleep(0)  # lines are written in the next iteration of the event loop
    line = json.loads(JsonLines().format(caplog.records[-1]))
    assert (line["method"], line["route"], line["subject"]) == ("HEAD", "/api/v1/tasks", ada.subject)


async def test_head_requires_the_permission_of_its_route(settings: Settings, issuer: LocalIssuer) -> None:
    notes = APIRouter(route_class=CallerRoute)

    @notes.head("/notes")
    async def head_notes(_: TasksRead) -> Response:
        return Response(headers={"X-Handler": "head"})

    async with running(settings, issuer, change=lambda app: app.include_router(notes)) as api:
        assert (await api.http.head("/notes")).status_code == 401
        for path in "/notes", "/api/v1/tasks":
            for scope, status in ("tasks:read", 200), ("tasks:write", 403):
                token = issuer.access_token(sub="ada", scope=scope)
                answer = await api.http.head(path, headers={"Authorization": f"Bearer {token}"})
                assert answer.status_code == status


async def test_a_route_for_options_answers(fork: Api) -> None:
    answer = await fork.http.options("/options")
    assert (answer.status_code, answer.headers["x-handler"]) == (204, "options")
    with_origin = await fork.http.options("/options", headers={"Origin": "https://app.example.com"})
    assert with_origin.headers["access-control-allow-origin"] == "https://app.example.com"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("DELETE", "/both", {"GET", "HEAD"}), ("GET", "/bare/only-post", {"POST"}), ("PUT", "/page", {"GET"})],
)
async def test_a_405_names_the_methods_of_a_fork(fork: Api, method: str, path: str, allowed: set[str]) -> None:
    answer = await fork.http.request(method, path)
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == allowed


async def test_a_middleware_function_surrounds_all_routes(settings: Settings, issuer: LocalIssuer) -> None:
    seen = []

    async def observe(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        seen.append((request.method, response.status_code))
        response.headers["X-Process-Time"] = "0"
        return response

    def change(app: FastAPI) -> None:
        add_routes(app)
        app.middleware("http")(observe)

    async with running(settings, issuer, change=change) as api:
        ada = api.person()
        answers = [await ada.get("/api/v1/tasks"), await ada.get("/page"), await ada.request("HEAD", "/both")]
        answers += [await ada.get("/nowhere"), await ada.get("/static/nowhere")]
    assert all(answer.headers["x-process-time"] == "0" for answer in answers)
    assert seen == [("GET", 200), ("GET", 200), ("HEAD", 200), ("GET", 404), ("GET", 404)]


async def broken() -> Response:
    raise RuntimeError("secret")


async def broken_for_persons(_: TasksRead) -> Response:
    raise RuntimeError("secret")


async def test_a_middleware_function_sees_unexpected_exceptions(
    settings: Settings, issuer: LocalIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    """The response is a problem with all headers, and both log lines are written."""
    caplog.set_level(logging.INFO, "backend.access")
    seen = []

    async def observe(request: Request, call_next: RequestResponseEndpoint) -> Response:
        try:
            return await call_next(request)
        except RuntimeError:
            seen.append(request.url.path)
            raise

    def change(app: FastAPI) -> None:
        app.get("/broken")(broken)
        compiled = APIRouter(route_class=CallerRoute)
        compiled.get("/broken-for-persons")(broken_for_persons)
        app.include_router(compiled)
        app.middleware("http")(observe)

    origin = {"Origin": "https://app.example.com", "X-Request-ID": "chosen"}
    async with running(settings, issuer, change=change) as api:
        for path in "/broken", "/broken-for-persons":
            caplog.clear()
            answer = await api.person().get(path, headers=origin)
            assert (answer.status_code, answer.json()["request_id"]) == (500, "chosen")
            assert answer.headers["x-request-id"] == "chosen"
            assert answer.headers["access-control-allow-origin"] == "https://app.example.com"
            await asyncio.sleep(0)  # log lines are written after the response
            (fields,) = (record.fields for record in caplog.records if record.name == "backend.access")  # type: ignore[attr-defined]
            assert (fields["request_id"], fields["status"]) == ("chosen", 500)
            assert [each.getMessage().partition("\n")[0] for each in caplog.records if each.levelname == "ERROR"] == [
                "unexpected RuntimeError"
            ]
    assert seen == ["/broken", "/broken-for-persons"]


@pytest.mark.parametrize("status", [304, 404, 418, 499, 599])
async def test_an_http_exception_may_have_any_status_and_detail(fork: Api, status: int) -> None:
    answer = await fork.http.get(f"/status/{status}")
    assert answer.status_code == status
    if status == 304:
        assert answer.content == b""
    else:
        assert answer.json()["detail"] == {"reason": "a detail may be any JSON"}
