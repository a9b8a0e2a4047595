"""Forged tokens and malformed Authorization headers, sent over HTTP to the whole application."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import pytest
import uvicorn

from backend.app import create_app
from backend.auth import Reason, TokenVerifier
from backend.auth.testing import LocalIssuer
from backend.operations.log_lines import JsonLines
from backend.settings import Settings
from backend.web.server import Protocol
from benchmarks.issuer import serve_keys
from tests.auth.forged_tokens import FORGED, NOW, TYPE, Forge

METADATA = "http://localhost:8000/.well-known/oauth-protected-resource"

# The key set may have changed, so these reasons fetch it before the 401.
MAY_FETCH = {Reason.UNKNOWN_KEY, Reason.BAD_SIGNATURE}


@dataclass
class Target:
    """The application behind uvicorn and its real HTTP parser, with the verifier's clock stopped at NOW.

    `connections` lists the addresses to which the application has opened connections.
    """

    issuer: LocalIssuer
    port: int
    keys_url: str
    connections: list[tuple[str, int]]

    async def exchange(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send these bytes; returns status, headers and body of the response."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        status, *lines = head.decode("latin-1").split("\r\n")
        return int(status.split()[1]), {name.lower(): value for name, value in (s.split(": ", 1) for s in lines)}, body

    async def get(self, *lines: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send a GET request with these header lines, byte for byte."""
        head = [b"GET /api/v1/tasks HTTP/1.1", b"Host: localhost", b"Connection: close", *lines, b"", b""]
        return await self.exchange(b"\r\n".join(head))

    async def present(self, token: str) -> tuple[int, dict[str, str], bytes]:
        return await self.get(b"Authorization: Bearer " + token.encode("utf-8", "surrogatepass"))


@pytest.fixture(scope="module")
async def target(settings: Settings) -> AsyncIterator[Target]:
    issuer = LocalIssuer(clock=lambda: NOW)
    started = asyncio.Event()
    connections: list[tuple[str, int]] = []

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            started.set()

    async def recorded(remote_host: str, remote_port: int, **options: Any) -> Any:
        connections.append((remote_host, remote_port))
        return await connect_tcp(remote_host, remote_port, **options)

    connect_tcp = anyio.connect_tcp
    with serve_keys(issuer) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr("backend.app.TokenVerifier", partial(TokenVerifier, clock=lambda: NOW))
        patch.setattr(anyio, "connect_tcp", recorded)
        config = settings.model_copy(update={"better_auth_url": issuer.url, "better_auth_jwks_url": url})
        server = Server(uvicorn.Config(create_app(config), port=0, http=Protocol, log_config=None, access_log=False))
        serving = asyncio.create_task(server.serve())
        await started.wait()
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Target(issuer, port, url, connections)
        server.should_exit = True
        await serving


def log_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [JsonLines().format(record) for record in caplog.records if record.name != "asyncio"]


def assert_contain_no_part(lines: list[str], token: str) -> None:
    assert not any("\n" in line for line in lines)
    for segment in token.split("."):
        assert len(segment) < 8 or not any(segment in line for line in lines)


# One token for each kind of reason; tests/auth/test_attacks.py has all attacks.
BY_NAME = {name: (forge, reason) for name, forge, reason in FORGED + TYPE}
REFUSED: dict[str, tuple[Forge, Reason]] = {
    "unknown kid": (lambda issuer: issuer.token(header={"kid": "unknown"}), Reason.UNKNOWN_KEY),
    **{
        name: BY_NAME[name]
        for name in (
            "jku",
            "empty signature",
            "alg none, no signature",
            "kid a URL",
            "kid with CRLF",
            "crit ['exp']",
            "typ 'logout+jwt'",
            "header nested 2,000 deep",
            "32 KiB and a byte",
            "a session token",
        )
    },
    "expired": (lambda issuer: issuer.token(iat=NOW - 60, exp=NOW - 5), Reason.EXPIRED),
    "subject with a NUL": (lambda issuer: issuer.token("a\0b"), Reason.BAD_SUBJECT),
}


@pytest.mark.parametrize(("forge", "reason"), REFUSED.values(), ids=REFUSED)
async def test_a_forged_token_is_401_and_connects_only_to_the_key_set(
    target: Target, forge: Forge, reason: Reason, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = forge(target.issuer)
    before = len(target.connections)
    status, headers, body = await target.present(token)
    description = reason.value.replace("<issuer>", f"{target.issuer.url}/api/auth")
    assert (status, json.loads(body)["code"]) == (401, "invalid_token")
    assert headers["www-authenticate"] == (
        f'Bearer error="invalid_token", error_description="{description}", resource_metadata="{METADATA}"'
    )
    urls = {f"http://{host}:{port}/jwks" for host, port in target.connections[before:]}
    assert urls <= ({target.keys_url} if reason in MAY_FETCH else set())
    lines = log_lines(caplog)
    assert any('"logger":"backend.access"' in line and '"status":401' in line for line in lines)
    assert_contain_no_part(lines, token)


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("JSON serialisation", 400, "invalid_request"),
        ("a letter that is not ASCII", 400, "invalid_request"),
        ("a NUL", 400, "bad_request"),
        ("1 MiB", 431, "headers_too_large"),
    ],
)
async def test_a_token_that_no_header_may_contain_is_400_or_431(
    target: Target, name: str, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = BY_NAME[name][0](target.issuer)
    before = len(target.connections)
    found, _, body = await target.present(token)
    assert (found, json.loads(body)["code"]) == (status, code)
    assert target.connections[before:] == []
    assert_contain_no_part(log_lines(caplog), token)


async def test_a_valid_token_is_accepted_and_its_header_urls_are_not_requested(target: Target) -> None:
    """The tokens above are thus not refused for another reason."""
    assert (await target.present(target.issuer.token()))[0] == 200
    ignored = {"jku": "https://evil.example/jwks", "x5u": "https://evil.example", "jwk": {"kty": "oct"}, "x5c": ["MII"]}
    before = len(target.connections)
    assert (await target.present(target.issuer.token(header=ignored)))[0] == 200
    assert target.connections[before:] == []


@pytest.mark.parametrize(
    ("lines", "status", "code"),
    [
        pytest.param([], 401, "unauthorized", id="no header"),
        pytest.param([b"Authorization: Basic YTpi"], 401, "unauthorized", id="another scheme"),
        pytest.param([b"Authorization: Bearer "], 400, "invalid_request", id="no token"),
        pytest.param([b"Authorization: Bearer\t$"], 400, "invalid_request", id="a tab"),
        pytest.param([b"Authorization: Bearer $ x"], 400, "invalid_request", id="text after the token"),
        pytest.param([b"Authorization: Bearer $"] * 2, 400, "invalid_request", id="two headers"),
        pytest.param([b"authorization: bEaReR   $"], 200, None, id="any case, several spaces"),
        pytest.param([b"Cookie: better-auth.session_token=$"], 401, "unauthorized", id="a cookie"),
        pytest.param([b"Authorization:Bearer $"], 200, None, id="no space after the colon"),
    ],
)
async def test_the_authorization_header_is_parsed_strictly(
    target: Target, lines: list[bytes], status: int, code: str | None
) -> None:
    token = target.issuer.token().encode()
    found, headers, body = await target.get(*(line.replace(b"$", token) for line in lines))
    assert found == status
    if code:
        assert json.loads(body)["code"] == code
        assert headers["content-type"] == "application/problem+json"
        assert headers["www-authenticate"].startswith("Bearer ")
        assert ("error=" in headers["www-authenticate"]) is (code != "unauthorized")
        assert f'resource_metadata="{METADATA}"' in headers["www-authenticate"]


async def test_a_token_in_a_query_or_form_is_ignored(target: Target) -> None:
    token = target.issuer.token().encode()
    form = b"access_token=" + token
    status, _, _ = await target.exchange(
        b"POST /api/v1/tasks?access_token=" + token + b" HTTP/1.1\r\nHost: localhost\r\n"
        b"Connection: close\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        b"Content-Length: " + str(len(form)).encode() + b"\r\n\r\n" + form
    )
    assert status == 401


@pytest.mark.parametrize("body", [b'{"title": "x"}', b""], ids=["a body", "no body"])
async def test_a_token_in_a_trailer_is_ignored(target: Target, body: bytes) -> None:
    chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    status, _, _ = await target.exchange(
        b"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunk
        + b"0\r\nAuthorization: Bearer "
        + target.issuer.token().encode()
        + b"\r\n\r\n"
    )
    assert status == 401


async def test_a_flood_of_unknown_kids_causes_few_fetches_and_fails_no_valid_token(target: Target) -> None:
    """A thousand unknown kids, with a valid token among every fifty."""
    before = len(target.connections)
    valid = target.issuer.token()
    statuses: set[int] = set()
    for start in range(0, 1_000, 50):
        forged = [target.issuer.token(header={"kid": f"made-up-{start + number}"}) for number in range(50)]
        *refused, accepted = await asyncio.gather(*(target.present(token) for token in (*forged, valid)))
        statuses |= {status for status, _, _ in refused}
        assert accepted[0] == 200
    assert statuses <= {401, 503}
    assert len(target.connections) - before <= 4
