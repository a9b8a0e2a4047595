"""Documented features of FastAPI give the same responses on compiled routes as in a plain FastAPI application."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

import httpx
import pytest
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Body,
    Cookie,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Query,
    Request,
    Response,
    Security,
)
from fastapi.exception_handlers import http_exception_handler, request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, OAuth2PasswordBearer, SecurityScopes
from pydantic import AfterValidator, BaseModel, Field
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from backend.auth.testing import LocalIssuer
from backend.operations.access_log import AccessLog
from backend.settings import Settings
from backend.web.application import Application
from backend.web.parameters import cacheable
from tests.conftest import running
from tests.support.public_route import PublicRoute, started

Call = tuple[str, str] | tuple[str, str, dict[str, str]] | tuple[str, str, dict[str, str], bytes]
Feature = Callable[[FastAPI, APIRouter, list[Any]], Sequence[Call]]

OWN_HEADERS = {
    "x-request-id", "x-content-type-options", "referrer-policy", "cache-control", "vary", "content-security-policy",
}  # fmt: skip
JSON = {"content-type": "application/json"}
FEATURES: list[tuple[Feature, dict[str, Any]]] = []


def feature(**options: Any) -> Callable[[Feature], Feature]:
    """Register a function that adds routes, records events in a list, and returns requests."""

    def register(function: Feature) -> Feature:
        FEATURES.append((function, options))
        return function

    return register


class Item(BaseModel):
    name: str
    price: float | None = None
    tags: list[str] = []
    kind: str = Field(default="thing", alias="sort")


@feature()
def security_scopes(_: FastAPI, router: APIRouter, events: list[Any]) -> Sequence[Call]:
    scheme = OAuth2PasswordBearer("token", scopes={"read": "", "write": ""}, auto_error=False)
    key = APIKeyHeader(name="x-key", auto_error=False)

    async def user(needed: SecurityScopes, token: Annotated[str | None, Depends(scheme)]) -> str:
        events.append(needed.scope_str)
        return f"{token} {needed.scopes}"

    async def reader(name: Annotated[str, Security(user, scopes=["read"])]) -> str:
        return name

    @router.get("/one")
    async def one(name: Annotated[str, Security(reader, scopes=["write"])]) -> Response:
        return PlainTextResponse(name)

    @router.get("/two", dependencies=[Security(user, scopes=["write"])])
    async def two(name: Annotated[str, Depends(reader)], value: Annotated[str | None, Security(key)]) -> Response:
        return PlainTextResponse(f"{name} {value}")

    return [("GET", "/one"), ("GET", "/two", {"authorization": "Bearer t", "x-key": "k"})]


@feature()
def dependencies_without_a_cache(_: FastAPI, router: APIRouter, events: list[Any]) -> Sequence[Call]:
    async def number() -> int:
        events.append("called")
        return len(events)

    anew = Depends(number, use_cache=False)
    kept = Depends(number)

    @router.get("/fresh")
    async def fresh(a: Annotated[int, anew], b: Annotated[int, anew], c: Annotated[int, kept]) -> Response:
        return PlainTextResponse(f"{a} {b} {c}")

    @router.get("/cached")
    async def cached(a: Annotated[int, kept], b: Annotated[int, kept]) -> Response:
        return PlainTextResponse(f"{a} {b}")

    return [("GET", "/fresh"), ("GET", "/cached")]


@feature()
def dependency_that_is_invalid_twice(app: FastAPI, router: APIRouter, __: list[Any]) -> Sequence[Call]:
    async def inner(number: Annotated[int, Header()]) -> int:
        return number

    async def outer(number: Annotated[int, Depends(inner)], other: Annotated[int, Header()]) -> int:
        return number + other

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return JSONResponse([{"msg": each.pop("msg", "gone"), **each} for each in error.errors()], 422)

    @router.get("/numbers")
    async def numbers(
        a: Annotated[int, Depends(outer)], b: Annotated[int, Depends(inner)], c: Annotated[int, Depends(outer)]
    ) -> Response:
        return PlainTextResponse(f"{a} {b} {c}")

    return [
        ("GET", "/numbers"),
        ("GET", "/numbers", {"number": "1", "other": "x"}),
        ("GET", "/numbers", {"number": "x"}),
    ]


@feature()
def dependency_classes(app: FastAPI, router: APIRouter, __: list[Any]) -> Sequence[Call]:
    class Paging:
        def __init__(self, skip: int = 0, limit: Annotated[int, Query(le=9)] = 5) -> None:
            self.text = f"{skip} {limit}"

    class Checker:
        def __init__(self, word: str) -> None:
            self.word = word

        async def __call__(self, q: Annotated[str, Header()] = "") -> bool:
            return self.word in q

    class Unhashable(Checker):
        __hash__ = None  # type: ignore[assignment]

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return PlainTextResponse(f"unexpected {type(error).__name__}", 500)

    @router.get("/unhashable")
    async def unhashable(found: Annotated[bool, Depends(Unhashable("bar"))]) -> Response:
        return PlainTextResponse(f"{found}")

    @router.get("/page")
    async def page(paging: Annotated[Paging, Depends()]) -> Response:
        return PlainTextResponse(paging.text)

    @router.get("/checked")
    async def checked(found: Annotated[bool, Depends(Checker("bar"))]) -> Response:
        return PlainTextResponse(f"{found}")

    pages: list[Call] = [("GET", "/page?skip=2"), ("GET", "/page?limit=10")]
    return [*pages, ("GET", "/checked", {"q": "foobar"}), ("GET", "/checked"), ("GET", "/unhashable")]


class CustomError(Exception):
    pass


@feature()
def generators_and_their_cleanup(app: FastAPI, router: APIRouter, events: list[Any]) -> Sequence[Call]:
    async def outer(request: Request) -> AsyncIterator[str]:
        events.append("outer begins")
        try:
            yield "outer"
        except CustomError:
            events.append("outer saw it")
            raise
        finally:
            events.append(f"outer ends {request.url.path}")

    def inner(name: Annotated[str, Depends(outer)]) -> Iterator[str]:
        events.append("inner begins")
        try:
            yield f"inner {name}"
        finally:
            events.append("inner ends")

    async def stream() -> AsyncIterator[str]:
        events.append("streams")
        yield "streamed"

    @router.get("/value")
    async def value(name: Annotated[str, Depends(inner)]) -> Response:
        return StreamingResponse(stream(), headers={"x-name": name})

    @router.get("/early")
    async def early(name: Annotated[str, Depends(outer, scope="function")]) -> Response:
        return StreamingResponse(stream(), headers={"x-name": name})

    @router.get("/error")
    async def error(_: Annotated[str, Depends(inner)]) -> Response:
        raise CustomError

    @router.get("/refused")
    async def refused(_: Annotated[str, Depends(inner)]) -> Response:
        raise HTTPException(418, headers={"x-why": "tea"})

    @app.exception_handler(CustomError)
    async def handle(_: Request, error: Exception) -> Response:
        events.append("handled")
        return PlainTextResponse(type(error).__name__, 409)

    return [("GET", path) for path in ("/value", "/early", "/error", "/refused")]


@feature()
def response_classes(_: FastAPI, router: APIRouter, __: list[Any]) -> Sequence[Call]:
    @router.get("/html", response_class=HTMLResponse)
    async def html() -> str:
        return "<p>"

    @router.get("/html-itself", response_class=HTMLResponse)
    async def html_itself() -> HTMLResponse:
        return HTMLResponse("<p>", headers={"content-security-policy": "default-src 'self'"})

    @router.get("/redirect", response_class=RedirectResponse, status_code=302)
    async def redirect() -> str:
        return "/elsewhere"

    @router.get("/mistyped")
    async def mistyped() -> Response:
        return {"it": "returns", "another": "type"}  # type: ignore[return-value]  # as code without a type checker may

    @router.get("/nothing")
    async def nothing() -> Response:
        return None  # type: ignore[return-value]

    return [("GET", path) for path in ("/html", "/html-itself", "/redirect", "/mistyped", "/nothing")]


@feature(default_response_class=PlainTextResponse)
def default_response_class(_: FastAPI, router: APIRouter, __: list[Any]) -> Sequence[Call]:
    @router.get("/text")
    async def text() -> str:
        return "text"

    @router.get("/mistyped")
    async def mistyped() -> Response:
        return "text"  # type: ignore[return-value]

    return [("GET", "/text"), ("GET", "/mistyped")]


@feature()
def status_codes(_: FastAPI, router: APIRouter, __: list[Any]) -> Sequence[Call]:
    @router.post("/made", status_code=201)
    async def made() -> Response:
        return PlainTextResponse("made", 202)

    @router.post("/other", status_code=201)
    async def other(response: Response) -> dict[str, str]:
        response.status_code = 203
        response.headers["x-other"] = "1"
        response.set_cookie("c", "1")
        return {}

    @router.delete("/gone", status_code=204)
    async def gone() -> None:
        return None

    @router.delete("/gone-plainly", status_code=204, response_class=Response)
    async def gone_plainly() -> None:
        return None

    @router.delete("/gone-mistyped", status_code=204)
    async def gone_mistyped() -> Response:
        return None  # type: ignore[return-value]

    return [
        ("POST", "/made"),
        ("POST", "/other"),
        *(("DELETE", f"/gone{end}") for end in ("", "-plainly", "-mistyped")),
    ]


@feature()
def response_models(app: FastAPI, router: APIRouter, __: list[Any]) -> Sequence[Call]:
    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return PlainTextResponse(f"unexpected {type(error).__name__}", 500)

    async def item() -> Item:
        return Item(name="a", sort="b")

    async def secret() -> dict[str, Any]:
        return {"name": "a", "secret": 1}

    async def mistyped() -> Response:
        return {"name": "a", "secret": 1}  # type: ignore[return-value]

    async def invalid() -> Response:
        return {"secret": 1}  # type: ignore[return-value]

    router.get("/model")(item)
    router.get("/filtered", response_model=Item)(secret)
    router.get("/mistyped", response_model=Item)(mistyped)
    router.get("/invalid", response_model=Item)(invalid)
    router.get("/nothing", response_model=None)(secret)
    variants: dict[str, dict[str, Any]] = {
        "unset": {"response_model_exclude_unset": True},
        "defaults": {"response_model_exclude_defaults": True},
        "none": {"response_model_exclude_none": True},
        "include": {"response_model_include": {"name", "price"}},
        "exclude": {"response_model_exclude": {"tags"}},
        "alias": {"response_model_by_alias": False},
    }
    for name, options in variants.items():
        router.get(f"/{name}", response_model=Item, **options)(item)
        router.get(f"/{name}-mistyped", response_model=Item, **options)(mistyped)
    paths = (
        "model",
        "filtered",
        "mistyped",
        "invalid",
        "nothing",
        *variants,
        *(f"{name}-mistyped" for name in variants),
    )
    return [("GET", f"/{path}") for path in paths]


@feature()
def background_tasks(_: FastAPI, router: APIRouter, events: list[Any]) -> Sequence[Call]:
    async def dependency(tasks: BackgroundTasks) -> None:
        tasks.add_task(events.append, "of the dependency")

    @router.post("/tasks")
    async def add(tasks: BackgroundTasks, _: Annotated[None, Depends(dependency)]) -> Response:
        tasks.add_task(events.append, "of the handler")
        events.append("handler")
        return PlainTextResponse("later")

    @router.post("/own")
    async def own() -> Response:
        return PlainTextResponse("later", background=BackgroundTask(events.append, "of the response"))

    return [("POST", "/tasks"), ("POST", "/own")]


@feature()
def exception_handlers(app: FastAPI, router: APIRouter, events: list[Any]) -> Sequence[Call]:
    once = CustomError("the same each time")

    @app.exception_handler(CustomError)
    def own(request: Request, error: Exception) -> Response:
        traceback, length = error.__traceback__, 0
        while traceback is not None:
            traceback, length = traceback.tb_next, length + 1
        events.append(length < 40)
        return JSONResponse({"path": request.url.path, "error": str(error)}, 409, {"x-own": "1"})

    @app.exception_handler(418)
    async def tea(_: Request, error: Exception) -> Response:
        return PlainTextResponse(f"tea: {error}", 418)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        body = (await request.body()).decode()
        where = (error.endpoint_path, error.endpoint_function, error.endpoint_line)
        return JSONResponse({"errors": error.errors(), "body": body, "read": error.body, "where": where}, 422)

    @app.exception_handler(LookupError)
    async def instead(_: Request, error: Exception) -> Response:
        raise HTTPException(404, f"instead of {error!r}") from error

    @app.exception_handler(ArithmeticError)
    async def worse(_: Request, error: Exception) -> Response:
        raise RuntimeError from error

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return PlainTextResponse(f"unexpected {type(error).__name__}", 500)

    @router.get("/raise/{name}")
    async def fail(name: str) -> Response:
        errors = {
            "own": once,
            "tea": HTTPException(418, "tea"),
            "key": KeyError("k"),
            "zero": ZeroDivisionError(),
            "other": HTTPException(500, "other"),
        }
        raise errors.get(name, RuntimeError())

    @router.post("/items")
    async def items(item: Item, x: Annotated[int, Header()] = 1) -> Response:
        return PlainTextResponse(f"{item} {x}")

    raised = [("GET", f"/raise/{name}") for name in ("own", "tea", "key", "zero", "other", "unexpected")]
    bodies = [b'{"name": 1}', b"", b'{"name": "a"}', b"[]"]
    return [*raised, *raised[:1] * 50, *(("POST", "/items", {**JSON, "x": "y"}, body) for body in bodies)]


@feature()
def middleware(app: FastAPI, router: APIRouter, events: list[Any]) -> Sequence[Call]:
    class Noting:
        def __init__(self, app: ASGIApp, name: str) -> None:
            self.app = app
            self.name = name

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            events.append(f"{self.name} begins")
            if scope["path"] == f"/stop/{self.name}":
                raise CustomError
            await self.app(scope, receive, send)
            events.append(f"{self.name} ends")

    app.add_middleware(Noting, name="first")

    @app.middleware("http")
    async def second(request: Request, call_next: Callable[[Request], Any]) -> Response:
        events.append("second begins")
        response: Response = await call_next(request)
        response.headers["x-second"] = request.url.path
        return response

    app.add_middleware(Noting, name="third")

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return PlainTextResponse(f"unexpected {type(error).__name__}", 500)

    @router.get("/value")
    async def value() -> Response:
        events.append("handler")
        return PlainTextResponse("value")

    return [("GET", "/value"), ("GET", "/stop/first"), ("GET", "/stop/third"), ("GET", "/nowhere")]


@feature()
def sub_applications(app: FastAPI, router: APIRouter, _: list[Any]) -> Sequence[Call]:
    sub = FastAPI()

    @sub.get("/value")
    async def sub_value(request: Request) -> str:
        return f"{request.scope['root_path']} {request.url_for('sub_value')}"

    @router.get("/sub/before")
    async def before(request: Request) -> Response:
        return PlainTextResponse(f"{request.url_for('before')} {request.app.title}")

    app.mount("/sub", sub)

    @router.get("/sub/value")
    async def hidden() -> Response:
        return PlainTextResponse("not reached")

    return [("GET", path) for path in ("/sub/before", "/sub/value", "/sub/openapi.json", "/sub/nowhere")]


@feature(root_path="/proxied")
def root_path(_: FastAPI, router: APIRouter, __: list[Any]) -> Sequence[Call]:
    @router.get("/value")
    async def value(request: Request) -> Response:
        return PlainTextResponse(str(request.url_for("value")))

    return [("GET", "/value"), ("GET", "/proxied/value")]


@feature()
def lifespans_of_routers(app: FastAPI, router: APIRouter, events: list[Any]) -> Sequence[Call]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, str]]:
        events.append("starts")
        yield {"inner": "of the router"}
        events.append("stops")

    inner = APIRouter(route_class=router.route_class, lifespan=lifespan, prefix="/inner")

    @inner.get("/value")
    async def value(request: Request) -> Response:
        return PlainTextResponse(request.state.inner)

    app.include_router(inner)
    return [("GET", "/inner/value")]


@feature(max_body_size=10)
def limit_of_the_application(_: FastAPI, router: APIRouter, __: list[Any]) -> Sequence[Call]:
    @router.post("/value")
    async def value(data: Annotated[Any, Body()]) -> Response:
        return PlainTextResponse(f"{data}")

    return [("POST", "/value", JSON, b"1"), ("POST", "/value", JSON, b'"0123456789"')]


@feature()
def paths_that_end_with_a_line_break(_: FastAPI, router: APIRouter, __: list[Any]) -> Sequence[Call]:
    @router.get("/some/fixed")
    async def fixed() -> Response:
        return PlainTextResponse("fixed")

    @router.get("/some/{name}")
    async def named(name: str) -> Response:
        return PlainTextResponse(f"named {name}")

    return [("GET", f"/some/{name}") for name in ("fixed%0A", "other%0A", "fixed", "other")]


@feature()
def parameters_of_each_kind(_: FastAPI, router: APIRouter, __: list[Any]) -> Sequence[Call]:
    class Filter(BaseModel):
        q: str = ""
        tag: Annotated[list[str], Field(max_length=2)] | None = None

    @router.get("/model")
    async def model(query: Annotated[Filter, Query()]) -> Response:
        return PlainTextResponse(f"{query}")

    @router.get("/headers")
    async def headers(x: Annotated[Annotated[list[str], Field(max_length=2)] | None, Header()] = None) -> Response:
        return PlainTextResponse(f"{x}")

    @router.get("/cookie")
    async def cookie(c: Annotated[str | None, Cookie()] = None) -> Response:
        return PlainTextResponse(f"{c}")

    return [
        ("GET", "/model?tag=a&tag=b&q=c&q=d"),
        ("GET", "/model?tag=a&tag=b&tag=c"),
        ("GET", "/headers", {"x": "1"}),
        ("GET", "/cookie", {"cookie": "c=1"}),
    ]


@cacheable
class Cached(BaseModel, frozen=True):
    limit: int = 1


@feature()
def models_of_a_query_that_are_cached(app: FastAPI, router: APIRouter, events: list[Any]) -> Sequence[Call]:
    def count(page: Cached) -> Cached:
        events.append("validated")
        return page.model_copy(update={"limit": len(events)})

    @router.get("/cached")
    async def cached(page: Annotated[Cached, Query()]) -> Response:
        return PlainTextResponse(f"{page}")

    @router.get("/counted")
    async def counted(page: Annotated[Cached, Query(), AfterValidator(count)]) -> Response:
        return PlainTextResponse(f"{page}")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return JSONResponse([each.pop("msg", "gone") for each in error.errors()], 422)

    return [("GET", path) for path in ("/cached?limit=2", "/cached?limit=x", "/counted?limit=2") for _ in range(2)]


@feature()
def route_class_that_reads_the_body(_: FastAPI, router: APIRouter, __: list[Any]) -> Sequence[Call]:
    base: Any = router.route_class

    class Explaining(base):  # type: ignore[misc]  # APIRoute or PublicRoute
        def get_route_handler(self) -> Callable[[Request], Any]:
            answer = super().get_route_handler()

            async def explain(request: Request) -> Response:
                try:
                    response: Response = await answer(request)
                except RequestValidationError as error:
                    body = (await request.body()).decode()
                    raise HTTPException(422, {"errors": error.errors(), "body": body}) from error
                return response

            return explain

    router.route_class = Explaining

    @router.post("/items")
    async def items(item: Item) -> Response:
        return PlainTextResponse(f"{item}")

    return [("POST", "/items", JSON, b'{"name": 1}'), ("POST", "/items", JSON, b'{"name": "a"}')]


@feature()
def route_class_that_logs_the_body(_: FastAPI, router: APIRouter, events: list[Any]) -> Sequence[Call]:
    base: Any = router.route_class

    class Logging(base):  # type: ignore[misc]  # APIRoute or PublicRoute
        def get_route_handler(self) -> Callable[[Request], Any]:
            answer = super().get_route_handler()

            async def log(request: Request) -> Response:
                events.append(await request.body())
                response: Response = await answer(request)
                return response

            return log

    router.route_class = Logging

    @router.post("/items")
    async def items(item: Item) -> Response:
        return PlainTextResponse(f"{item}")

    return [("POST", "/items", JSON, b'{"name": "a"}'), ("POST", "/items", JSON, b"")]


@feature()
def route_class_with_its_own_request(_: FastAPI, router: APIRouter, __: list[Any]) -> Sequence[Call]:
    base: Any = router.route_class

    class Packed(Request):
        async def body(self) -> bytes:
            if not hasattr(self, "_body"):
                self._body = gzip.decompress(await super().body())
            return self._body

    class Unpacking(base):  # type: ignore[misc]  # APIRoute or PublicRoute
        def get_route_handler(self) -> Callable[[Request], Any]:
            answer = super().get_route_handler()

            async def unpack(request: Request) -> Response:
                response: Response = await answer(Packed(request.scope, request.receive))
                return response

            return unpack

    router.route_class = Unpacking

    @router.post("/items")
    async def items(item: Item) -> Response:
        return PlainTextResponse(f"{item}")

    return [("POST", "/items", {**JSON, "content-encoding": "gzip"}, gzip.compress(b'{"name": "a"}'))]


class Harness:
    """Builds an application with a feature, and sends the requests of the feature."""

    def __init__(self, make: Callable[..., FastAPI], route_class: type[APIRoute]) -> None:
        self._make = make
        self._route_class = route_class

    async def to(self, of: Feature, options: dict[str, Any], *, on: bool = True) -> list[Any]:
        events: list[Any] = []
        root_path = options.pop("root_path", "")
        app = self._make(**options)
        app.add_exception_handler(StarletteHTTPException, http_exception_handler)  # type: ignore[arg-type]
        app.add_exception_handler(RequestValidationError, request_validation_exception_handler)  # type: ignore[arg-type]
        router = APIRouter(route_class=self._route_class)
        requests = of(app, router, events)
        app.include_router(router)
        if isinstance(app, Application):
            app.compiled_routes.start(is_on=on)
        else:
            app.add_middleware(AccessLog)
        found: list[Any] = []
        async with app.router.lifespan_context(app) as state:

            async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
                await started(app)({**scope, "state": dict(state or {})}, receive, send)

            transport = httpx.ASGITransport(with_state, raise_app_exceptions=False, root_path=root_path)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                for method, path, *rest in requests:
                    headers, body = (*rest, None, None)[:2]
                    async with asyncio.timeout(20):
                        answer = await http.request(method, path, headers=headers, content=body)
                    assert b"has not started" not in answer.content, "the feature was not reached"
                    kept = [each for each in answer.headers.multi_items() if each[0] not in OWN_HEADERS]
                    found.append((method, path, answer.status_code, sorted(kept), answer.content))
        return [*found, events]


@pytest.mark.parametrize(("of", "options"), FEATURES, ids=[of.__name__ for of, _ in FEATURES])
async def test_a_documented_feature_gives_the_same_responses_as_in_plain_fastapi(
    of: Feature, options: dict[str, Any]
) -> None:
    plain = await Harness(lambda **options: FastAPI(redirect_slashes=False, **options), APIRoute).to(of, {**options})
    compiled = Harness(partial(Application, compiled=PublicRoute, outer=[AccessLog]), PublicRoute)
    assert await compiled.to(of, {**options}, on=False) == plain
    assert await compiled.to(of, {**options}, on=True) == plain


async def test_a_mounted_application_can_name_routes_of_its_parent() -> None:
    found = []
    for app, route_class in (
        (FastAPI(), APIRoute),
        (Application(compiled=PublicRoute, outer=[AccessLog]), PublicRoute),
    ):
        router = APIRouter(route_class=route_class)

        @router.get("/value")
        async def value(request: Request) -> Response:
            return PlainTextResponse(str(request.url_for("inner:value")))

        app.include_router(router)
        outer = FastAPI()
        outer.mount("", app, name="inner")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(started(outer)), base_url="http://test") as http:
            found.append((await http.get("/value")).text)
    assert found == ["http://test/value"] * 2


async def test_an_application_in_debug_mode_responds_with_the_traceback() -> None:
    app = Application(compiled=PublicRoute, outer=[AccessLog], debug=True)
    router = APIRouter(route_class=PublicRoute)

    @router.get("/value")
    async def value() -> Response:
        raise RuntimeError("the reason")

    app.include_router(router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(started(app)), base_url="http://test") as http:
        answer = await http.get("/value")
    assert answer.status_code == 500
    assert "RuntimeError: the reason" in answer.text


async def test_the_openapi_document_contains_the_options_of_a_route(settings: Settings, issuer: LocalIssuer) -> None:
    callbacks = APIRouter()

    @callbacks.post("{$callback_url}/done")
    def done(item: Item) -> None:
        """Called by this API."""

    def add(app: FastAPI, route_class: type[APIRoute]) -> None:
        router = APIRouter(route_class=route_class)

        @router.post("/called", callbacks=callbacks.routes, openapi_extra={"x-extra": {"a": 1}}, deprecated=True)
        async def called(callback_url: Annotated[str, Header()]) -> Response:
            return PlainTextResponse(callback_url)

        @router.get("/hidden", include_in_schema=False)
        async def hidden() -> Response:
            return PlainTextResponse("hidden")

        app.include_router(router, tags=["added"])

    plain = FastAPI(generate_unique_id_function=lambda route: route.name)
    add(plain, APIRoute)
    async with running(settings, issuer, change=lambda app: add(app, PublicRoute)) as api:
        document = (await api.http.get("/openapi.json")).json()
        assert (await api.http.get("/hidden")).text == "hidden"
        assert (await api.http.post("/called", headers={"callback-url": "x"})).text == "x"
    assert "/hidden" not in document["paths"]
    declared, expected = document["paths"]["/called"]["post"], plain.openapi()["paths"]["/called"]["post"]
    for name in expected.keys() - {"responses"}:
        assert declared[name] == expected[name], name
    assert declared["x-extra"] == {"a": 1}
    assert list(declared["callbacks"]) == ["done"]
