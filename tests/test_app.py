"""The whole application: authentication, errors, headers, CORS, logs and health."""

import asyncio
import gzip
import inspect
import json
import logging
import re
from collections.abc import AsyncIterator
from http import HTTPStatus
from secrets import token_hex

import pytest
from fastapi.routing import iter_route_contexts
from pydantic import HttpUrl
from sqlalchemy import String, text

from backend.database import Statement
from backend.operations.access_log import AccessLog
from backend.operations.log_lines import Console, JsonLines
from backend.settings import Settings
from backend.tasks.listing import BoundListing
from backend.web import problems
from backend.web.application import Application
from backend.web.middleware import CrossOrigin, HeadAsGet
from backend.web.rate_limits import RateLimiting
from tests.conftest import Api, running

TASKS = "/api/v1/tasks"
PUBLIC = {"/", "/livez", "/readyz", "/metrics", "/openapi.json", "/docs", "/.well-known/oauth-protected-resource"}


async def test_every_route_except_the_public_ones_requires_a_token(api: Api) -> None:
    routes = [
        (method, route.path_format)
        for route in iter_route_contexts(api.app.routes)
        if route.path_format
        for method in route.methods or ()
    ]
    assert len(routes) > len(PUBLIC)
    for method, path in routes:
        response = await api.http.request(method, path.replace("{id}", "019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f"))
        if path.startswith("/.well-known/") and path not in PUBLIC:
            assert response.status_code == 404, path  # the metadata of another resource
        elif path in PUBLIC:
            assert response.status_code in (200, 503), path  # /readyz may report 503
        elif path == "/api/v1/security-events":
            assert response.json()["err"] == "invalid_request"  # authenticated by its body
        else:
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == (
                'Bearer resource_metadata="http://localhost:8000/.well-known/oauth-protected-resource"'
            )
            assert response.json()["code"] == "unauthorized"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/api/v1/nowhere", 404, "not_found"),
        ("PUT", TASKS, 405, "method_not_allowed"),
        ("DELETE", "/livez", 405, "method_not_allowed"),
    ],
)
async def test_unknown_paths_and_methods_need_no_token(
    api: Api, method: str, path: str, status: int, code: str
) -> None:
    response = await api.http.request(method, path)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert ("allow" in response.headers) is (status == 405)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (TASKS, "GET, POST"),
        (f"{TASKS}/019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f", "DELETE, GET, PATCH, PUT"),
        ("/api/v1/users/me", "DELETE, GET, PATCH"),
        ("/livez", "GET"),
    ],
)
async def test_a_405_lists_the_allowed_methods(api: Api, path: str, allowed: str) -> None:
    assert (await api.http.request("TRACE", path)).headers["allow"] == allowed


@pytest.mark.parametrize("path", [f"{TASKS}/", "/livez/", "//livez", "/api/v1//tasks", "/API/v1/tasks"])
async def test_paths_must_match_exactly(api: Api, path: str) -> None:
    """A redirect would have to name a host, and the request can name any host."""
    assert (await api.person().get(f"http://localhost:8000{path}", headers={"Host": "evil.example"})).status_code == 404


async def test_head_is_get_without_content(api: Api) -> None:
    ada = api.person()
    task = await ada.task()
    for path in TASKS, f"{TASKS}/{task['id']}", "/livez":
        get, head = await ada.get(path), await ada.request("HEAD", path)
        assert (head.status_code, head.content) == (200, b"")
        for name in "content-length", "content-type", "etag":
            assert head.headers.get(name) == get.headers.get(name)
    assert (await api.http.head(TASKS)).status_code == 401


class UnreadableBody(AsyncIterator[bytes]):
    async def __anext__(self) -> bytes:
        raise AssertionError("the body was read")


@pytest.mark.parametrize(
    ("authorization", "status"), [(None, 401), ("Bearer", 400), ("Basic YTpi", 401), ("Bearer nonsense", 401)]
)
async def test_an_unauthenticated_request_is_refused_before_its_body_is_read(
    api: Api, authorization: str | None, status: int
) -> None:
    headers = {"Content-Type": "application/json"} | ({"Authorization": authorization} if authorization else {})
    response = await api.http.post(TASKS, content=UnreadableBody(), headers=headers)
    assert response.status_code == status
    too_long = await api.http.post(TASKS, content=b"x" * 70_000, headers=headers)
    assert too_long.status_code == status


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"{'title': 'x'}",
        b'{"title": "a", "title": "b"}',
        b'{"title": "a", "description": {"x": 1, "x": 1}}',
        b'{"title": NaN}',
        b'{"title": "\\ud800"}',
        b'{"title": "\xff"}',
        b'\xef\xbb\xbf{"title": "x"}',
        b"[" * 60_000,
        b'{"title": ' + b"9" * 5_000 + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)
async def test_invalid_json_is_a_422(api: Api, body: bytes) -> None:
    response = await api.person().request("POST", TASKS, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert response.json()["code"] == ("invalid_json" if body else "invalid")
    assert response.json()["errors"][0]["loc"][0] == "body"


async def test_a_body_over_the_limit_is_a_413(api: Api) -> None:
    ada = api.person()
    fits, over = ('{"title":"x"}'.ljust(size) for size in (65_536, 65_537))

    async def in_pieces(body: str) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000].encode()

    for body, status in ((fits, 201), (over, 413)):
        for content in (body.encode(), in_pieces(body)):
            response = await ada.request("POST", TASKS, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code == status
            assert status == 201 or response.json()["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/xml"}, 415),
        ({}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 201),
    ],
    ids=str,
)
async def test_other_content_types_are_a_415(api: Api, headers: dict[str, str], status: int) -> None:
    content = b'{"title": "x"}'
    if "Content-Encoding" in headers:
        content = gzip.compress(content)
    response = await api.person().request("POST", TASKS, content=content, headers=headers)
    assert response.status_code == status
    assert status == 201 or response.json()["code"] == "unsupported_media_type"


async def test_every_response_has_the_security_headers(api: Api) -> None:
    ada = api.person()
    task = await ada.task()
    answers = [
        await ada.get(f"{TASKS}/{task['id']}"),
        await ada.get(TASKS),
        await ada.delete(f"{TASKS}/{task['id']}"),
        await api.http.get(TASKS),
        await api.http.get("/nowhere"),
        await api.http.get("/livez"),
        await ada.post(TASKS, {}),
    ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert answer.headers["cache-control"] == ("private, no-cache" if "etag" in answer.headers else "no-store")
        assert len(answer.headers["x-request-id"]) == 32
    docs = await api.http.get("/docs")  # loads Swagger UI, but must not be framed
    assert docs.headers["content-security-policy"] == "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-1.2_3", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("a b", False), ("a\u00e9", False)],
)
async def test_a_valid_request_id_is_kept_and_any_other_replaced(api: Api, sent: str, kept: bool) -> None:
    response = await api.http.get("/nowhere", headers={b"X-Request-ID": sent.encode()})
    assert (response.headers["x-request-id"] == sent) is kept
    assert response.json()["request_id"] == response.headers["x-request-id"]


async def test_the_errors_of_a_problem_are_limited_in_number_and_length(api: Api) -> None:
    members = {f"{'x' * 200}{number}": 0 for number in range(250)}
    response = await api.person().post(TASKS, members)
    assert response.status_code == 422
    assert len(response.json()["errors"]) == 50
    assert max(len(error["loc"][-1]) for error in response.json()["errors"]) == 100


async def test_problems_have_fixed_members(api: Api) -> None:
    response = await api.http.get("/nowhere")
    assert response.headers["content-type"] == "application/problem+json"
    assert list(response.json()) == ["type", "title", "status", "detail", "code", "request_id"]
    titles = {status: problems.TITLES.get(status, HTTPStatus(status).phrase) for status in (404, 413, 422)}
    assert titles == {404: "Not Found", 413: "Content Too Large", 422: "Unprocessable Content"}
    invalid = await api.person().post(TASKS, {"title": 1, "more": 2})
    assert [sorted(error) for error in invalid.json()["errors"]] == [["loc", "msg", "type"]] * 2


async def test_an_unexpected_error_is_a_500_without_details(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = token_hex()

    async def broken(*_: object) -> None:
        raise RuntimeError(f"private: {secret}")

    monkeypatch.setattr("backend.tasks.service.TaskService.list", broken)
    response = await api.person().get(TASKS, headers={"Origin": "https://app.example.com"})
    assert (response.status_code, response.json()["code"]) == (500, "internal_error")
    assert response.headers["x-request-id"] == response.json()["request_id"]
    assert response.headers["access-control-allow-origin"] == "https://app.example.com"
    assert "unexpected RuntimeError" in caplog.text
    assert "broken" in caplog.text
    assert secret not in response.text + caplog.text


async def test_long_responses_are_compressed(api: Api) -> None:
    ada = api.person()
    await ada.task(description="x" * 2000)
    plain = await ada.get(TASKS, headers={"Accept-Encoding": "identity"})
    compressed = await ada.get(TASKS, headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in plain.headers
    assert compressed.headers["content-encoding"] == "gzip"
    with_origin = await ada.get(TASKS, headers={"Accept-Encoding": "identity", "Origin": "https://app.example.com"})
    for answer in plain, compressed, with_origin:
        assert sorted(answer.headers["vary"].split(", ")) == ["Accept-Encoding", "Origin"]
    assert compressed.json() == plain.json()


async def test_cors_allows_only_the_listed_origins(api: Api) -> None:
    preflight = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "authorization,if-match"}
    allowed = await api.http.options(TASKS, headers={"Origin": "https://app.example.com", **preflight})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example.com"
    assert "access-control-allow-credentials" not in allowed.headers
    for origin in "https://evil.example", "https://app.example.com.evil.example", "http://app.example.com", "null":
        refused = await api.http.options(TASKS, headers={"Origin": origin, **preflight})
        assert (refused.status_code, refused.json()["detail"]) == (400, "Disallowed CORS origin")
        assert "access-control-allow-origin" not in refused.headers
    unauthorized = await api.http.get(TASKS, headers={"Origin": "https://app.example.com"})
    assert unauthorized.headers["access-control-allow-origin"] == "https://app.example.com"
    assert "ETag" in unauthorized.headers["access-control-expose-headers"]
    # A cache must keep the responses to different origins apart (Fetch, "CORS protocol and HTTP caches").
    for headers in {}, {"Origin": "https://evil.example"}, {"Origin": "https://app.example.com"}:
        answer = await api.http.get("/", headers={**headers, "Accept-Encoding": "gzip"})
        assert answer.headers["vary"].split(", ").count("Origin") == 1
        assert ("access-control-allow-origin" in answer.headers) is (headers.get("Origin") == "https://app.example.com")


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
async def test_cors_allows_every_method(api: Api, method: str) -> None:
    headers = {
        "Origin": "https://app.example.com",
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization",
    }
    assert (await api.http.options(TASKS, headers=headers)).status_code == 200


async def test_cors_exposes_every_documented_header(api: Api) -> None:
    """The headers of all responses in the OpenAPI document."""
    responses = [
        response
        for path in api.app.openapi()["paths"].values()
        for operation in path.values()
        for response in operation["responses"].values()
    ]
    described = {name.lower() for response in responses for name in response.get("headers", {})}
    answer = await api.http.get("/", headers={"Origin": "https://app.example.com"})
    exposed = set(answer.headers["access-control-expose-headers"].lower().split(", "))
    without_asking = {"cache-control", "content-language", "content-type", "expires", "last-modified", "pragma"}
    assert "etag" in described
    assert described - exposed - without_asking - {"x-accel-buffering"} == set()  # for proxies


async def test_only_trusted_hosts_are_served(settings: Settings, api: Api) -> None:
    config = settings.model_copy(update={"trusted_hosts": ("api.example.com",)})
    async with running(config, api.issuer) as guarded:
        for _ in range(3):  # accepted hosts are cached
            assert (await guarded.http.get("/livez", headers={"Host": "api.example.com"})).status_code == 200
            hosts = [("Host", "api.example.com"), ("Host", "evil.example")]
            assert (await guarded.http.get("/livez", headers=hosts)).status_code == 200
            refused = await guarded.http.get("/livez", headers={"Host": "evil.example"})
            assert (refused.status_code, refused.json()["code"]) == (400, "bad_request")
            assert refused.headers["content-type"] == "application/problem+json"
            without_host = await guarded.http.get("/livez", headers=[("Host", "")])
            assert without_host.status_code == 400


async def test_requests_that_skip_middleware_get_the_same_response(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = api.person()
    await ada.task(description="x" * 2000)
    requests: list[tuple[str, str, dict[str, str]]] = [
        ("GET", TASKS, {}),
        ("HEAD", TASKS, {}),
        ("GET", "/nowhere", {}),
        ("OPTIONS", TASKS, {}),
        ("GET", TASKS, {"Authorization": ""}),
        ("GET", "/docs", {"X-Forwarded-Host": "evil.example"}),
        ("GET", TASKS, {"Host": "another"}),
    ]
    for method, url, headers in requests:
        answers = []
        for full_chain in False, True:
            monkeypatch.setattr(
                "backend.web.middleware.CrossOrigin._needs_chain", lambda _, __, full_chain=full_chain: full_chain
            )
            headers = {"X-Request-ID": "same", "Accept-Encoding": "identity", **headers}
            answer = await ada.request(method, url, headers=headers)
            vary = sorted(answer.headers["vary"].split(", "))
            others = {name: value for name, value in answer.headers.items() if name not in ("ratelimit", "vary")}
            answers.append((answer.status_code, vary, others, answer.content))
        assert answers[0] == answers[1]


async def test_the_resource_metadata_come_from_the_settings(api: Api) -> None:
    response = await api.http.get("/.well-known/oauth-protected-resource", headers={"Host": "evil.example"})
    metadata = response.json()
    assert {"profile", "tasks:read", "tasks:write"} <= set(metadata.pop("scopes_supported"))
    assert metadata == {
        "resource": "http://localhost:8000",
        "authorization_servers": ["http://issuer.test/api/auth"],
        "bearer_methods_supported": ["header"],
        "resource_name": "Better Auth resource server",
    }


async def test_health_checks_report_each_dependency(api: Api) -> None:
    assert (await api.http.get("/livez")).json() == {"status": "ok"}
    ready = await api.http.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {"status": "ok", "checks": {"database": "ok", "keys": "ok"}}


async def test_the_api_starts_without_its_dependencies_and_names_them(settings: Settings, api: Api) -> None:
    config = settings.model_copy(
        update={
            "database_url": "postgresql://user@127.0.0.1:9/nothing",
            "better_auth_jwks_url": "http://127.0.0.1:9/jwks",
        }
    )
    async with running(config, api.issuer) as degraded:
        assert (await degraded.http.get("/livez")).status_code == 200
        ready = await degraded.http.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["checks"] == {"database": "unreachable", "keys": "no usable keys"}
        response = await degraded.person().get(TASKS)
        assert (response.status_code, response.json()["code"]) == (503, "keys_unavailable")
        assert int(response.headers["retry-after"]) >= 1
        assert "www-authenticate" not in response.headers


async def test_a_database_that_is_down_is_a_503(settings: Settings, api: Api) -> None:
    config = settings.model_copy(update={"database_url": "postgresql://user@127.0.0.1:9/nothing"})
    async with running(config, api.issuer) as degraded:
        response = await degraded.person().get(TASKS)
    assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [
        ("23505", 409, "conflict"),
        ("23503", 409, "constraint_violated"),
        ("22001", 422, "invalid_value"),
        ("22003", 422, "invalid_value"),
        ("22008", 422, "invalid_value"),
        ("22021", 422, "invalid_value"),
        ("22P05", 422, "invalid_value"),
        ("0A000", 503, "database_busy"),
        ("22023", 500, "internal_error"),
        ("25006", 503, "database_unavailable"),
        ("25P02", 500, "internal_error"),
        ("25P03", 503, "database_unavailable"),
        ("26000", 503, "database_busy"),
        ("42501", 500, "internal_error"),
        ("42P01", 500, "internal_error"),
        ("40001", 503, "database_busy"),
        ("40P01", 503, "database_busy"),
        ("53300", 503, "database_busy"),
        ("55P03", 503, "database_busy"),
        ("57014", 503, "database_busy"),
        ("57P01", 503, "database_unavailable"),
        ("58030", 503, "database_unavailable"),
        ("08006", 503, "database_unavailable"),
    ],
)
async def test_database_errors_are_answered_by_their_sqlstate(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, state: str, status: int, code: str
) -> None:
    """PostgreSQL itself raises the errors."""
    ada = api.person()
    await ada.get(TASKS)
    block = f"DO $$ BEGIN RAISE EXCEPTION 'a private value' USING ERRCODE = '{state}'; END $$"
    prepared = BoundListing(Statement(text(block)), {}, "", "created_at")
    monkeypatch.setattr("backend.tasks.service.bound_listing", lambda _: prepared)
    response = await ada.get(TASKS)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert ("retry-after" in response.headers) is (status == 503)
    assert "private" not in response.text + caplog.text
    assert (f"database error {state}" in caplog.text) is (status >= 500)


async def test_the_log_names_the_place_of_a_value_that_psycopg_cannot_adapt(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    statement = Statement(text("SELECT :url").columns(url=String))
    prepared = BoundListing(statement, {"url": HttpUrl("https://private.example")}, "", "created_at")
    monkeypatch.setattr("backend.tasks.service.bound_listing", lambda _: prepared)
    response = await api.person().get(TASKS)
    assert (response.status_code, response.json()["code"]) == (500, "internal_error")
    assert re.search(
        r"database error ProgrammingError at backend/tasks/service\.py:\d+ list$", caplog.text, re.MULTILINE
    )
    assert "private" not in response.text + caplog.text


async def test_an_exhausted_pool_is_a_503_database_busy(settings: Settings, api: Api) -> None:
    async with running(settings.model_copy(update={"database_pool_size": 5}), api.issuer) as small:
        ada = small.person()
        assert (await ada.get(TASKS)).status_code == 200
        async with small.state["pool"].connection():
            response = await ada.post(TASKS, {"title": "a", "tags": ["home"]})
    assert (response.status_code, response.json()["code"]) == (503, "database_busy")


async def test_a_401_takes_no_connection(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken() -> None:
        raise AssertionError("a connection was taken")

    monkeypatch.setattr(api.state["pool"], "connection", taken)
    ada = api.person()
    for token in ada.token(exp=1), ada.token(aud="https://other.example"), ada.token()[:-4] + "AAAA":
        assert (await api.http.get(TASKS, headers={"Authorization": f"Bearer {token}"})).status_code == 401


async def test_tokens_and_bodies_are_not_logged(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    ada = api.person()
    await ada.task("a secret title")
    await ada.post(TASKS, {"title": "a secret title", "status": "a secret status"})
    await ada.get(TASKS, params={"cursor": "secretcursor"})
    forged = ada.token()[:-4] + "AAAA"
    await api.http.get(TASKS, headers={"Authorization": f"Bearer {forged}"})
    await asyncio.sleep(0)  # the access log is written in the next iteration of the loop
    logged = "\n".join(
        formatter.format(record)
        for record in caplog.records
        if record.name.startswith("backend")
        for formatter in (JsonLines(), Console())
    )
    assert ada.subject in logged
    assert "/api/v1/tasks" in logged
    assert "secret" not in logged
    for token in ada.bearer["Authorization"][7:], forged:
        assert not any(part in logged for part in token.split("."))


async def test_the_access_log_has_the_documented_fields(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "backend.access")
    ada = api.person(impersonatedBy="admin-7")
    response = await ada.get(f"{TASKS}/019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f", headers={"X-Request-ID": "r1"})
    assert response.status_code == 404
    await asyncio.sleep(0)  # the access log is written in the next iteration of the loop
    line = json.loads(JsonLines().format(caplog.records[-1]))
    expected = {
        "level": "info",
        "logger": "backend.access",
        "request_id": "r1",
        "method": "GET",
        "route": "/api/v1/tasks/{id}",
        "status": 404,
        "subject": ada.subject,
        "impersonator": "admin-7",
    }
    assert line | expected == line
    assert isinstance(line["ms"], float)


def test_a_value_cannot_start_a_new_log_line() -> None:
    record = logging.LogRecord("backend", logging.WARNING, "", 0, "said %s", ("x",), None)
    record.fields = {"subject": "a\nb\u2028\udfff", "other": object()}
    for formatter in JsonLines(), Console():
        assert formatter.format(record).encode().count(b"\n") == 0
    record.args = ("a\nb\ud800",)
    assert JsonLines().format(record).encode().count(b"\n") == 0


async def test_no_route_or_dependency_runs_in_a_thread(api: Api) -> None:
    for route in iter_route_contexts(api.app.routes):
        dependant = getattr(route, "dependant", None)
        pending = [dependant] if dependant else []
        while pending:
            found = pending.pop()
            pending += found.dependencies
            call = found.call if inspect.isroutine(found.call) else type(found.call).__call__
            assert inspect.iscoroutinefunction(call), found.call


async def test_the_order_of_the_middleware(api: Api) -> None:
    """Outer middleware adds its headers and log line to the responses of inner middleware."""
    assert isinstance(api.app, Application)
    assert list(api.app.outer_middleware) == [RateLimiting, CrossOrigin, HeadAsGet, AccessLog]
