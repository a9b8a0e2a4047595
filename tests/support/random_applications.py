"""Random applications: routers, dependencies, parameters, responses, exception handlers; and requests to them."""

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from enum import Enum
from functools import partial, wraps
from itertools import count
from random import Random
from typing import Annotated, Any, ClassVar, Literal
from uuid import UUID

from fastapi import (
    APIRouter,
    BackgroundTasks,
    Body,
    Cookie,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Path,
    Query,
    Request,
    Response,
    Security,
)
from fastapi.exception_handlers import http_exception_handler, request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.security import APIKeyHeader, HTTPBearer, SecurityScopes
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Json, RootModel, model_validator
from starlette.background import BackgroundTask
from starlette.requests import HTTPConnection
from starlette.routing import Host, Mount, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.operations.access_log import AccessLog
from backend.users.caller import CurrentCaller, Permission
from backend.web.application import Application
from backend.web.arguments import Arguments
from backend.web.parameters import cacheable
from backend.web.start_up import STATE
from tests.support.public_route import PublicRoute

Log = list[Any]
Parameters = Sequence[tuple[Any, Any]]  # annotation, default

NONE = inspect.Parameter.empty
CLOCK = Counter({"now": 0})  # read by validators


class CountedRoute(PublicRoute):
    """Counts the requests of compiled dispatch."""

    fast: ClassVar[Counter[str]] = Counter()

    async def answer(
        self, permission: Permission | None, arguments: Arguments, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.fast["requests"] += 1
        await super().answer(permission, arguments, scope, receive, send)


class Stamped(CountedRoute):
    """A custom route class, as FastAPI's documentation shows them."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()

        async def stamp(request: Request) -> Response:
            response = await handler(request)
            response.headers["X-Stamp"] = "stamped"
            return response

        return stamp


class Colour(Enum):
    red = "red"
    blue = "blue"


class Page(BaseModel):
    limit: int = Field(default=1, ge=1, le=9)
    q: str | None = None


@cacheable
class Frozen(Page):
    model_config = ConfigDict(frozen=True)

    tag: tuple[str, ...] = ()


@cacheable
class Forbids(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    x: Colour = Colour.red
    when: date


class Allows(BaseModel):
    model_config = ConfigDict(extra="allow")

    tag: list[int] = []
    limit: float = 1


class InputOrder(BaseModel):
    """Contains the order in which its members were passed."""

    model_config = ConfigDict(frozen=True)

    limit: int = 1
    q: str = ""

    @model_validator(mode="before")
    @classmethod
    def show(cls, given: Any) -> Any:
        return {"q": repr(given)}


class TimeDependent(BaseModel):
    """Depends on the time as well as the query string."""

    model_config = ConfigDict(frozen=True)

    q: Annotated[str, AfterValidator(lambda value: f"{value} at {CLOCK['now']}")] = ""


class Unusual(BaseModel):
    """Lists in unions, and a list in one JSON value."""

    tag: Annotated[list[str], Field(max_length=2)] | None = None
    q: Json[list[int]] | None = None
    x: dict[str, int] | None = None


class FromJson(BaseModel):
    q: Json[list[int]] = []


class Renamed(BaseModel):
    limit: int = Field(default=1, alias="most")


class Root(RootModel[dict[str, Any]]):
    pass


class Headers(BaseModel):
    x_key: str
    x_list: list[int] = []


class Item(BaseModel):
    name: str
    price: float = 1
    tags: list[str] = []


class Pet(BaseModel):
    kind: Literal["cat", "dog"]


# Of queries, headers and special parameters, the first are those that dispatch compiles.
QUERIES: Parameters = [
    *((Annotated[model, Query()], NONE) for model in (Page, Frozen, Forbids, Allows, InputOrder, TimeDependent)),
    *((Annotated[model, Query()], NONE) for model in (Unusual, FromJson, Renamed, Root)),
    (Annotated[Frozen, Query(), AfterValidator(lambda page: page.model_copy(update={"limit": CLOCK["now"]}))], NONE),
    (Annotated[Page | None, Query()], None),
    (Annotated[Page, Query()], Page(limit=7)),
    (int, NONE),
    (str | None, None),
    (bool, False),
    (Annotated[int, Query(ge=2, alias="limit")], 3),
    (Annotated[list[int], Query(alias="tag")], []),
    (Annotated[set[str] | None, Query(alias="tag")], None),
    (Annotated[Literal["a", "b"], Query(alias="q")], "a"),
]
COMPILED_QUERIES = QUERIES[:6]
HEADERS: Parameters = [
    (Annotated[str, Header(alias="X-Key")], NONE),
    (Annotated[str | None, Header(alias="X-Key")], None),
    (Annotated[int, Header(alias="X-Key")], 5),
    (Annotated[str, Header(alias="X-Key", max_length=2)], "none"),
    (Annotated[bool, Header(convert_underscores=False)], False),
    (Annotated[int, Header(alias="X-Key", validate_default=True)], "6"),
    (Annotated[Colour, Header(alias="X-Key")], Colour.blue),
    (Annotated[str, Header(alias="X-Key", default_factory=lambda: "made")], NONE),
    (Annotated[list[str] | None, Header(alias="X-List")], None),
    (Annotated[Annotated[list[str], Field(max_length=2)] | None, Header(alias="X-List")], None),
    (Annotated[Json, Header(alias="X-Key")], None),
    (Annotated[Headers, Header()], NONE),
    (Annotated[str, Header(convert_underscores=False)], "d"),
]
COMPILED_HEADERS = HEADERS[:5]
COOKIES: Parameters = [(Annotated[str, Cookie(alias="c")], NONE), (Annotated[int | None, Cookie(alias="c")], None)]
BODIES: Parameters = [
    (Item, NONE),
    (Item | None, None),
    (Item, Item(name="default", tags=["shared"])),
    (list[int], NONE),
    (dict[str, Any], NONE),
    (Annotated[Any, Body()], NONE),
    (Annotated[int, Body()], 1),
    (Annotated[bytes, Body()], NONE),
    (Item | Pet, NONE),
    (Annotated[Item, Body(embed=True)], NONE),
    (Annotated[int, Body(validate_default=True)], "1"),
    (Annotated[list[Item], Body(default_factory=list)], NONE),
]
SPECIAL = [Request, HTTPConnection, Response, BackgroundTasks, SecurityScopes]
COMPILED_SPECIAL = SPECIAL[:2]

OWN_PATHS = ("/docs", "/openapi.json")
METHODS = ["GET", "POST", "PUT"]
PREFIXES = ["/v", "/a"]
PATHS = [
    ("/a", []),
    ("/a/b", []),
    ("/b", []),
    ("/c", []),
    ("/c/{x}", ["x"]),
    ("/{x}", ["x"]),
    ("/a/{x}", ["x"]),
    ("/{x}/b", ["x"]),
    ("/a-{x}", ["x"]),
    ("/{x:int}", ["x"]),
    ("/a/{x:uuid}", ["x"]),
    ("/b/{rest:path}", ["rest"]),
]
VALUES = ["a", "b", "1", "007", "00000000-0000-4000-8000-000000000000", "ab/c", "\u00e9", "{x}"]
SENT_QUERIES = [
    "limit=2", "limit=x", "limit=3", "q=a", "q=[1]", "q=", "tag=1", "tag=2", "when=2020-02-02", "x=red", "x=1",
    "query=1", "more=1", "more=2", "most=2", "%FF=%FF", "limit", "query=a",
]  # fmt: skip
SENT_HEADERS = [
    (b"x-key", b"1"), (b"x-key", b"red"), (b"x-key", b"long"), (b"x-key", b"\xe9"), (b"x-list", b"1"),
    (b"x-list", b"2"), (b"cookie", b"c=1; d=2"), (b"cookie", b"c=x"), (b"authorization", b"Bearer abc"),
    (b"host", b"a.example"), (b"header0", b"h"), (b"x_key", b"under"),
]  # fmt: skip
SENT_BODIES = [
    b'{"name": "a"}', b'{"name": "a"}', b'{"name": 1, "price": "x"}', b'{"body": {"name": "a"}, "other": 1}',
    b'{"kind": "cat"}', b"[1, 2]", b"3", b"null", b"{", b"", b"\xff", b'{"name": "a", "name": "b"}', b"text",
]  # fmt: skip
CONTENT_TYPES = [
    None, b"", b"text/plain", b"application/json; charset=utf-8", b"application/merge-patch+json", b"APPLICATION/JSON",
    b"application/json/x", b"application/xml",
]  # fmt: skip


class CustomError(Exception):
    """Has a handler in some applications."""


class CustomSubclass(CustomError):
    pass


ERRORS: Sequence[Callable[[], Exception]] = [
    lambda: HTTPException(418, {"why": "tea"}, {"X-Why": "tea"}),
    lambda: HTTPException(404),
    lambda: CustomError("refused"),
    lambda: CustomSubclass("worse"),
    lambda: RuntimeError("secret"),
    lambda: RequestValidationError([{"loc": ("body", "x"), "msg": "by hand", "type": "hand", "input": 1}]),
]


def described(value: Any) -> Any:
    """An argument as text that is the same for each request."""
    match value:
        case Request():
            known = {name: value.scope[name] for name in ("method", "path", "path_params")}
            return type(value).__name__, known, value.scope["route"].path, value.scope["endpoint"].__name__
        case HTTPConnection() | Response() | BackgroundTasks():
            return type(value).__name__
        case SecurityScopes():
            return value.scopes
    return repr(value)


@dataclass
class RandomRequest:
    """A request, sent without a server. `times`: some are sent twice, because query strings are cached."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: list[bytes]
    disconnects: bool
    times: int

    async def of(self, app: ASGIApp) -> Any:
        """Return status, headers and body, or an exception that reaches the server."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "query_string": self.query,
            "headers": [(b"host", b"test"), (b"x-request-id", b"same"), *self.headers],
            "server": ("test", 80),
            "client": ("127.0.0.1", 1),
            "state": {STATE: None},
        }
        chunks, sent = list(self.body) or [b""], list[Message]()

        async def receive() -> Message:
            if chunks:
                return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks) or self.disconnects}
            if not self.disconnects:
                await asyncio.Event().wait()  # the client reads
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        try:
            async with asyncio.timeout(20):
                await app(scope, receive, send)
        except Exception as error:  # noqa: BLE001  # compared like a response
            return type(error).__name__, str(error), sent
        return sent[0]["status"], sorted(sent[0]["headers"]), b"".join(each.get("body", b"") for each in sent[1:])


@dataclass
class Case:
    """An application, the log of its functions, and requests to it."""

    app: Application
    log: Log
    requests: list[RandomRequest]

    @classmethod
    def of(cls, random: Random) -> "Case":
        builder = _Builder(random)
        app = builder.application()
        return cls(app, builder.log, [builder.request(app) for _ in range(6 + builder.below(7))])

    def __str__(self) -> str:
        lines = []
        for each in iter_route_contexts(self.app.routes):
            signature = getattr(each.endpoint, "__signature__", "")
            lines.append(f"{each.methods} {each.path} {type(each.original_route).__name__} {signature}")
        return "\n".join(lines)


@dataclass
class _Builder:
    """Builds one application at random. Its functions record their calls in `log`.

    Dispatch compiles most `plain` parts, and all parts of an application that `is_supported`.
    """

    random: Random
    log: Log = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=count)
    dependencies: list[Any] = field(default_factory=list)
    plain_dependencies: list[Any] = field(default_factory=list)
    is_supported: bool = False

    def below(self, limit: int) -> int:
        return self.random.randrange(limit)

    def one_of(self, choices: Sequence[Any]) -> Any:
        return self.random.choice(choices)

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def unsupported(self, percent: int) -> bool:
        """Whether to add something that dispatch does not compile."""
        return self.chance(percent) and not self.is_supported

    # Functions

    def signature(self, *, path: Sequence[str], body: bool, plain: bool) -> inspect.Signature:
        chosen: list[tuple[str, Any, Any]] = []
        for name in path:
            if self.chance(70):
                chosen.append((name, self.one_of([str, int, UUID, Annotated[str, Path(max_length=2)]]), NONE))
            if self.unsupported(3):
                chosen.append(("other_path", Annotated[str, Path(alias="z")], NONE))
        queries = COMPILED_QUERIES if plain and not self.unsupported(10) else QUERIES
        headers = COMPILED_HEADERS if plain and not self.unsupported(10) else HEADERS
        special = COMPILED_SPECIAL if plain else SPECIAL
        if self.chance(50):
            chosen.append(("query", *self.one_of(queries)))
        chosen += [(f"header{number}", *self.one_of(headers)) for number in range(self.below(3))]
        if not plain and self.chance(30):
            chosen.append(("cookie", *self.one_of(COOKIES)))
        if body and self.chance(60):
            chosen.append(("body", *self.one_of(BODIES)))
            if not plain and self.chance(20):
                chosen.append(("other_body", *self.one_of(BODIES)))
        chosen += [(f"given_{each.__name__}", each, NONE) for each in self.random.sample(special, self.below(3))]
        if self.chance(15):
            chosen.append(("caller", CurrentCaller, NONE))
        if self.dependencies:
            chosen += [(f"needs{number}", Any, self.depends(plain=plain)) for number in range(self.below(3))]
        return inspect.Signature(
            [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
                for name, annotation, default in chosen
            ]
        )

    def depends(self, *, plain: bool) -> Any:
        if plain and not self.unsupported(5):
            return Depends(self.one_of(self.plain_dependencies))
        dependency = self.one_of(self.dependencies)
        return self.one_of(
            [
                Depends(dependency),
                Depends(dependency, use_cache=False),
                Security(dependency, scopes=["read"]),
                Security(dependency),
            ]
        )

    def enter(self, name: str, values: dict[str, Any]) -> str:
        """The body of each function: log its arguments, and modify mutable ones."""
        self.log.append((name, {key: described(values[key]) for key in sorted(values)}))
        for key, value in values.items():
            match value:
                case BackgroundTasks():
                    value.add_task(self.log.append, f"task of {name}")
                case Item():
                    value.tags.append(key)
                case Response():
                    value.headers["X-Set"] = name
                    value.set_cookie("set", name)
        return f"result of {name}"

    def add_dependency(self) -> None:
        """Add a dependency, which may need earlier ones."""
        name = f"d{next(self.numbers)}"
        plain = self.is_supported or not self.dependencies or self.chance(60)
        path = ["x"] if self.chance(5) else []
        signature = self.signature(path=path, body=not plain and self.chance(10), plain=plain)
        error = self.one_of(ERRORS) if self.chance(8) else None

        def run(values: dict[str, Any]) -> str:
            result = self.enter(name, values)
            if error is not None:
                raise error()
            return result

        async def plain_async(**values: Any) -> str:
            return run(values)

        def plain_sync(**values: Any) -> str:
            return run(values)

        async def yields_async(**values: Any) -> AsyncIterator[str]:
            result = run(values)
            try:
                yield result
            except Exception as raised:
                self.log.append((name, "saw", type(raised).__name__))
                raise
            finally:
                self.log.append((name, "is closed"))

        def yields_sync(**values: Any) -> Iterator[str]:
            result = run(values)
            try:
                yield result
            finally:
                self.log.append((name, "is closed"))

        class FromClass:
            def __init__(self, **values: Any) -> None:
                self.result = run(values)

            def __repr__(self) -> str:
                return self.result

        class CallsAsync:
            async def __call__(self, **values: Any) -> str:
                return run(values)

        class CallsSync:
            def __call__(self, **values: Any) -> str:
                return run(values)

        class Unhashable(CallsAsync):
            __hash__ = None  # type: ignore[assignment]

        @wraps(plain_sync)
        async def wrapped(**values: Any) -> str:
            return f"wrapped {run(values)}"

        kinds: Sequence[Any] = [
            *(plain_async, yields_async, plain_sync, yields_sync, FromClass, CallsAsync(), CallsSync(), Unhashable()),
            *(wrapped, partial(plain_async)),
        ]
        kind: Any = plain_async if plain else self.one_of(kinds)
        kind.__signature__ = signature
        self.dependencies.append(kind)
        if plain:
            self.plain_dependencies.append(kind)
        elif self.chance(20):
            self.dependencies.append(self.one_of([HTTPBearer(auto_error=False), APIKeyHeader(name="X-Key")]))

    def handler(self, path: Sequence[str], *, body: bool) -> tuple[Any, dict[str, Any]]:
        """A handler, and options of its route."""
        name = f"h{next(self.numbers)}"
        plain = self.is_supported or self.chance(88)
        signature = self.signature(path=path, body=body, plain=plain)
        error = self.one_of(ERRORS) if self.chance(6) else None
        responses: Sequence[tuple[Any, Callable[[str], Any]]] = [
            (Response, PlainTextResponse),
            (PlainTextResponse, partial(PlainTextResponse, status_code=201, headers={"X-Own": "1"})),
            (Response, lambda text: JSONResponse({"text": text}, 203)),
            (Response, lambda text: StreamingResponse(iter([text, "end"]))),
            (Response, lambda _: RedirectResponse("/elsewhere")),
            (Response, lambda text: Response(text, background=BackgroundTask(self.log.append, f"after {name}"))),
        ]
        others: Sequence[tuple[Any, Callable[[str], Any]]] = [
            (Response, lambda _: None),
            (Response, lambda text: {"name": text, "extra": 1}),
            (None, lambda _: None),
            (dict, lambda text: {"text": text, "none": None}),
            (Item, lambda text: Item(name=text)),
            (Item, lambda text: {"name": text, "extra": 1}),
            (list[Item], lambda text: [Item(name=text)]),
            (Item, lambda _: {"nonsense": 1}),
            (NONE, lambda text: {"text": text}),
            (NONE, PlainTextResponse),
        ]
        returned, result = self.one_of(responses if plain and not self.unsupported(15) else [*responses, *others])

        def run(values: dict[str, Any]) -> Any:
            text = self.enter(name, values)
            if error is not None:
                raise error()
            return result(f"{text}: { {key: described(values[key]) for key in sorted(values)} }")

        async def handle(**values: Any) -> Any:
            return run(values)

        def handle_sync(**values: Any) -> Any:
            return run(values)

        async def stream(**values: Any) -> AsyncIterator[str]:
            yield run(values) and "streamed"

        handler: Any = handle if plain else self.one_of([handle, handle_sync, stream])
        if handler is stream:
            returned = AsyncIterator[str]
        handler.__name__ = name
        handler.__signature__ = signature.replace(return_annotation=returned)
        handler.__annotations__ = {} if returned is NONE else {"return": returned}
        return handler, self.options(returned, plain=plain)

    def options(self, returned: Any, *, plain: bool) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.chance(30):
            options["status_code"] = self.one_of([200, 201, 202, 204] if returned in (None, Response) else [200, 201])
        if returned is None and self.chance(60):
            options |= {"status_code": 204, "response_class": Response}
        if self.chance(20) and returned not in (Item, list[Item]):
            options["response_class"] = self.one_of([PlainTextResponse, JSONResponse, Response])
        if returned is Response and self.chance(30) and options.get("status_code") != 204:
            options["response_model"] = self.one_of([Item, None, dict])
        if not plain:
            for name in self.random.sample(["unset", "none", "defaults"], self.below(3)):
                options[f"response_model_exclude_{name}"] = True
            if self.chance(10):
                options["response_model_include"] = {"name"}
            if self.chance(3):
                options["max_body_size"] = 5
        if self.chance(10):
            options["include_in_schema"] = False
        if self.chance(20):
            options["dependencies"] = [self.depends(plain=plain)]
        return options

    # Routes

    def router(self, depth: int) -> APIRouter:
        options: dict[str, Any] = {}
        if self.chance(25):
            options["dependencies"] = [self.depends(plain=not self.unsupported(10))]
        if self.chance(40):
            options["prefix"] = self.one_of(PREFIXES)
        if self.chance(10):
            options["default_response_class"] = PlainTextResponse
        if self.unsupported(5):
            options["strict_content_type"] = False
        router = APIRouter(
            route_class=self.one_of([Stamped, APIRoute]) if self.unsupported(10) else CountedRoute, **options
        )
        for _ in range(1 + self.below(2)):
            path, names = self.one_of(PATHS)
            methods = sorted({self.one_of(METHODS), self.one_of(METHODS)})
            handler, options = self.handler(names, body=methods != ["GET"])
            router.add_api_route(path, handler, methods=methods, **options)
        if depth and self.chance(40):
            self.include(router, self.router(depth - 1), PREFIXES)
        return router

    def include(self, outer: FastAPI | APIRouter, router: APIRouter, prefixes: Sequence[str]) -> None:
        options: dict[str, Any] = {"prefix": self.one_of(prefixes)} if self.chance(30) else {}
        if self.chance(15):
            options["dependencies"] = [self.depends(plain=True)]
        if self.unsupported(2):
            options["max_body_size"] = 5
        outer.include_router(router, **options)

    def add_other_route(self, app: FastAPI) -> None:
        """Add a route of Starlette, or one that is not at the end of the list."""

        async def endpoint(request: Request) -> Response:
            return PlainTextResponse(f"{request.url.path} {request.scope['path_params']}")

        async def websocket(_: Any) -> None:
            """Is not called."""

        path, _ = self.one_of(PATHS)
        other = FastAPI()
        other.add_api_route("/b", endpoint)
        route = self.one_of(
            [
                Mount(self.one_of(["", "/a", "/b"]), PlainTextResponse("mounted")),
                Mount(self.one_of(["/a", "/v/{x}"]), other),
                Host("a.example", PlainTextResponse("hosted")),
                WebSocketRoute(path, websocket),
                APIRoute(path, endpoint, methods=["GET"]),
                CountedRoute(path, endpoint, methods=["GET"]),
            ]
        )
        if self.chance(50):
            app.router.routes.insert(0, route)
        elif self.chance(50):
            app.router.routes.append(route)
        else:
            app.add_route(path, endpoint, methods=["GET"])

    def application(self) -> Application:
        self.is_supported = self.chance(30)
        for _ in range(1 + self.below(4)):
            self.add_dependency()
        dependencies = [self.depends(plain=True)] if self.chance(10) else []
        app = Application(compiled=CountedRoute, outer=[AccessLog], dependencies=dependencies)
        routers = [self.router(2) for _ in range(1 + self.below(2))]
        for router in routers:
            self.include(app, router, [*PREFIXES, "/{y}"])
        if self.chance(10):
            self.include(app, self.one_of(routers), PREFIXES)  # once more
        if self.unsupported(15):
            self.add_other_route(app)
        self.add_exception_handlers(app)
        for _ in range(2):
            if self.chance(10):
                self.add_middleware(app)
        if self.unsupported(3):
            app.dependency_overrides[self.dependencies[0]] = lambda: "overridden"
        return app

    def add_exception_handlers(self, app: FastAPI) -> None:
        """Add exception handlers: FastAPI's own, async and sync ones, and one that raises."""

        async def handle(request: Request, error: Exception) -> Response:
            self.log.append(("handled", request.url.path, type(error).__name__))
            return PlainTextResponse(f"handled {error}", 409)

        def handle_sync(_: Request, error: Exception) -> Response:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                return PlainTextResponse(f"handled {error} in a thread", 410)
            return PlainTextResponse(f"handled {error}", 410)

        async def fail(_: Request, error: Exception) -> Response:
            raise HTTPException(411, f"instead of {error}")

        if self.chance(60):
            app.add_exception_handler(RequestValidationError, request_validation_exception_handler)  # type: ignore[arg-type]
        if self.chance(30):
            app.add_exception_handler(HTTPException, http_exception_handler)  # type: ignore[arg-type]
        for kind in (CustomError, CustomSubclass, 418, RequestValidationError):
            if self.chance(20):
                app.add_exception_handler(kind, self.one_of([handle, handle_sync, fail]))
        if self.chance(10):
            app.add_exception_handler(self.one_of([500, Exception]), self.one_of([handle, handle_sync]))

    def add_middleware(self, app: FastAPI) -> None:
        log, name = self.log, f"m{next(self.numbers)}"

        class Noting:
            def __init__(self, app: ASGIApp) -> None:
                self.app = app

            async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
                log.append((name, "begins"))
                await self.app(scope, receive, send)
                log.append((name, "ends"))

        async def stamp(request: Request, call_next: Callable[[Request], Any]) -> Response:
            response: Response = await call_next(request)
            response.headers["X-Middleware"] = name
            return response

        if self.chance(50):
            app.add_middleware(Noting)
        else:
            app.middleware("http")(stamp)

    def request(self, app: FastAPI) -> RandomRequest:
        route = self.one_of([each for each in iter_route_contexts(app.routes) if each.path not in OWN_PATHS])
        path = str(route.path or "/")
        for name in ("{x}", "{x:int}", "{x:uuid}", "{y}", "{rest:path}"):
            path = path.replace(name, self.one_of(VALUES))
        if self.chance(4):
            path += self.one_of(["/", "\n", "/b", "%2F"])
        methods = sorted(route.methods or METHODS) if self.chance(90) else [*METHODS, "HEAD", "OPTIONS"]
        method = self.one_of(methods)
        query = "&".join(self.one_of(SENT_QUERIES) for _ in range(self.below(5)))
        headers = [self.one_of(SENT_HEADERS) for _ in range(self.below(4))]
        chunks: list[bytes] = []
        if method not in ("GET", "HEAD") or self.chance(5):
            body = self.one_of(SENT_BODIES)
            chunks = [body] if self.chance(80) else [body[:3], body[3:]]
            kind = b"application/json" if self.chance(85) else self.one_of(CONTENT_TYPES)
            if kind is not None:
                headers.append((b"content-type", kind))
            if self.chance(80):
                headers.append((b"content-length", str(len(body)).encode()))
        times = 2 if self.chance(20) else 1
        return RandomRequest(method, path, query.encode(), headers, chunks, self.chance(3), times)
