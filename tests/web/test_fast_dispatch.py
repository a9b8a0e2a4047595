"""FAST_DISPATCH changes neither responses nor log lines; the time of a request is linear in the size of its input."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from time import process_time
from typing import Any
from uuid import UUID

import pytest
from fastapi.routing import iter_route_contexts
from starlette.types import Message, Receive, Scope, Send

from backend.auth.testing import LocalIssuer
from backend.settings import Settings
from backend.users.caller import CallerRoute, Permission
from backend.web.arguments import Arguments
from tests.conftest import Api, Person, running

TASKS = "/api/v1/tasks"
UNKNOWN = "00000000-0000-4000-8000-000000000000"
Request = tuple[dict[str, str], str, bytes | None]  # headers, query string, body

QUERIES = [
    "limit=5&sort=title&deleted=true&count=exact",
    "limit=0",
    "limit=a&limit=2",
    "limit=1&limit=2",
    "tag=a&tag=b&status=todo&status=done",
    "tag=&status=",
    "tag=%00&q=%00",
    "x=1&y=2&y=3",
    "limit&cursor",
    "cursor=abc&since=abc",
    "due_before=never&overdue=1",
]
HEADERS = [
    {},
    {"Idempotency-Key": "", "Last-Event-ID": "nonsense"},
    {"Idempotency-Key": "k" * 256, "Last-Event-ID": "x" * 301},
    {"If-Match": '"1"', "If-None-Match": "*"},
    {"If-Match": '"77"', "Accept-Encoding": "gzip"},
    {"Origin": "https://app.example.com"},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer nonsense"},
]
BODIES = [
    b"",
    b"{",
    b"null",
    b"[1]",
    b'"text"',
    b"{}",
    b'{"title": "", "status": "nonsense", "nonsense": [1], "due_at": 1}',
    b'{"title": null, "name": null, "locale": "x y", "time_zone": 3}',
    b'{"operations": [{"op": "create"}, {"op": "update", "id": 1}, {"op": "nonsense"}, 4]}',
    b'{"operations": []}',
    b'{"title": "a", "title": "b"}',
    b" " * 2_000_000,
]
VOLATILE = [
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32}"), "<id>"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)"), "<time>"),
    (re.compile(r"\bWy[A-Za-z0-9_-]+"), "<token>"),  # a cursor or sync token: a JSON list in base64url
    (re.compile(r"\d{4}-\d\d-\d\d"), "<date>"),
]


def masked(value: Any) -> Any:
    """Without ids, times and tokens, which differ between two users."""
    match value:
        case str():
            for pattern, name in VOLATILE:
                value = pattern.sub(name, value)
            return value
        case dict():
            return {key: masked(member) for key, member in value.items()}
        case UUID():
            return "<id>"
    return value


@dataclass
class Variant:
    """An application, an administrator with some data, and the names of the compiled routes that were used."""

    api: Api
    ada: Person
    ids: dict[str, str] = field(default_factory=dict)
    fast: set[str] = field(default_factory=set)

    async def prepare(self) -> None:
        tag = await self.ada.post("/api/v1/tags", {"name": "first"})
        other = self.api.person()
        self.ids = {
            TASKS: (await self.ada.task("first", tags=["first"]))["id"],
            "/api/v1/tags": tag.json()["id"],
            "/api/v1/admin/users": (await other.get("/api/v1/users/me")).json()["id"],
        }

    async def answer(self, method: str, path: str, request: Request, caplog: pytest.LogCaptureFixture) -> Any:
        headers, query, body = request
        kind = {"Content-Type": "application/json"} if body is not None else {}
        caplog.clear()
        response = await self.ada.request(method, f"{path}?{query}", headers={**kind, **headers}, content=body)
        await asyncio.sleep(0)  # access log lines are written in the next iteration of the event loop
        logged = [
            (each.levelname, each.name, each.getMessage().partition("\n")[0], vars(each).get("fields", {}))
            for each in caplog.records
            if each.name.startswith("backend")
        ]
        for *_, fields in logged:
            fields.update(dict.fromkeys(fields.keys() & {"ms", "request_id", "trace_id"}))
        ignored = ("date", "x-request-id", "ratelimit", "ratelimit-policy")
        members = {name: value for name, value in response.headers.items() if name not in ignored}
        if "content-encoding" in members:
            members["content-length"] = "of compressed ids"
        lines = [(*line, masked(fields)) for *line, fields in logged]
        return response.status_code, masked(members), masked(response.text), lines


@pytest.fixture
async def variants(
    settings: Settings, issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[Variant]]:
    answer = CallerRoute.answer

    async def noted(
        route: CallerRoute,
        permission: Permission | None,
        arguments: Arguments,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        next(variant for variant in both if variant.api.app is scope["app"]).fast.add(route.name)
        await answer(route, permission, arguments, scope, receive, send)

    monkeypatch.setattr(CallerRoute, "answer", noted)
    async with AsyncExitStack() as stack:
        both: list[Variant] = []
        for value in ("on", "off"):
            changed = settings.model_copy(update={"fast_dispatch": value})
            api = await stack.enter_async_context(running(changed, issuer))
            both.append(Variant(api, api.person(role="admin")))
            await both[-1].prepare()
        yield both


def operations(api: Api) -> list[tuple[str, str, bytes | None]]:
    """Method, path and a valid body of every operation. The one that deletes the account is last."""
    document = api.app.openapi()
    found = []
    for path, item in document["paths"].items():
        for method, operation in item.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            body = None
            if content is not None:
                schema = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
                body = json.dumps(schema["examples"][0]).encode()
            found.append((method.upper(), path, body))
    return sorted(found, key=lambda each: each[:2] == ("DELETE", "/api/v1/users/me"))


def requests(method: str, valid: bytes | None) -> Iterator[Request]:
    """Each kind of input alone. The valid request is last, because it may delete what the others need."""
    yield from (({}, query, None) for query in QUERIES)
    yield from ((headers, "", valid) for headers in HEADERS[1:])
    if method in ("POST", "PUT", "PATCH"):
        yield from (({}, "", body) for body in BODIES)
        yield {"Content-Type": "text/plain"}, "", b"{}"
        yield {"Content-Type": "application/merge-patch+json; charset=utf-8"}, "", valid
    yield {}, "", valid


async def test_fast_dispatch_does_not_change_the_response_of_any_operation(
    variants: list[Variant], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "backend")
    statuses = set()
    for method, path, body in operations(variants[0].api):
        if path == f"{TASKS}/events":
            continue  # a stream, see below
        for request in requests(method, body):
            for kind in ("own", UNKNOWN, "1") if "{id}" in path else ("own",):
                answers = []
                for variant in variants:
                    own = path.replace(
                        "{id}", variant.ids.get(path.partition("/{id}")[0], "") if kind == "own" else kind
                    )
                    answers.append(await variant.answer(method, own, request, caplog))
                assert answers[0] == answers[1], (method, path, kind, request)
                statuses.add(answers[0][0])
    assert statuses >= {200, 201, 204, 304, 400, 401, 404, 412, 413, 415, 422}
    assert len(variants[0].fast) > 20
    assert variants[1].fast == set()


def scope_of(
    api: Api, path: str, *, method: str = "GET", query: bytes = b"", headers: Sequence[tuple[bytes, bytes]] = ()
) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "query_string": query,
        "headers": [(b"host", b"localhost"), *headers],
        "server": ("localhost", 8000),
        "client": ("127.0.0.1", 1),
        "state": dict(api.state),
    }


async def test_fast_dispatch_does_not_change_the_start_of_a_stream(variants: list[Variant]) -> None:
    begun = []
    for variant in variants:
        started = asyncio.Event()

        async def receive(started: asyncio.Event = started) -> Message:
            await started.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message, started: asyncio.Event = started) -> None:
            if message["type"] == "http.response.start":
                headers = [each for each in message["headers"] if each[0] != b"x-request-id"]
                begun.append((message["status"], sorted(headers)))
                started.set()

        bearer = (b"authorization", variant.ada.bearer["Authorization"].encode())
        await variant.api.app(scope_of(variant.api, f"{TASKS}/events", headers=[bearer]), receive, send)
    assert begun[0] == begun[1]
    assert begun[0][0] == 200
    assert "stream_changes" in variants[0].fast


@pytest.mark.parametrize("value", ["on", "off"])
async def test_the_number_of_compiled_routes_is_logged_at_start(
    settings: Settings, issuer: LocalIssuer, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    caplog.set_level(logging.INFO, "backend.web.dispatch")
    async with running(settings.model_copy(update={"fast_dispatch": value}), issuer) as api:
        routes = sum(1 for _ in iter_route_contexts(api.app.routes))
    (line,) = [each.getMessage() for each in caplog.records if each.name == "backend.web.dispatch"]
    numbers = [int(each) for each in re.findall(r"\d+", line)]
    assert line == "routes: {} by fast dispatch, {} by FastAPI".format(*numbers)
    assert sum(numbers) == routes
    assert numbers[0] > 20 if value == "on" else numbers[0] == 0


def repeated(text: bytes) -> Callable[[int], bytes]:
    return lambda size: text * (size // len(text))


def numbered(text: str) -> Callable[[int], bytes]:
    return lambda size: "".join(text.format(number) for number in range(size // len(text))).encode()


Sized = Callable[[int], bytes]


def query(of: Sized) -> Callable[[Api, int], Scope]:
    return lambda api, size: scope_of(api, TASKS, query=of(size))


def path(of: Sized) -> Callable[[Api, int], Scope]:
    return lambda api, size: scope_of(api, of(size).decode())


def header(name: bytes, of: Sized) -> Callable[[Api, int], Scope]:
    return lambda api, size: scope_of(api, TASKS, headers=[(name, of(size))])


def headers(name: str, value: bytes) -> Callable[[Api, int], Scope]:
    """Many headers. `name`: with {} for a number."""
    return lambda api, size: scope_of(
        api, TASKS, headers=[(name.format(number).encode(), value) for number in range(size // 10)]
    )


@dataclass
class Body:
    """A POST with a JSON document, of which the part between `begin` and `end` grows."""

    begin: bytes
    of: Sized
    end: bytes
    path: str = TASKS

    def __call__(self, api: Api, size: int) -> Scope:
        content = self.begin + self.of(size) + self.end
        fields = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        return {**scope_of(api, self.path, method="POST", headers=fields), "content": content}


GROWING: dict[str, Callable[[Api, int], Scope]] = {
    "query string: lists": query(repeated(b"tag=x&")),
    "query string: unknown names": query(numbered("a{}=&")),
    "query string: one name": query(repeated(b"limit=1&")),
    "query string: one value": query(lambda size: b"q=" + b"a" * size),
    "query string: escapes": query(repeated(b"%C3%A9=%00&")),
    "path: one segment": path(lambda size: b"/api/v1/tasks/" + b"0" * size),
    "path: many segments": path(repeated(b"/a")),
    "headers: many": headers("x-{}", b"1"),
    "headers: one name": headers("if-match", b'"1"'),
    "headers: accept-encoding": headers("accept-encoding", b"br"),
    "headers: a long list": header(b"if-match", repeated(b'"1",')),
    "headers: a long value": header(b"idempotency-key", repeated(b"k")),
    "headers: a long token": header(b"authorization", lambda size: b"Bearer " + b"a" * size),
    "headers: a long origin": header(b"origin", lambda size: b"https://" + b"a" * size),
    "cookies: many": header(b"cookie", numbered("c{}=1; ")),
    "cookies: headers": headers("cookie", b"c=1"),
    "body: members": Body(b"{", numbered('"a{}":0,'), b'"z":0}'),
    "body: one long member": Body(b'{"title":"', repeated(b"a"), b'"}'),
    "body: a list": Body(b'{"title":"a","tags":[', repeated(b'"",'), b'""]}'),
    "body: a list of objects": Body(b'{"operations":[', repeated(b'{"op":""},'), b"{}]}", f"{TASKS}/batch"),
    "body: nested": Body(b"", repeated(b"["), b""),
}


@pytest.mark.parametrize("kind", GROWING)
async def test_the_time_of_a_request_is_linear_in_the_size_of_its_input(api: Api, kind: str) -> None:
    """For eight times the input, a linear algorithm needs eight times the time, a quadratic one 64 times."""
    ada, first, last = api.person(), 8_000, 64_000
    await ada.get(TASKS)

    async def seconds(size: int) -> float:
        scope = GROWING[kind](api, size)
        if not kind.endswith("token"):
            scope["headers"].append((b"authorization", ada.bearer["Authorization"].encode()))
        content = scope.pop("content", b"")
        times, sent = [], []

        async def receive() -> Message:
            return {"type": "http.request", "body": content}

        async def send(message: Message) -> None:
            sent.append(message)

        for _ in range(5):
            started = process_time()
            await api.app({**scope, "headers": [*scope["headers"]], "state": dict(api.state)}, receive, send)
            times.append(process_time() - started)
        assert sent[0]["status"] < 500
        return min(times)

    await seconds(first)
    assert await seconds(last) < 2 * (last / first) * await seconds(first)
