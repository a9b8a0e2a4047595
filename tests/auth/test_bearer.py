"""Status, challenge and code of each response of a minimal FastAPI app that uses `backend.auth`."""

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


async def dependency(request: Request) -> None:
    request.app.state.calls.append("dependency")


class SuspendingRoute(BearerRoute):
    """Adds a check before the body is read, as an app may do."""

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


def bearer_header(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


class TestHeader:
    @pytest.mark.parametrize("prefix", ["Bearer ", "bearer  ", "BEARER     ", "bEaReR "])
    async def test_a_valid_token_is_accepted(self, http: httpx.AsyncClient, issuer: LocalIssuer, prefix: str) -> None:
        response = await http.get("/plain", headers={"Authorization": f"{prefix}{issuer.token()}"})
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
            [("Authorization", "BearerToken x")],
            [("Authorization", "token")],
            [("Authorization", "DPoP a.b.c")],
            [("Cookie", "better-auth.session_token=x")],
            [("X-Authorization", "Bearer x")],
            [("Proxy-Authorization", "Bearer x")],
        ],
    )
    async def test_a_request_without_a_bearer_token_is_401_without_an_error_code(
        self, http: httpx.AsyncClient, headers: list[tuple[str, str]]
    ) -> None:
        response = await http.get("/plain", headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == f"Bearer {CHALLENGE}"

    @pytest.mark.parametrize(
        "values",
        [
            ["Bearer"],
            ["Bearer "],
            ["Bearer\ttoken"],
            ["Bearer \ttoken"],
            ["Bearer a b"],
            ["Bearer a, Bearer b"],
            ['Bearer "a"'],
            ["Bearer a%3D"],
            ["Bearer =a"],
            ["Bearer a=b"],
            [b"Bearer \xc3\xa9"],
            [b"Bearer a\0"],
            ["Bearer GOOD", "Bearer GOOD"],
            ["Bearer GOOD", "Basic x"],
            ["Basic x", "Basic y"],
            ["Bearer GOOD", ""],
        ],
    )
    async def test_a_malformed_header_is_400(
        self, http: httpx.AsyncClient, issuer: LocalIssuer, values: Sequence[str | bytes]
    ) -> None:
        raw = [value.encode() if isinstance(value, str) else value for value in values]
        headers = [(b"Authorization", value.replace(b"GOOD", issuer.token().encode())) for value in raw]
        response = await http.get("/plain", headers=headers)
        assert response.status_code == 400
        challenge = response.headers["www-authenticate"]
        assert challenge.startswith('Bearer error="invalid_request", error_description="')
        assert challenge.endswith(CHALLENGE)

    @pytest.mark.parametrize("token", ["a", "a.b.c", "-._~+/", "abc==", "a" * 60_000])
    async def test_any_b64token_reaches_the_verifier(self, http: httpx.AsyncClient, token: str) -> None:
        response = await http.get("/plain", headers=bearer_header(token))
        assert response.status_code == 401
        assert 'error="invalid_token"' in response.headers["www-authenticate"]

    async def test_tokens_in_forms_and_queries_are_ignored(self, http: httpx.AsyncClient, issuer: LocalIssuer) -> None:
        """The methods of RFC 6750, 2.2 and 2.3, are not supported."""
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

    async def test_an_expired_token_is_explained_in_body_and_challenge(
        self, http: httpx.AsyncClient, issuer: LocalIssuer, time: Time
    ) -> None:
        token = issuer.token()
        time.wall += 1000
        response = await http.get("/plain", headers=bearer_header(token))
        assert response.status_code == 401
        assert response.json() == {"detail": "The token has expired."}
        assert response.headers["www-authenticate"] == (
            f'Bearer error="invalid_token", error_description="The token has expired.", {CHALLENGE}'
        )

    async def test_the_challenge_for_a_session_token_names_the_token_url(self, http: httpx.AsyncClient) -> None:
        response = await http.get("/plain", headers=bearer_header("a" * 32 + "." + "b" * 43 + "="))
        assert response.status_code == 401
        assert "exchange it at http://localhost:3000/api/auth/token" in response.headers["www-authenticate"]

    async def test_missing_scopes_are_403_and_named_in_the_challenge(
        self, http: httpx.AsyncClient, issuer: LocalIssuer
    ) -> None:
        for scope, missing in {
            "": "notes:read notes:write",
            "notes:read": "notes:write",
            "notes:READ notes:write": "notes:read",
            "notes:readnotes:write": "notes:read notes:write",
        }.items():
            response = await http.get("/v1/notes/scopes", headers=bearer_header(issuer.access_token(scope=scope)))
            assert response.status_code == 403
            challenge = response.headers["www-authenticate"]
            assert challenge.startswith('Bearer error="insufficient_scope"')
            assert f'scope="{missing}"' in challenge
        token = issuer.access_token(scope="notes:write notes:read extra")
        assert (await http.get("/v1/notes/scopes", headers=bearer_header(token))).status_code == 200

    async def test_a_session_jwt_needs_no_scope(self, http: httpx.AsyncClient, issuer: LocalIssuer) -> None:
        assert (await http.get("/v1/notes/scopes", headers=bearer_header(issuer.token()))).status_code == 200

    async def test_unavailable_keys_are_503_with_the_issuers_retry_after(
        self, app: FastAPI, endpoint: Endpoint, time: Time
    ) -> None:
        async with remote_keys(endpoint, time, max_stale=10) as keys:
            bearer = Bearer(endpoint.issuer.verifier(keys), resource_metadata=METADATA)
            endpoint.respond = lambda: httpx.Response(429, headers={"X-Retry-After": "33"})
            await time.advance(60.5)
            async with serving(app, bearer) as http:
                response = await http.get("/plain", headers=bearer_header(endpoint.issuer.token()))
                assert response.status_code == 503
                assert response.headers["retry-after"] == "33"
                assert "www-authenticate" not in response.headers
                assert (await http.get("/plain")).status_code == 401
                assert (await http.get("/plain", headers=bearer_header("a.b.c"))).status_code == 401

    def test_retry_after_is_a_positive_integer(self, issuer: LocalIssuer) -> None:
        refusal = Bearer(issuer.verifier()).refusal(UnusableKeys("private, of ours"))
        assert (refusal.status_code, refusal.code, "private" in refusal.detail) == (503, "keys_unavailable", False)
        refusal = Bearer(issuer.verifier()).refusal(KeysUnavailable("x", 1.2))
        assert (refusal.status_code, refusal.code, refusal.headers) == (503, "keys_unavailable", {"Retry-After": "2"})

    @pytest.mark.parametrize("url", ['https://a/"', "https://a/\\", "https://a/ b", "https://a/\r\n", "https://é/"])
    def test_a_metadata_url_that_is_invalid_in_a_header_is_rejected(self, issuer: LocalIssuer, url: str) -> None:
        with pytest.raises(ValueError, match="resource_metadata"):
            Bearer(issuer.verifier(), resource_metadata=url)

    async def test_a_challenge_without_metadata_names_only_the_scheme(self, app: FastAPI, issuer: LocalIssuer) -> None:
        async with serving(app, Bearer(issuer.verifier())) as http:
            assert (await http.get("/plain")).headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize("scope", ["", "a b", 'a"', "a\\", "é", "a\n"])
    def test_an_invalid_scope_is_rejected(self, scope: str) -> None:
        with pytest.raises(ValueError, match="RFC 6749"):
            requires_scope(scope)

    async def test_each_refusal_has_a_stable_code(self, app: FastAPI, issuer: LocalIssuer) -> None:
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
            for (path, header), status_and_code in expected.items():
                response = await http.get(path, headers={"Authorization": header} if header else {})
                assert (response.status_code, response.json()["code"]) == status_and_code


class TestRoutes:
    @pytest.mark.parametrize(
        ("headers", "status"),
        [({}, 401), ({"Authorization": "Bearer"}, 400), ({"Authorization": "Bearer x"}, 401)],
    )
    async def test_a_request_is_refused_before_its_body_is_read(
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

    async def test_an_accepted_request_runs_dependencies_and_body_validation(
        self, app: FastAPI, http: httpx.AsyncClient, issuer: LocalIssuer
    ) -> None:
        response = await http.post("/v1/notes", headers=bearer_header(issuer.token("ada")), json={"text": "hello"})
        assert (response.status_code, response.json()) == (200, "ada: hello")
        assert app.state.calls == ["dependency"]
        response = await http.post("/v1/notes", headers=bearer_header(issuer.token("ada")), content="{not JSON")
        assert response.status_code == 422

    async def test_unknown_paths_and_methods_need_no_token(self, http: httpx.AsyncClient) -> None:
        assert (await http.get("/v1/nothing")).status_code == 404
        response = await http.get("/v1/notes")
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        assert (await http.get("/public")).status_code == 200

    async def test_the_request_state_contains_the_principal(self, http: httpx.AsyncClient, issuer: LocalIssuer) -> None:
        assert (await http.get("/v1/notes/raw", headers=bearer_header(issuer.token("ada")))).json() == "ada"

    async def test_a_route_subclass_can_add_a_check(
        self, app: FastAPI, http: httpx.AsyncClient, issuer: LocalIssuer
    ) -> None:
        response = await http.post("/v1/notes", headers=bearer_header(issuer.token("suspended")), content="{not JSON")
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
            await http.post("/v1/notes", headers=bearer_header(issuer.token()), json={"text": "x"})
            assert (await http.get("/twice", headers=bearer_header(issuer.token()))).json() is True
        assert judged == ["/v1/notes", "/twice"]

    async def test_a_principal_is_not_shared_with_another_request(
        self, http: httpx.AsyncClient, issuer: LocalIssuer
    ) -> None:
        """All requests share the state of `serving`, but not the principal."""
        assert (await http.get("/plain", headers=bearer_header(issuer.token("ada")))).status_code == 200
        assert (await http.get("/plain")).status_code == 401
        assert (await http.get("/plain", headers=bearer_header(issuer.token("bob")))).json() == "bob"
        responses = await asyncio.gather(
            *(http.get("/plain", headers=bearer_header(issuer.token(f"u{n}"))) for n in range(50)), http.get("/plain")
        )
        assert [response.json() for response in responses[:-1]] == [f"u{n}" for n in range(50)]
        assert responses[-1].status_code == 401

    async def test_an_app_without_a_bearer_raises_a_clear_error(self, app: FastAPI) -> None:
        async with serving(app, None) as http:
            with pytest.raises(RuntimeError, match="lifespan"):
                await http.get("/plain")

    async def test_websockets_are_authenticated(self, app: FastAPI, issuer: LocalIssuer) -> None:
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

    async def test_judge_needs_no_route(self, issuer: LocalIssuer) -> None:
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
    async def test_a_route_for_people_refuses_machines_and_banned_users(
        self, http: httpx.AsyncClient, issuer: LocalIssuer, make: Callable[[LocalIssuer], str], status: int
    ) -> None:
        response = await http.get("/v1/notes/person", headers=bearer_header(make(issuer)))
        assert response.status_code == status
        assert "www-authenticate" not in response.headers
        assert (await http.get("/plain", headers=bearer_header(make(issuer)))).status_code == 200

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
    async def test_a_route_with_roles_refuses_other_roles_and_access_tokens(
        self, http: httpx.AsyncClient, issuer: LocalIssuer, make: Callable[[LocalIssuer], str], status: int
    ) -> None:
        assert (await http.get("/v1/notes/admin", headers=bearer_header(make(issuer)))).status_code == status


def test_openapi_declares_one_scheme(app: FastAPI) -> None:
    document = app.openapi()
    assert document["components"]["securitySchemes"] == {
        "BetterAuth": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "JWT",
            "description": "A JWT from Better Auth. OAuth access tokens and API keys need the scopes of the operation.",
        }
    }
    for path in ("/plain", "/twice", "/v1/notes/person", "/v1/notes/scopes", "/v1/notes/admin"):
        assert document["paths"][path]["get"]["security"] == [{"BetterAuth": []}], path
    assert "security" not in document["paths"]["/public"]["get"]


def test_all_checks_are_coroutines() -> None:
    """A sync dependency would cost a thread switch (200 us) per request."""
    assert inspect.iscoroutinefunction(Requirement.__call__)
    assert inspect.iscoroutinefunction(BearerRoute.judge)
