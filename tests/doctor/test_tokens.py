"""The doctor's report on a token, with the setting that corrects each mismatch."""

import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from typing import Any
from uuid import uuid4

import pytest

from backend.auth.encoding import encode_base64url
from backend.auth.testing import LocalIssuer, SigningKey
from backend.dev.issuer import Issuer
from backend.dev.oauth import OAuthClient
from backend.dev.people import People, Session
from tests.auth.loopback import says_json, serving
from tests.doctor.report import Report, assert_contains, settings_for

StartIssuer = Callable[..., Issuer]
Forge = Callable[[LocalIssuer], str]

HOUR = 3600


@pytest.mark.parametrize(
    ("forge", "step", "words"),
    [
        (
            lambda issuer: issuer.token(iss="https://auth.example.com"),
            "issuer",
            ["iss is https://auth.example.com", "set BETTER_AUTH_URL to it", "add it to BETTER_AUTH_ISSUERS"],
        ),
        (
            lambda issuer: issuer.token(iss=f"{issuer.url}/"),
            "issuer",
            [f"iss is {LocalIssuer().url[:4]}", "a trailing slash", "set BETTER_AUTH_ISSUERS to exactly"],
        ),
        (lambda issuer: issuer.token(omit=["iss"]), "issuer", ["iss is null", "the jwt plugin did not issue"]),
        (
            lambda issuer: issuer.token(aud="https://other.example.com"),
            "audience",
            ["aud is https://other.example.com", "add it to BETTER_AUTH_AUDIENCES", "PUBLIC_URL", "`audience:"],
        ),
        (lambda issuer: issuer.token(omit=["aud"]), "audience", ["aud is null", '`audience: "http://localhost:8000"`']),
        (
            lambda issuer: issuer.token(aud="aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeF"),
            "audience",
            ["this is an ID token", "send the access token", "resource=http://localhost:8000"],
        ),
        (
            lambda issuer: issuer.token(key=SigningKey.generate("EdDSA", "elsewhere")),
            "key",
            ["kid elsewhere is not published", "only key", "another Better Auth", "correct BETTER_AUTH_JWKS_URL"],
        ),
        (
            lambda issuer: issuer.token(key=SigningKey.generate("EdDSA", issuer.key.kid)),
            "signature",
            ["another key signed the token", "BETTER_AUTH_JWKS_URL names another server"],
        ),
        (
            lambda issuer: issuer.token(key=SigningKey.generate("ES256", issuer.key.kid)),
            "signature",
            ["alg is ES256, but the published key has EdDSA"],
        ),
        (lambda issuer: issuer.token(header={"alg": "HS256"}), "algorithm", ["alg is HS256", "`jwks.keyPairConfig`"]),
        (lambda issuer: issuer.token(header={"alg": "none"}), "algorithm", ["alg is none", "send a JWT from"]),
        (lambda issuer: issuer.sign({"alg": "EdDSA"}, {}), "kid", ["no usable kid", "send a JWT from"]),
        (
            lambda issuer: issuer.token(header={"typ": "logout+jwt"}),
            "typ",
            ["typ is logout+jwt, a back-channel logout"],
        ),
        (lambda issuer: issuer.token(header={"typ": "better-auth.session-cache+jwt"}), "typ", ["cookie cache"]),
        (lambda issuer: issuer.security_event(), "typ", ["typ is secevent+jwt, a security event", "send a JWT from"]),
        (lambda issuer: issuer.token(header={"crit": ["b64"]}), "form", ["send a JWT from"]),
        (
            lambda issuer: issuer.token(iat=int(time.time()) - HOUR, exp=int(time.time()) - 600),
            "times",
            ["it expired 60", "s ago", "send a JWT from"],
        ),
        (lambda issuer: issuer.token(exp=900), "times", ["a number in `expirationTime`", '"15m"']),
        (lambda issuer: issuer.token(omit=["iat"]), "times", ["iat is null", "`signJWT` adds no iat"]),
        (lambda issuer: issuer.token(exp="soon"), "times", ["exp is soon", "must be numbers"]),
        (
            lambda issuer: issuer.token(iat=int(time.time()) + HOUR, exp=int(time.time()) + HOUR + 900),
            "times",
            ["it becomes valid in 3", "NTP"],
        ),
        (
            lambda issuer: issuer.token(expires_in=2 * HOUR),
            "lifetime",
            ["its lifetime is 7200 s, the maximum is 3600 s", "`expirationTime`", "set TOKEN_MAX_LIFETIME to 7200"],
        ),
        (lambda issuer: issuer.token(sub=""), "subject", ["`getSubject`"]),
        (lambda issuer: issuer.token(cnf={"jkt": "x"}), "subject", ["DPoP"]),
        (lambda issuer: issuer.access_token(omit=["jti"]), "subject", ["needs client_id and jti", "oauth-provider"]),
        (lambda issuer: issuer.token(image=f"data:{'x' * 30_000}"), "form", ["longer than 32 KiB", "`definePayload`"]),
        (lambda _: "Bearer abc", "form", ["this is not a JWT", "without quotes, `Bearer` or line breaks"]),
        (lambda _: "x" * 40, "form", ["this is not a JWT"]),
        (lambda _: f"{encode_base64url(b'{}')}..", "algorithm", ["alg is null"]),
    ],
)
async def test_a_mismatch_is_reported_with_its_correction(
    issuer: LocalIssuer, jwks_url: str, forge: Forge, step: str, words: list[str]
) -> None:
    report = await Report.of(forge(issuer), **settings_for(issuer, jwks_url))
    (line,) = report.failures()
    assert line.startswith(f"FAIL  {step}")
    assert_contains(line, words)


async def test_a_lifetime_beyond_the_settings_range_is_corrected_at_the_issuer(
    issuer: LocalIssuer, jwks_url: str
) -> None:
    (line,) = (await Report.of(issuer.token(expires_in=90_000), **settings_for(issuer, jwks_url))).failures()
    assert "`expirationTime`" in line
    assert "TOKEN_MAX_LIFETIME" not in line


async def test_several_mismatches_are_all_reported(issuer: LocalIssuer, jwks_url: str) -> None:
    """Each check runs as if the earlier mismatches were corrected, including the signature."""
    now = int(time.time())
    claims: dict[str, Any] = {"iat": now - 4 * HOUR, "exp": now - 60, "iss": "https://else.example", "aud": ["x", "y"]}
    report = await Report.of(issuer.token(**claims), **settings_for(issuer, jwks_url))
    failed = [finding.subject for finding in report if not finding.holds]
    assert failed == ["times", "lifetime", "issuer", "audience"]
    assert report[-2].subject == "signature"
    assert report[-2].holds
    forged = issuer.token(**claims, key=SigningKey.generate("EdDSA", issuer.key.kid))
    assert (await Report.of(forged, **settings_for(issuer, jwks_url))).failures()[-1].startswith("FAIL  signature")


async def test_contradictory_times_end_the_examination(issuer: LocalIssuer, jwks_url: str) -> None:
    now = int(time.time())
    report = await Report.of(issuer.token(iat=now, exp=now + 60, nbf=now + 100), **settings_for(issuer, jwks_url))
    assert report.on("times").count("FAIL") == 2


async def test_a_published_key_that_cannot_be_used_is_reported() -> None:
    issuer = LocalIssuer("http://issuer.test")
    odd = SigningKey.generate("RS256", "odd")
    async with serving(says_json({"keys": [*issuer.jwks["keys"], {**odd.jwk, "use": "enc"}]})) as (url, _):
        (line,) = (await Report.of(issuer.token(key=odd), **settings_for(issuer, url))).failures()
    assert_contains(line, ["FAIL  key", "kid odd is published, but cannot be used: not for signatures (use)"])


async def test_without_keys_the_claims_are_examined(issuer: LocalIssuer) -> None:
    async with serving(says_json({"keys": []})) as (url, _):
        report = await Report.of(issuer.token(aud="elsewhere"), **settings_for(issuer, url))
    assert [finding.subject for finding in report if not finding.holds] == ["keys", "audience", "key"]
    assert report.on("subject").startswith("ok")


class TestPrincipal:
    async def test_a_ban_is_a_warning(self, issuer: LocalIssuer, jwks_url: str) -> None:
        report = await Report.of(issuer.token(banned=True), **settings_for(issuer, jwks_url))
        assert report.failures() == []
        assert_contains(report.on("person"), ["warn", "banned this account", "403"])
        assert not (await Report.of(issuer.token(banned=True, banExpires=1), **settings_for(issuer, jwks_url))).on(
            "person"
        )

    async def test_a_missing_role_is_a_warning(self, issuer: LocalIssuer, jwks_url: str) -> None:
        report = await Report.of(issuer.token(omit=["role"]), **settings_for(issuer, jwks_url))
        assert_contains(report.on("roles"), ["warn", "no `role`", "the admin plugin", "`definePayload`"])
        assert (
            (await Report.of(issuer.token(role="admin,user"), **settings_for(issuer, jwks_url)))
            .on("roles")
            .endswith("admin, user")
        )

    @pytest.mark.parametrize(
        ("role", "seen"),
        [(["admin", 1], '["admin", 1]'), (5, "5"), ({"admin": True}, '{"admin": true}'), ("admin\0", "admin?")],
        ids=str,
    )
    async def test_a_malformed_role_is_a_warning(
        self, issuer: LocalIssuer, jwks_url: str, role: object, seen: str
    ) -> None:
        report = await Report.of(issuer.token(role=role), **settings_for(issuer, jwks_url))
        assert_contains(report.on("roles"), ["warn", f"`role` is {seen}", "counts as no role", "`definePayload`"])

    async def test_an_array_of_roles_is_read(self, issuer: LocalIssuer, jwks_url: str) -> None:
        report = await Report.of(issuer.token(role=["admin", "user"]), **settings_for(issuer, jwks_url))
        assert report.on("roles").endswith("admin, user")

    async def test_the_scopes_of_an_api_key_are_listed(self, issuer: LocalIssuer, jwks_url: str) -> None:
        report = await Report.of(issuer.api_key_token(scope="tasks:read"), **settings_for(issuer, jwks_url))
        assert_contains(report.on("scopes"), ["tasks:read; other routes return 403 insufficient_scope"])


class TestRealTokens:
    @pytest.fixture
    async def session(self, people: People) -> Session:
        return await people.sign_up(f"{uuid4().hex}@example.com")

    async def test_a_session_token_is_exchanged(self, better_auth: Issuer, session: Session) -> None:
        """The further checks use the JWT that Better Auth issues for the session."""
        report = await Report.of(session.bearer, better_auth_url=better_auth.url)
        (line,) = report.failures()
        assert_contains(
            line, ["FAIL  form", "a session token, not a JWT", f"exchange it at {better_auth.base_url}/token"]
        )
        assert_contains(report.on("exchange"), ["ok", "issued a JWT for this session"])
        assert report.on("signature").startswith("ok")
        assert report.on("subject").endswith(session.user_id)

    async def test_a_session_that_has_ended_is_reported(
        self, better_auth: Issuer, people: People, session: Session
    ) -> None:
        await people.sign_out(session)
        report = await Report.of(session.bearer, better_auth_url=better_auth.url)
        assert_contains(
            report.on("exchange"), ["FAIL", "HTTP 401", "the session has ended", "bearer plugin", "set-auth-token"]
        )

    async def test_a_session_token_is_not_sent_unencrypted(self, jwks_url: str, session: Session) -> None:
        report = await Report.of(
            session.bearer, better_auth_url="http://auth.example.com", better_auth_jwks_url=jwks_url
        )
        assert_contains(report.on("exchange"), ["warn", "not sent to http://auth.example.com", "https"])

    async def test_a_changed_secret_is_reported(self, start_issuer: StartIssuer) -> None:
        """Better Auth can no longer decrypt its private key, but still publishes the public key."""
        better_auth = start_issuer(secret="a" * 32)
        async with People(better_auth.base_url) as people:
            await people.token(await people.sign_up("ada@example.com"))
            better_auth.stop()
            better_auth.secret = "b" * 32
            better_auth.start()
            session = await people.sign_in("ada@example.com")
        report = await Report.of(session.bearer, better_auth_url=better_auth.url)
        assert report.on("keys").startswith("ok")
        assert_contains(
            report.on("exchange"), ["FAIL", "HTTP 500", "BETTER_AUTH_SECRET", "delete the rows of its table jwks"]
        )

    async def test_different_public_and_internal_addresses_are_reported(self, start_issuer: StartIssuer) -> None:
        """As in containers and behind proxies. The recommended settings solve the problem."""
        better_auth = start_issuer(url="https://auth.example.com")
        inner = f"http://127.0.0.1:{better_auth.port}"
        async with People(f"{inner}/api/auth") as people:
            token = await people.token(await people.sign_up("ada@example.com"))
        issuer, audience = (await Report.of(token, better_auth_url=inner)).failures()
        assert_contains(issuer, ["iss is https://auth.example.com", "set BETTER_AUTH_URL to it"])
        assert_contains(issuer, [f"BETTER_AUTH_JWKS_URL to {inner}/api/auth/jwks", "BETTER_AUTH_ISSUERS"])
        assert_contains(audience, ["aud is https://auth.example.com", "BETTER_AUTH_AUDIENCES"])
        corrected: dict[str, Any] = {
            "better_auth_url": "https://auth.example.com",
            "better_auth_jwks_url": f"{inner}/api/auth/jwks",
        }
        assert (await Report.of(token, **corrected)).failures() == []

    async def test_a_recreated_database_with_serial_ids_is_reported(self, start_issuer: StartIssuer) -> None:
        better_auth = start_issuer(serial_ids=True)
        async with People(better_auth.base_url) as people:
            old = await people.token(await people.sign_up("ada@example.com"))
        better_auth.stop()
        better_auth.database.unlink()
        better_auth.start()
        (line,) = (await Report.of(old, better_auth_url=better_auth.url)).failures()
        assert_contains(
            line, ["FAIL  signature", "kid 1 is published, but another key signed the token", "BETTER_AUTH_URL"]
        )

    async def test_a_deleted_key_is_reported_and_a_rotated_one_accepted(self, start_issuer: StartIssuer) -> None:
        better_auth = start_issuer()
        async with People(better_auth.base_url) as people:
            session = await people.sign_up("ada@example.com")
            tokens = [await people.token(session)]
            better_auth.rotate()
            tokens.append(await people.token(session))
            for token in tokens:
                report = await Report.of(token, better_auth_url=better_auth.url)
                assert report.failures() == []
                assert_contains(report.on("keys"), ["2 can be used"])
            better_auth.forget_keys()
            await people.token(session)
        (line,) = (await Report.of(tokens[1], better_auth_url=better_auth.url)).failures()
        assert_contains(line, ["FAIL  key", "is not published at", better_auth.jwks_url, "correct BETTER_AUTH_URL"])

    async def test_a_user_banned_with_sql_is_reported(self, better_auth: Issuer, session: Session) -> None:
        with closing(sqlite3.connect(better_auth.database, timeout=10)) as connection, connection:
            connection.execute("UPDATE user SET banned = 1 WHERE id = ?", [session.user_id])
        report = await Report.of(session.bearer, better_auth_url=better_auth.url)
        assert_contains(report.on("exchange"), ["FAIL", "HTTP 401", "the account is banned"])


class TestOAuth:
    @pytest.fixture(scope="class")
    async def session(self, better_auth_oauth: Issuer) -> AsyncIterator[Session]:
        async with People(better_auth_oauth.base_url) as people:
            yield await people.sign_up(f"{uuid4().hex}@example.com")

    async def test_the_scopes_of_an_access_token_are_listed(
        self, better_auth_oauth: Issuer, oauth: OAuthClient, session: Session
    ) -> None:
        answer = await oauth.authorization_code(session, scope="openid tasks:read", resource="http://localhost:8000")
        report = await Report.of(answer["access_token"], better_auth_url=better_auth_oauth.url)
        assert report.problems() == ["warn  database     " + report.on("database").partition("database     ")[2]]
        assert_contains(report.on("scopes"), ["openid, tasks:read; other routes return 403 insufficient_scope"])

    async def test_an_id_token_is_reported(
        self, better_auth_oauth: Issuer, oauth: OAuthClient, session: Session
    ) -> None:
        token = (await oauth.authorization_code(session, scope="openid"))["id_token"]
        report = await Report.of(token, better_auth_url=better_auth_oauth.url)
        assert_contains(report.on("audience"), ["FAIL", "this is an ID token", "resource=http://localhost:8000"])

    async def test_an_opaque_access_token_is_reported(
        self, better_auth_oauth: Issuer, oauth: OAuthClient, session: Session
    ) -> None:
        token = (await oauth.authorization_code(session, scope="openid"))["access_token"]
        report = await Report.of(token, better_auth_url=better_auth_oauth.url)
        assert_contains(report.on("form"), ["FAIL", "not a JWT"])
        assert_contains(report.on("exchange"), ["FAIL", "an opaque access token", "resource=http://localhost:8000"])

    async def test_an_oauth_client_among_the_audiences_is_a_warning(
        self, better_auth_oauth: Issuer, oauth: OAuthClient, session: Session
    ) -> None:
        """Its ID tokens would be accepted. Without a token, the doctor recognizes the client by the form of its id."""
        client = better_auth_oauth.client["client_id"]
        settings: dict[str, Any] = {"better_auth_url": better_auth_oauth.url}
        settings["better_auth_audiences"] = (client, "http://localhost:8000")
        words = ["warn", f"{client} is an OAuth client", "remove it from BETTER_AUTH_AUDIENCES"]
        assert_contains((await Report.of(**settings)).on("audiences"), words)
        answer = await oauth.authorization_code(session, scope="openid", resource="http://localhost:8000")
        for name in "id_token", "access_token":
            assert_contains((await Report.of(answer[name], **settings)).on("audiences"), words)

    async def test_an_oauth_client_with_a_custom_id_is_a_warning(self, issuer: LocalIssuer, jwks_url: str) -> None:
        settings = settings_for(issuer, jwks_url) | {"better_auth_audiences": ("web", issuer.audience)}
        report = await Report.of(issuer.access_token(client_id="web"), **settings)
        assert_contains(report.on("audiences"), ["warn", "web is an OAuth client"])

    async def test_a_token_of_a_client_for_itself_is_a_warning(
        self, better_auth_oauth: Issuer, oauth: OAuthClient
    ) -> None:
        answer = await oauth.client_credentials(scope="tasks:read", resource="http://localhost:8000")
        report = await Report.of(answer["access_token"], better_auth_url=better_auth_oauth.url)
        assert_contains(report.on("person"), ["warn", "client_credentials", "403"])
