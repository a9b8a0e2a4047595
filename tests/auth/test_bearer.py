"""A minimal FastAPI app with this package responds with the right status, challenge and code."""

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope, Send

from backend.auth import (
    Bearer,
    BearerRoute,
    CurrentPerson,
    CurrentPrincipal,
    InvalidToken,
    KeysUnavailable,
    Principal,
    Reason,
    Refusal,
    Requirement,
    UnusableKeys,
    forbidden,
    judge,
    read_token,
    requires_role,
    requires_scope,
)
from backend.auth.testing import LocalIssuer
from tests.auth.scripted import Endpoint, Time, remote_keys

METADATA = "https://api.example.com/.well-known/oauth-protected-resource"
CHALLENGE = f'resource_metadata="{METADATA}"'


class Note(BaseModel):
    text: str


class Calls(list[str]):
    """The calls of an app in order."""


async def dependency(request: Request) -> None:
    request.app.state.calls.append("dependency")


class SuspendingRoute(BearerRoute):
    """A route class of an app that adds a check before the body is read."""

    async def judge(self, request: Request) -> None:
        await super().judge(request)
        if request.state.principal.subject == "suspended":
            raise forbidden("The account is suspended.")


def bare_app() -> FastAPI:
    app = FastAPI()
    app.state.calls = []
    v1 = APIRouter(prefix="/v1")
    notes = APIRouter(prefix="/notes", route_class=SuspendingRoute, dependencies=[Depends(dependency)])

    @notes.post("")
    async def add_note(principal: CurrentPrincipal, note: Note) -> str:
        return f"{principal.subject}: {note.text}"

    @notes.get("/raw")
    async def raw(request: Request) -> str:
        principal: Principal = request.state.principal
        return principal.subject

    @notes.get("/person")
    async def person(principal: CurrentPerson) -> str:
        return principal.subject

    @notes.get("/scopes")
    async def scopes(principal: Annotated[Principal, requires_scope("notes:read", "notes:write")]) -> str:
        return principal.subject

    @notes.get("/admin", dependencies=[requires_role("admin", "owner")])
    async def admin() -> str:
        return "admin"

    @app.get("/plain")
    async def plain(principal: CurrentPrincipal) -> str:
        return principal.subject

    @app.get("/twice")
    async def twice(principal: CurrentPrincipal, person: CurrentPerson) -> bool:
        return principal is person

    @app.get("/public")
    async def public() -> str:
        return "public"

    @app.websocket("/live")
    async def live(websocket: WebSocket, principal: CurrentPrincipal) -> None:
        await websocket.accept()
        await websocket.send_text(principal.subject)
        await websocket.close()

    v1.include_router(notes)
    app.include_router(v1)
    return app


@asynccontextmanager
async def serving(app: FastAPI, bearer: Bearer | None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app. All requests share one state, as with some servers."""
    state = {} if bearer is None else {"bearer": bearer}

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = state
        await app(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(with_state), base_url="http://api") as http:
        yield http


@pytest.fixture
def app() -> FastAPI:
    return bare_app()


@pytest.fixture
async def http(app: FastAPI, issuer: LocalIssuer) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(app, Bearer(issuer.verifier(), resource_metadata=METADATA)) as http:
        yield http


def bearing(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


class TestHeader:
    @pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
    @pytest.mark.parametrize("spaces", [" ", "  ", "     "])
    async def test_good(self, http: httpx.AsyncClient, issuer: LocalIssuer, scheme: str, spaces: str) -> None:
        response = await http.get("/plain", headers={"Authorization": f"{scheme}{spaces}{issuer.token()}"})
        assert (response.status_code, response.json()) == (200, "user1")
        assert "www-authenticate" not in response.headers

    def test_whitespace_around_the_value_is_ignored(self) -> None:
        assert (
            read_token(HTTPConnection({"type": "http", "headers": [(b"authorization", b" Bearer a.b.c \t")]}))
            == "a.b.c"
        )

    @pytest.mark.parametrize(
        "headers",
        [
            [],
            [("Authorization", "")],
            [("Authorization", "Basic dXNlcjpwYXNz")],
            [("Authorization", "Digest x")],
            [("Authorization", "BearerToken x")],
            [("Authorization", "Bearer-x y")],
            [("Authorization", "token")],
            [("Authorization", "DPoP a.b.c")],
            [("Cookie", "better-auth.session_token=x")],
            [("X-Authorization", "Bearer x")],
            [("Proxy-Authorization", "Bearer x")],
        ],
    )
    async def test_no_token(self, http: httpx.AsyncClient, headers: list[tuple[str, str]]) -> None:
        response = await http.get("/plain", headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == f"Bearer {CHALLENGE}"

    @pytest.mark.parametrize(
        "values",
        [
            ["Bearer"],
            ["bearer"],
            ["Bearer "],
            ["Bearer    "],
            ["Bearer\ttoken"],
            ["Bearer \ttoken"],
            ["Bearer\t"],
            ["Bearer a b"],
            ["Bearer a,b"],
            ["Bearer a, Bearer b"],
            ['Bearer "a"'],
            ["Bearer a%3D"],
            ["Bearer =a"],
            ["Bearer a=b"],
            ["Bearer ="],
            ["Bearer a\\b"],
            ["Bearer a;b"],
            [b"Bearer \xc3\xa9"],
            [b"Bearer a\0"],
            ["Bearer GOOD", "Bearer GOOD"],
            ["Bearer GOOD", "Basic x"],
            ["Basic x", "Basic y"],
            ["Bearer GOOD", ""],
        ],
    )
    async def test_malformed(self, http: httpx.AsyncClient, issuer: LocalIssuer, values: Sequence[str | bytes]) -> None:
        raw = [value.encode() if isinstance(value, str) else value for value in values]
        headers = [(b"Authorization", value.replace(b"GOOD", issuer.token().encode())) for value in raw]
        response = await http.get("/plain", headers=headers)
        assert response.status_code == 400
        challenge = response.headers["www-authenticate"]
        assert challenge.startswith('Bearer error="invalid_request", error_description="')
        assert challenge.endswith(CHALLENGE)

    @pytest.mark.parametrize("token", ["a", "a.b.c", "-._~+/", "abc==", "a" * 60_000])
    async def test_any_b64token_is_verified(self, http: httpx.AsyncClient, token: str) -> None:
        response = await http.get("/plain", headers=bearing(token))
        assert response.status_code == 401
        assert 'error="invalid_token"' in response.headers["www-authenticate"]

    async def test_tokens_in_forms_and_queries_are_ignored(self, http: httpx.AsyncClient, issuer: LocalIssuer) -> None:
        """RFC 6750, 2.2 and 2.3, are not supported."""
        token = issuer.token()
        assert (await http.get("/plain", params={"access_token": token})).status_code == 401
        assert (await http.post("/v1/notes", data={"access_token": token})).status_code == 401


class TestChallenges:
    @pytest.mark.parametrize("reason", list(Reason))
    def test_each_reason_is_valid_in_a_header(self, reason: Reason, issuer: LocalIssuer) -> None:
        refusal = Bearer(issuer.verifier()).refusal(InvalidToken(reason))
        assert (refusal.status_code, refusal.code, refusal.detail) == (401, "invalid_token", reason.value)
        assert refusal.headers == {
            "WWW-Authenticate": f'Bearer error="invalid_token", error_description="{reason.value}"'
        }
        assert re.fullmatch(r"[\x20-\x21\x23-\x5B\x5D-\x7E]+", reason.value)

    def test_characters_that_are_invalid_in_a_header_are_replaced(self, issuer: LocalIssuer) -> None:
        refusal = Bearer(issuer.verifier()).refusal(InvalidToken(Reason.EXPIRED, 'a"b\\c\r\nX-Evil: é\x7f'))
        assert refusal.headers
        assert refusal.headers["WWW-Authenticate"].endswith('error_description="a?b?c??X-Evil: ??"')

    async def test_expired(self, http: httpx.AsyncClient, issuer: LocalIssuer, time: Time) -> None:
        token = issuer.token()
        time.wall += 1000
        response = await http.get("/plain", headers=bearing(token))
        assert response.status_code == 401
        assert response.json() == {"detail": "The token has expired."}
        assert response.headers["www-authenticate"] == (
            f'Bearer error="invalid_token", error_description="The token has expired.", {CHALLENGE}'
        )

    async def test_session_token(self, http: httpx.AsyncClient) -> None:
        response = await http.get("/plain", headers=bearing("a" * 32 + "." + "b" * 43 + "="))
        assert response.status_code == 401
        assert "exchange it at http://localhost:3000/api/auth/token" in response.headers["www-authenticate"]

    async def test_missing_scopes(self, http: httpx.AsyncClient, issuer: LocalIssuer) -> None:
        for scope, missing in {
            "": "notes:read notes:write",
            "notes:read": "notes:write",
            "notes:READ notes:write": "notes:read",
            "notes:readnotes:write": "notes:read notes:write",
        }.items():
            response = await http.get("/v1/notes/scopes", headers=bearing(issuer.access_token(scope=scope)))
            assert response.status_code == 403
            challenge = response.headers["www-authenticate"]
            assert challenge.startswith('Bearer error="insufficient_scope"')
            assert f'scope="{missing}"' in challenge
        token = issuer.access_token(scope="notes:write notes:read extra")
        assert (await http.get("/v1/notes/scopes", headers=bearing(token))).status_code == 200

    async def test_a_session_jwt_needs_no_scope(self, http: httpx.AsyncClient, issuer: LocalIssuer) -> None:
        assert (await http.get("/v1/notes/scopes", headers=bearing(issuer.token()))).status_code == 200

    async def test_keys_unavailable(self, app: FastAPI, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time, max_stale=10) as keys:
            bearer = Bearer(endpoint.issuer.verifier(keys), resource_metadata=METADATA)
            endpoint.answer = lambda: httpx.Response(429, headers={"X-Retry-After": "33"})
            await time.advance(60.5)
            async with serving(app, bearer) as http:
                response = await http.get("/plain", headers=bearing(endpoint.issuer.token()))
                assert response.status_code == 503
                assert response.headers["retry-after"] == "33"
                assert "www-authenticate" not in response.headers
                assert (await http.get("/plain")).status_code == 401
                assert (await http.get("/plain", headers=bearing("a.b.c"))).status_code == 401

    def test_retry_after_is_whole_and_positive(self, issuer: LocalIssuer) -> None:
        refusal = Bearer(issuer.verifier()).refusal(UnusableKeys("private, of ours"))
        assert (refusal.status_code, refusal.code, "private" in refusal.detail) == (503, "keys_unavailable", False)
        refusal = Bearer(issuer.verifier()).refusal(KeysUnavailable("x", 1.2))
        assert (refusal.status_code, refusal.code, refusal.headers) == (503, "keys_unavailable", {"Retry-After": "2"})

    @pytest.mark.parametrize("url", ['https://a/"', "https://a/\\", "https://a/ b", "https://a/\r\n", "https://é/"])
    def test_a_metadata_url_that_is_invalid_in_a_header(self, issuer: LocalIssuer, url: str) -> None:
        with pytest.raises(ValueError, match="resource_metadata"):
            Bearer(issuer.verifier(), resource_metadata=url)

    async def test_without_metadata(self, app: FastAPI, issuer: LocalIssuer) -> None:
        async with serving(app, Bearer(issuer.verifier())) as http:
            assert (await http.get("/plain")).headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize("scope", ["", "a b", 'a"', "a\\", "é", "a\n"])
    def test_invalid_scopes(self, scope: str) -> None:
        with pytest.raises(ValueError, match="RFC 6749"):
            requires_scope(scope)

    async def test_codes_are_stable(self, app: FastAPI, issuer: LocalIssuer) -> None:
        """An exception handler can render problem details from the code."""

        @app.exception_handler(Refusal)
        async def _(_: Request, refusal: Refusal) -> JSONResponse:
            return JSONResponse({"code": refusal.code}, refusal.status_code, refusal.headers)

        expected = {
            ("/plain", None): (401, "unauthorized"),
            ("/plain", "Bearer"): (400, "invalid_request"),
            ("/plain", "Bearer x"): (401, "invalid_token"),
            ("/v1/notes/scopes", f"Bearer {issuer.access_token()}"): (403, "insufficient_scope"),
            ("/v1/notes/admin", f"Bearer {issuer.token()}"): (403, "forbidden"),
        }
        async with serving(app, Bearer(issuer.verifier())) as http:
            for (path, header), answer in expected.items():
                response = await http.get(path, headers={"Authorization": header} if header else {})
                assert (response.status_code, response.json()["code"]) == answer


class TestRoutes:
    @pytest.mark.parametrize(
        ("headers", "status"),
        [({}, 401), ({"Authorization": "Bearer"}, 400), ({"Authorization": "Bearer x"}, 401)],
    )
    async def test_refused_before_the_body_is_read(
        self, app: FastAPI, issuer: LocalIssuer, headers: dict[str, str], status: int
    ) -> None:
        received: list[str] = []
        sent: list[Message] = []

        async def receive() -> Message:
            received.append("body")
            return {"type": "http.request", "body": b"{not JSON", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": "/v1/notes",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *raw],
            "state": {"bearer": Bearer(issuer.verifier())},
        }
        await app(scope, receive, send)
        assert sent[0]["status"] == status
        assert received == []
        assert app.state.calls == []

    async def test_accepted(self, app: FastAPI, http: httpx.AsyncClient, issuer: LocalIssuer) -> None:
        response = await http.post("/v1/notes", headers=bearing(issuer.token("ada")), json={"text": "hello"})
        assert (response.status_code, response.json()) == (200, "ada: hello")
        assert app.state.calls == ["dependency"]
        response = await http.post("/v1/notes", headers=bearing(issuer.token("ada")), content="{not JSON")
        assert response.status_code == 422

    async def test_unknown_paths_and_methods_need_no_token(self, http: httpx.AsyncClient) -> None:
        assert (await http.get("/v1/nothing")).status_code == 404
        response = await http.get("/v1/notes")
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        assert (await http.get("/public")).status_code == 200

    async def test_the_principal_is_in_the_state(self, http: httpx.AsyncClient, issuer: LocalIssuer) -> None:
        assert (await http.get("/v1/notes/raw", headers=bearing(issuer.token("ada")))).json() == "ada"

    async def test_an_app_adds_a_check(self, app: FastAPI, http: httpx.AsyncClient, issuer: LocalIssuer) -> None:
        response = await http.post("/v1/notes", headers=bearing(issuer.token("suspended")), content="{not JSON")
        assert (response.status_code, response.json()) == (403, {"detail": "The account is suspended."})
        assert "www-authenticate" not in response.headers
        assert app.state.calls == []

    async def test_a_request_is_verified_once(self, app: FastAPI, issuer: LocalIssuer) -> None:
        judged: list[str] = []
        verifier = issuer.verifier()

        class Counting(Bearer):
            async def __call__(self, connection: HTTPConnection) -> Principal:
                judged.append(connection.url.path)
                return await super().__call__(connection)

        async with serving(app, Counting(verifier)) as http:
            await http.post("/v1/notes", headers=bearing(issuer.token()), json={"text": "x"})
            assert (await http.get("/twice", headers=bearing(issuer.token()))).json() is True
        assert judged == ["/v1/notes", "/twice"]

    async def test_a_principal_is_not_shared_with_another_request(
        self, http: httpx.AsyncClient, issuer: LocalIssuer
    ) -> None:
        """All requests share the state of `serving`, but not the principal."""
        assert (await http.get("/plain", headers=bearing(issuer.token("ada")))).status_code == 200
        assert (await http.get("/plain")).status_code == 401
        assert (await http.get("/plain", headers=bearing(issuer.token("bob")))).json() == "bob"
        answers = await asyncio.gather(
            *(http.get("/plain", headers=bearing(issuer.token(f"u{n}"))) for n in range(50)), http.get("/plain")
        )
        assert [answer.json() for answer in answers[:-1]] == [f"u{n}" for n in range(50)]
        assert answers[-1].status_code == 401

    async def test_an_app_without_a_bearer_raises_a_clear_error(self, app: FastAPI) -> None:
        async with serving(app, None) as http:
            with pytest.raises(RuntimeError, match="lifespan"):
                await http.get("/plain")

    async def test_websockets(self, app: FastAPI, issuer: LocalIssuer) -> None:
        async def connect(*headers: tuple[bytes, bytes]) -> list[Message]:
            sent: list[Message] = []
            incoming = iter([{"type": "websocket.connect"}])

            async def receive() -> Message:
                return next(incoming)

            async def send(message: Message) -> None:
                sent.append(message)

            scope = {
                "type": "websocket",
                "path": "/live",
                "query_string": b"",
                "headers": list(headers),
                "extensions": {"websocket.http.response": {}},
                "state": {"bearer": Bearer(issuer.verifier())},
            }
            await app(scope, receive, send)
            return sent

        messages = await connect((b"authorization", f"Bearer {issuer.token('ada')}".encode()))
        assert messages[1]["text"] == "ada"
        assert (await connect())[0]["status"] == 401

    async def test_judge_without_a_route(self, issuer: LocalIssuer) -> None:
        scope = {
            "type": "http",
            "headers": [(b"authorization", f"Bearer {issuer.token()}".encode())],
            "state": {"bearer": Bearer(issuer.verifier())},
        }
        assert await judge(HTTPConnection(scope)) is scope["state"]["principal"]  # type: ignore[index]  # a plain dict


class TestPrincipals:
    @pytest.mark.parametrize(
        ("make", "status"),
        [
            (lambda issuer: issuer.token(), 200),
            (lambda issuer: issuer.access_token(), 200),
            (lambda issuer: issuer.access_token("client1"), 403),
            (lambda issuer: issuer.token(banned=True), 403),
            (lambda issuer: issuer.token(banned=True, banExpires="2027-01-15T07:59:59Z"), 200),
            (lambda issuer: issuer.token(banned=True, banExpires="2027-01-15T08:00:01Z"), 403),
            (lambda issuer: issuer.token(banned=True, banExpires="?"), 403),
        ],
    )
    async def test_persons(
        self, http: httpx.AsyncClient, issuer: LocalIssuer, make: Callable[[LocalIssuer], str], status: int
    ) -> None:
        response = await http.get("/v1/notes/person", headers=bearing(make(issuer)))
        assert response.status_code == status
        assert "www-authenticate" not in response.headers
        assert (await http.get("/plain", headers=bearing(make(issuer)))).status_code == 200

    @pytest.mark.parametrize(
        ("make", "status"),
        [
            (lambda issuer: issuer.token(role="admin"), 200),
            (lambda issuer: issuer.token(role="user, owner"), 200),
            (lambda issuer: issuer.token(role="Admin"), 403),
            (lambda issuer: issuer.token(role="administrator"), 403),
            (lambda issuer: issuer.token(role=None), 403),
            (lambda issuer: issuer.token(), 403),
            (lambda issuer: issuer.access_token(role="admin", scope="admin"), 403),
        ],
    )
    async def test_roles(
        self, http: httpx.AsyncClient, issuer: LocalIssuer, make: Callable[[LocalIssuer], str], status: int
    ) -> None:
        assert (await http.get("/v1/notes/admin", headers=bearing(make(issuer)))).status_code == status


def test_openapi_declares_one_scheme(app: FastAPI) -> None:
    document = app.openapi()
    assert document["components"]["securitySchemes"] == {
        "BetterAuth": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "JWT",
            "description": "A JWT from Better Auth, or one of its OAuth access tokens.",
        }
    }
    for path in ("/plain", "/twice", "/v1/notes/person", "/v1/notes/scopes", "/v1/notes/admin"):
        assert document["paths"][path]["get"]["security"] == [{"BetterAuth": []}], path
    assert "security" not in document["paths"]["/public"]["get"]


def test_all_checks_are_coroutines() -> None:
    """A sync dependency would cost a thread switch (200 us) per request."""
    assert inspect.iscoroutinefunction(Requirement.__call__)
    assert inspect.iscoroutinefunction(BearerRoute.judge)
