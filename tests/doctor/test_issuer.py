"""The doctor's report on the issuer: its address, the path of its keys, the keys, and its clock."""

import asyncio
import datetime as dt
import json
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from jwt.algorithms import RSAAlgorithm

from backend.auth.testing import SigningKey
from backend.dev.issuer import CONTRACT, Issuer, find_node
from backend.dev.people import demo_token
from tests.auth.loopback import hangs, says, says_json, serving
from tests.doctor.report import Report, assert_contains

StartIssuer = Callable[..., Issuer]


async def test_a_real_better_auth_passes(better_auth: Issuer, database_url: str) -> None:
    token = await asyncio.to_thread(demo_token, better_auth.base_url, "doctor@example.com")
    report = await Report.of(token, better_auth_url=better_auth.url, database_url=database_url)
    assert report.problems() == []
    assert [finding.subject for finding in report] == [
        *("issuers", "audiences", "public url", "cors", "dns", "tcp", "better auth", "keys", "clock"),
        *("database", "migrations", "isolation", "roles", "prepare", "listen", "redis"),
        *("form", "algorithm", "kid", "typ", "times", "lifetime", "issuer", "audience", "subject", "key", "signature"),
        *("roles", "account"),
    ]


class TestAddress:
    async def test_an_unknown_host_name_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)  # tests send no DNS queries
        report = await Report.of(better_auth_url="https://auth.internal")
        (line,) = report.failures()
        assert_contains(
            line,
            ["FAIL  dns", "auth.internal cannot be resolved", "correct BETTER_AUTH_URL, or set BETTER_AUTH_JWKS_URL"],
        )
        report = await Report.of(better_auth_jwks_url="https://auth.internal/jwks")
        (line,) = report.failures()
        assert line.endswith("correct BETTER_AUTH_JWKS_URL")

    async def test_a_refused_connection_is_reported(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            (line,) = (await Report.of(better_auth_url=f"http://127.0.0.1:{port}")).failures()
        assert_contains(line, ["FAIL  tcp", f"127.0.0.1:{port}", "start Better Auth, or correct BETTER_AUTH_URL"])

    async def test_a_server_that_does_not_respond_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("backend.doctor.issuer.TOTAL_TIMEOUT", 0.2)
        async with serving(hangs) as (url, _):
            (line,) = (await Report.of(better_auth_jwks_url=url)).failures()
        assert_contains(line, ["FAIL  better auth", url, "correct BETTER_AUTH_JWKS_URL"])

    async def test_a_self_signed_certificate_is_reported(self, tmp_path: Path) -> None:
        async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        server = await asyncio.start_server(close, "127.0.0.1", 0, ssl=self_signed_context(tmp_path))
        async with server:
            port = server.sockets[0].getsockname()[1]
            (line,) = (await Report.of(better_auth_url=f"https://localhost:{port}")).failures()
        assert_contains(line, ["FAIL  tls", "self-signed certificate", "name in BETTER_AUTH_URL"])

    async def test_https_to_an_http_port_is_reported(self, better_auth: Issuer) -> None:
        url = better_auth.url.replace("http:", "https:")
        (line,) = (await Report.of(better_auth_url=url)).failures()
        assert_contains(line, ["FAIL  tls", "does not speak TLS", "BETTER_AUTH_URL"])


class TestPath:
    async def test_a_custom_jwks_path_is_found(self) -> None:
        with better_auth_with('jwt({ jwks: { jwksPath: "/.well-known/jwks.json" } })') as url:
            (line,) = (await Report.of(better_auth_url=url)).failures()
            new = f"{url}/api/auth/.well-known/jwks.json"
            assert_contains(
                line,
                ["FAIL  key set", f"HTTP 404 at {url}/api/auth/jwks", f"keys are at {new}: set BETTER_AUTH_JWKS_URL"],
            )
            assert (await Report.of(better_auth_url=url, better_auth_jwks_url=new)).failures() == []

    async def test_a_missing_jwt_plugin_is_reported(self) -> None:
        with better_auth_with("") as url:
            (line,) = (await Report.of(better_auth_url=url)).failures()
        assert_contains(
            line, ["FAIL  key set", "HTTP 404", "add the jwt plugin to it", "`jwksPath`", "BETTER_AUTH_JWKS_URL"]
        )

    async def test_a_custom_base_path_is_found(self, start_issuer: StartIssuer) -> None:
        better_auth = start_issuer(url="http://localhost:0/auth/v1")
        origin = better_auth.url.removesuffix("/auth/v1")
        (line,) = (await Report.of(better_auth_url=origin)).failures()
        assert_contains(line, ["FAIL  key set", "HTTP 404", f"set BETTER_AUTH_URL to {better_auth.url}"])
        assert (await Report.of(better_auth_url=better_auth.url)).failures() == []

    @pytest.mark.parametrize("path", ["/app", "/api", "/api/auth/jwks", "/api/auth/token"])
    async def test_a_url_with_a_superfluous_path_is_corrected(self, better_auth: Issuer, path: str) -> None:
        (line,) = (await Report.of(better_auth_url=f"{better_auth.url}{path}")).failures()
        assert_contains(line, ["FAIL  key set", f"set BETTER_AUTH_URL to {better_auth.url}"])
        assert line.endswith(better_auth.url)

    async def test_a_page_of_another_server_is_reported(self) -> None:
        page = says("200 OK", b"<!doctype html><title>Sign in</title>", {"Content-Type": "text/html"})
        async with serving(page) as (url, _):
            origin = url.removesuffix("/jwks")
            (line,) = (await Report.of(better_auth_url=origin)).failures()
        assert_contains(
            line,
            [
                "FAIL  key set",
                "an HTML page instead of keys",
                f"no Better Auth on {origin}",
                "set BETTER_AUTH_URL to its",
            ],
        )

    @pytest.mark.parametrize(
        ("location", "words"),
        [
            ("https://auth.example.com/api/auth/jwks", "set BETTER_AUTH_URL to https://auth.example.com"),
            ("/sign-in?next=%2Fapi%2Fauth%2Fjwks", "sign-in check"),
        ],
    )
    async def test_a_redirect_is_reported(self, location: str, words: str) -> None:
        async with serving(says("308 Permanent Redirect", headers={"Location": location})) as (url, _):
            (line,) = (await Report.of(better_auth_url=url.removesuffix("/jwks"))).failures()
        assert_contains(line, ["FAIL  key set", "redirects to", "which is not followed", words, "BETTER_AUTH_URL"])

    async def test_a_redirect_of_the_jwks_url_names_its_target(self) -> None:
        async with serving(says("301 Moved Permanently", headers={"Location": "https://keys.example.com/jwks"})) as (
            url,
            _,
        ):
            (line,) = (await Report.of(better_auth_jwks_url=url)).failures()
        assert line.endswith("set BETTER_AUTH_JWKS_URL to https://keys.example.com/jwks")

    async def test_an_exceeded_rate_limit_is_reported(self, start_issuer: StartIssuer) -> None:
        better_auth = start_issuer(rate_limit=True)
        async with httpx.AsyncClient(trust_env=False) as client:
            for _ in range(101):
                await client.get(better_auth.jwks_url)
            (line,) = (await Report.of(better_auth_url=better_auth.url)).failures()
        assert_contains(line, ["FAIL  key set", "HTTP 429", "`rateLimit`"])

    async def test_a_failing_server_is_reported(self) -> None:
        async with serving(says("502 Bad Gateway")) as (url, _):
            (line,) = (await Report.of(better_auth_jwks_url=url)).failures()
        assert_contains(line, ["FAIL  key set", "HTTP 502", "log"])


def weak_key(kid: str) -> dict[str, Any]:
    key = rsa.generate_private_key(65537, 1024)  # noqa: S505  # a weak key on purpose
    return {**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "alg": "RS256", "kid": kid}


class TestKeys:
    async def report_on(self, *keys: object) -> Report:
        async with serving(says_json({"keys": keys})) as (url, _):
            return await Report.of(better_auth_jwks_url=url)

    async def test_unusable_keys_beside_usable_ones_are_reported(self) -> None:
        good = SigningKey.generate("EdDSA", "good").jwk
        report = await self.report_on(
            good, weak_key("weak"), {"kty": "oct", "k": "c2VjcmV0", "kid": "shared"}, {"kty": "RSA"}
        )
        assert report.failures() == []
        assert_contains(report.on("keys"), ["1 can be used: good (EdDSA)"])
        assert_contains(report.on("keys"), ["kid weak cannot be used: modulus under 2048", "`jwks.keyPairConfig`"])
        assert_contains(report.on("keys"), ["kid shared cannot be used: private or symmetric", "a key without a kid"])

    async def test_a_set_without_usable_keys_is_a_failure(self) -> None:
        other = {**SigningKey.generate("ES256", "other").jwk, "alg": "ES384"}
        lines = (await self.report_on(weak_key("weak"), other)).failures()
        assert_contains(lines[0], ["kid weak", "modulus", "`jwks.keyPairConfig`"])
        assert_contains(lines[1], ["kid other", "the algorithm (alg)"])

    async def test_two_keys_with_the_same_kid_are_reported(self) -> None:
        twice = [SigningKey.generate("EdDSA", "1").jwk for _ in range(2)]
        lines = (await self.report_on(*twice)).failures()
        assert len(lines) == 2
        assert_contains(lines[0], ["kid 1 cannot be used: several keys share this kid"])
        report = await self.report_on(*twice, SigningKey.generate("EdDSA", "2").jwk)
        assert_contains(report.on("keys"), ["1 can be used: 2 (EdDSA)", "warn", "kid 1 cannot be used: several keys"])

    async def test_too_many_keys_are_reported(self) -> None:
        (line,) = (
            await self.report_on(*[SigningKey.generate("EdDSA", str(number)).jwk for number in range(257)])
        ).failures()
        assert_contains(line, ["more than 256 keys", "`jwks.gracePeriod`", "`jwks.rotationInterval`"])

    async def test_an_oversized_key_set_is_reported(self) -> None:
        (line,) = (await self.report_on({"kid": "x" * 300_000})).failures()
        assert_contains(line, ["the body is over 256 KiB", "`jwks.gracePeriod`", "`jwks.rotationInterval`"])

    async def test_an_empty_key_set_is_reported(self) -> None:
        (line,) = (await self.report_on()).failures()
        assert_contains(line, ["the set is empty", "/token"])

    @pytest.mark.parametrize("body", [b"oops", b"[]", b'{"keys": {}}', b'{"code": "OK"}'])
    async def test_a_document_that_is_no_key_set_is_reported(self, body: bytes) -> None:
        async with serving(says("200 OK", body)) as (url, _):
            (line,) = (await Report.of(better_auth_jwks_url=url)).failures()
        assert_contains(line, ["FAIL  key set", url, "correct BETTER_AUTH_JWKS_URL"])

    async def test_only_the_newest_keys_are_listed(self) -> None:
        report = await self.report_on(*[SigningKey.generate("EdDSA", f"key{number}").jwk for number in range(9)])
        assert_contains(report.on("keys"), ["9 can be used", "key4 (EdDSA)", "key8 (EdDSA) and 4 more"])

    async def test_control_characters_of_an_issuer_are_removed(self) -> None:
        (line,) = (await self.report_on({"kid": "\x1b[2J", "kty": "RSA"})).failures()
        assert_contains(line, ["kid ?[2J cannot be used: no usable kid"])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-3600, ["FAIL  clock", "3600 s ahead of this machine's", "NTP"]),
        (3600, ["warn  clock", "3600 s behind this machine's", "NTP"]),
    ],
)
async def test_a_difference_between_the_clocks_is_reported(
    better_auth: Issuer, seconds: float, words: list[str]
) -> None:
    report = await Report.of(better_auth_url=better_auth.url, clock=lambda: round(time.time() + seconds))
    assert_contains(report.on("clock").replace("3601 s", "3600 s").replace("3599 s", "3600 s"), words)


def self_signed_context(folder: Path) -> ssl.SSLContext:
    """A server's TLS context with a self-signed certificate for localhost."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "both.pem").write_bytes(private + certificate.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "both.pem")
    return context


SERVER = """
import { createServer } from "node:http";
import { betterAuth } from "better-auth";
import { memoryAdapter } from "better-auth/adapters/memory";
import { toNodeHandler } from "better-auth/node";
import { jwt } from "better-auth/plugins";

const server = createServer((request, response) => handle(request, response));
let handle;
server.listen(0, "127.0.0.1", () => {
  const url = `http://localhost:${server.address().port}`;
  const database = memoryAdapter({ user: [], session: [], account: [], verification: [], jwks: [] });
  const secret = "0123456789abcdef".repeat(4);
  const telemetry = { enabled: false };
  handle = toNodeHandler(betterAuth({ baseURL: url, secret, database, telemetry, plugins: [PLUGIN] }));
  process.stdout.write(JSON.stringify(url) + "\\n");
});
process.stdin.once("end", () => process.exit()).resume();
"""


@contextmanager
def better_auth_with(plugin: str) -> Iterator[str]:
    """Run a real Better Auth with one plugin, given as JavaScript; yields its address."""
    program = SERVER.replace("PLUGIN", plugin)
    with subprocess.Popen(
        [find_node(), "--input-type=module", "--eval", program],
        cwd=CONTRACT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"NODE_ENV": "development"},
        text=True,
    ) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        assert process.stdin is not None
        process.stdin.close()
