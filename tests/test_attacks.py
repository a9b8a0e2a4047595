"""Every attack on a token, over HTTP against the whole application: refused, no connection made, nothing in the log."""

import asyncio
import json
import logging
import re
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
from tests.auth.forged_tokens import EVERYWHERE, NOW, TYPE, Forge
from tests.auth.test_verifier import NAMES, TIMES, raw

# What the issuer is asked once more for, before it is a 401: its keys may have changed.
MAY_FETCH = {Reason.UNKNOWN_KEY, Reason.BAD_SIGNATURE}


@dataclass
class Target:
    """The application behind uvicorn and its real HTTP parser, with a clock that stands still."""

    issuer: LocalIssuer
    port: int
    keys_url: str
    connections: list[tuple[str, int]]

    async def send(self, *lines: bytes, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        """Say these header lines, byte for byte. Status, headers and body of the answer; status 0 if there is none."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = [f"{method} /api/v1/tasks HTTP/1.1".encode(), b"Host: localhost", b"Connection: close", *lines, b"", b""]
        writer.write(b"\r\n".join(head))
        answer = await reader.read()
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")  # type: ignore[assignment]  # bytes from here on
        status, *rest = bytes(head).decode("latin-1").split("\r\n")  # type: ignore[arg-type]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
        return int(status.split()[1]) if answer else 0, headers, body

    async def present(self, token: str) -> tuple[int, dict[str, str], bytes]:
        return await self.send(b"Authorization: Bearer " + token.encode("utf-8", "surrogatepass"))


@pytest.fixture(scope="module")
async def target(settings: Settings) -> AsyncIterator[Target]:
    issuer = LocalIssuer(clock=lambda: NOW)
    started = asyncio.Event()
    connections: list[tuple[str, int]] = []

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            started.set()

    async def watched(remote_host: str, remote_port: int, **options: Any) -> Any:
        connections.append((remote_host, remote_port))
        return await connect_tcp(remote_host, remote_port, **options)

    connect_tcp = anyio.connect_tcp
    with serve_keys(issuer) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr("backend.app.TokenVerifier", partial(TokenVerifier, clock=lambda: NOW))
        patch.setattr(anyio, "connect_tcp", watched)
        config = settings.model_copy(update={"better_auth_url": issuer.url, "better_auth_jwks_url": url})
        server = Server(uvicorn.Config(create_app(config), port=0, http=Protocol, log_config=None, access_log=False))
        serving = asyncio.create_task(server.serve())
        await started.wait()
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Target(issuer, port, url, connections)
        server.should_exit = True
        await serving


# A space before the token is the header's, which may have several.
ATTACKS = [row for row in EVERYWHERE + TYPE if row[0] != "leading space"]


def claiming(members: dict[str, str]) -> Forge:
    return lambda issuer: raw(issuer, **members)


CLAIMS = [(repr(members), claiming(members), reason) for members, reason in TIMES + NAMES if reason]


@pytest.mark.parametrize(
    ("forge", "reason"), [row[1:] for row in ATTACKS + CLAIMS], ids=[row[0] for row in ATTACKS + CLAIMS]
)
async def test_refused(target: Target, forge: Forge, reason: Reason, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = forge(target.issuer)
    before = len(target.connections)
    status, headers, body = await target.present(token)
    if status == 401:
        challenge = headers["www-authenticate"]
        assert 'error="invalid_token"' in challenge
        said = re.search(r'error_description="([^"]*)"', challenge)
        assert said is not None
        assert said[1].startswith(reason.value.partition("<")[0])
        assert json.loads(body)["code"] == "invalid_token"
    else:
        # By the header rule, or by the HTTP parser's own: the token's characters or length cannot stand in a header.
        assert status in (400, 431)
        assert not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token) or len(token) > 32 * 1024
    made = target.connections[before:]
    assert {f"http://{host}:{port}/jwks" for host, port in made} <= (
        {target.keys_url} if reason in MAY_FETCH else set()
    )
    logged = [JsonLines().format(record) for record in caplog.records if record.name != "asyncio"]
    assert all("\n" not in line for line in logged)
    for segment in token.split("."):
        assert len(segment) < 8 or not any(segment in line for line in logged)


async def test_the_good_pass(target: Target) -> None:
    """The same way in, so that what is refused above is not refused for another reason."""
    assert (await target.present(target.issuer.token()))[0] == 200
    beside = {"jku": "https://evil.example/jwks", "x5u": "https://evil.example", "jwk": {"kty": "oct"}, "x5c": ["MII"]}
    before = len(target.connections)
    assert (await target.present(target.issuer.token(header=beside)))[0] == 200
    assert target.connections[before:] == [], "named in a good token's header, and never followed"


@pytest.mark.parametrize(
    ("lines", "status", "code"),
    [
        pytest.param([], 401, "unauthorized", id="no header"),
        pytest.param([b"Authorization: Basic YTpi"], 401, "unauthorized", id="another scheme"),
        pytest.param([b"Authorization: Bearer"], 400, "invalid_request", id="no token"),
        pytest.param([b"Authorization: Bearer "], 400, "invalid_request", id="no token but a space"),
        pytest.param([b"Authorization: Bearer\t$"], 400, "invalid_request", id="a tab"),
        pytest.param([b"Authorization: Bearer $ x"], 400, "invalid_request", id="two tokens"),
        pytest.param([b"Authorization: Bearer $, Bearer $"], 400, "invalid_request", id="a list"),
        pytest.param(
            [b"Authorization: Bearer $", b"Authorization: Bearer $"], 400, "invalid_request", id="two headers"
        ),
        pytest.param([b"authorization: bEaReR   $"], 200, None, id="any case, several spaces"),
        pytest.param([b"Cookie: better-auth.session_token=$"], 401, "unauthorized", id="a cookie"),
        pytest.param([b"X-Authorization: Bearer $"], 401, "unauthorized", id="another header"),
        pytest.param([b"Authorization:Bearer $"], 200, None, id="no space after the colon"),
    ],
)
async def test_the_header_to_the_letter(target: Target, lines: list[bytes], status: int, code: str | None) -> None:
    token = target.issuer.token().encode()
    found, headers, body = await target.send(*(line.replace(b"$", token) for line in lines))
    assert found == status
    if code:
        assert json.loads(body)["code"] == code
        assert headers["content-type"] == "application/problem+json"
        assert headers["www-authenticate"].startswith("Bearer ")
        assert ("error=" in headers["www-authenticate"]) is (code != "unauthorized")
        assert 'resource_metadata="' in headers["www-authenticate"]


async def test_a_token_is_read_from_the_header_alone(target: Target) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    form = b"access_token=" + target.issuer.token().encode()
    writer.write(
        b"POST /api/v1/tasks?access_token=" + target.issuer.token().encode() + b" HTTP/1.1\r\nHost: localhost\r\n"
        b"Connection: close\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        b"Content-Length: " + str(len(form)).encode() + b"\r\n\r\n" + form
    )
    assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
    writer.close()


@pytest.mark.parametrize("body", [b'{"title": "x"}', b""], ids=["a body", "no body"])
async def test_a_token_in_a_trailer_is_none(target: Target, body: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    writer.write(
        b"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunk
        + b"0\r\nAuthorization: Bearer "
        + target.issuer.token().encode()
        + b"\r\n\r\n"
    )
    assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
    writer.close()


async def test_a_flood_of_unknown_keys_is_a_few_fetches_and_hurts_nobody(target: Target) -> None:
    """A thousand of them, and the good traffic in between is served."""
    before = len(target.connections)
    good = target.issuer.token()
    statuses: list[int] = []
    for start in range(0, 1_000, 50):
        forged = [target.issuer.token(header={"kid": f"made-up-{start + number}"}) for number in range(50)]
        answers = await asyncio.gather(*(target.present(token) for token in (*forged, good)))
        statuses += [status for status, _, _ in answers[:-1]]
        assert answers[-1][0] == 200
    assert set(statuses) <= {401, 503}
    assert len(target.connections) - before <= 4
