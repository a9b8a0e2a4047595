"""TokenVerifier: the claims that it accepts, its errors, and its cache of verified tokens."""

import asyncio
import contextlib
import json
import logging
from typing import Any

import pytest

from backend.auth import (
    InvalidToken,
    KeysUnavailable,
    Observer,
    Reason,
    RemoteKeys,
    TokenVerifier,
    parse_jws,
    verify_signature,
)
from backend.auth import verifier as verifier_module
from backend.auth.jws import MAX_TOKEN
from backend.auth.testing import ALGORITHMS, LocalIssuer, SigningKey
from tests.auth.scripted import Endpoint, Time, remote_keys, settle

NOW = 1_800_000_000


async def refusal(verifier: TokenVerifier, token: str) -> Reason | None:
    try:
        await verifier.verify(token)
    except InvalidToken as error:
        return error.reason
    return None


def raw(issuer: LocalIssuer, **members: str) -> str:
    """A token whose claims are spelled out as JSON text; a value of "" leaves the claim out."""
    texts = {
        "iss": json.dumps(issuer.url),
        "aud": json.dumps(issuer.audience),
        "sub": '"user1"',
        "iat": str(NOW),
        "exp": str(NOW + 900),
    } | members
    body = ", ".join(f'"{name}": {text}' for name, text in texts.items() if text)
    return issuer.sign({"alg": issuer.key.alg, "kid": issuer.key.kid}, f"{{{body}}}".encode("utf-8", "surrogatepass"))


NOT_A_TIME = ['"1800000900"', "true", "false", "null", "[]", "{}", "-9007199254740993", "1e20", "9" * 400]
NOT_JSON = ["NaN", "Infinity", "1e400", "-1e400", "9" * 5000]
TIMES: list[tuple[dict[str, str], Reason | None]] = [
    *[({name: '"\\u0000"'}, Reason.BAD_TIMES) for name in ("exp", "iat", "nbf")],
    *[({name: text}, Reason.BAD_TIMES) for name in ("exp", "iat", "nbf") for text in NOT_A_TIME],
    *[({name: text}, Reason.MALFORMED) for name in ("exp", "iat", "nbf") for text in NOT_JSON],
    *[({"exp": text}, Reason.MALFORMED) for text in ("-Infinity", "0x10", "01", "+1", "1.", ".5", "'1'")],
    ({"exp": ""}, Reason.BAD_TIMES),
    ({"iat": ""}, Reason.BAD_TIMES),
    ({"exp": "-1"}, Reason.EXPIRED),
    ({"exp": "0"}, Reason.EXPIRED),
    ({"exp": f"{NOW - 5}", "iat": f"{NOW - 60}"}, Reason.EXPIRED),
    ({"exp": f"{NOW - 4.5}", "iat": f"{NOW - 60}"}, None),
    ({"exp": f"{NOW + 0.5}"}, None),
    ({"exp": f"{NOW + 9}e0"}, None),
    ({"iat": f"{NOW + 5}"}, None),
    ({"iat": f"{NOW + 5.5}"}, Reason.NOT_YET_VALID),
    ({"iat": "-1"}, Reason.LIVES_TOO_LONG),
    ({"iat": f"{NOW + 4}", "exp": f"{NOW + 3}"}, Reason.BAD_TIMES),
    ({"iat": f"{NOW}", "exp": f"{NOW}"}, None),
    ({"nbf": f"{NOW + 5}"}, None),
    ({"nbf": f"{NOW + 5.5}"}, Reason.NOT_YET_VALID),
    ({"nbf": "0"}, None),
    ({"exp": f"{NOW + 3600}"}, None),
    ({"exp": f"{NOW + 3601}"}, Reason.LIVES_TOO_LONG),
    ({"exp": "1e15"}, Reason.LIVES_TOO_LONG),
]
NAMES: list[tuple[dict[str, str], Reason | None]] = [
    *[
        ({"iss": text}, Reason.BAD_ISSUER)
        for text in (
            "",
            "null",
            "1",
            '["http://localhost:3000"]',
            '{"http://localhost:3000": 1}',
            '"HTTP://localhost:3000"',
            '"http://localhost:3000/"',
            '"http://localhost:300"',
            '"http://localhost:3000/api"',
            '"http://localhost:3000.evil.example"',
            '" http://localhost:3000"',
            '""',
        )
    ],
    ({"iss": '"http://localhost:3000/api/auth"'}, None),
    ({"iss": '"http:\\/\\/localhost:3000"'}, None),
    *[
        ({"aud": text}, Reason.BAD_AUDIENCE)
        for text in (
            "",
            "null",
            "1",
            "[]",
            "{}",
            '""',
            '{"http://localhost:3000": 1}',
            '"HTTP://LOCALHOST:3000"',
            '"http://localhost:3000/"',
            '"http://localhost"',
            '"http://localhost:3000,x"',
            '["x", "y"]',
            '[["http://localhost:3000"]]',
            '["http://localhost:3000", 1]',
            '["http://localhost:3000", null]',
        )
    ],
    ({"aud": '["x", "http://localhost:3000"]'}, None),
    ({"aud": '["http://localhost:3000", "\\u0000"]'}, None),
    ({"aud": '["http://localhost:3000", "http://localhost:3000"]'}, None),
    *[
        ({"sub": text}, Reason.BAD_SUBJECT)
        for text in (
            "",
            "null",
            "1",
            "true",
            '["user1"]',
            "{}",
            '""',
            '" "',
            '"\\t\\n"',
            '"\\u00a0"',
            '"a\\u0000b"',
            '"\\ud800"',
            '"\\udc00\\ud800"',
            f'"{"a" * 256}"',
            f'"{"a" * 2000}"',
        )
    ],
    ({"sub": f'"{"a" * 255}"'}, None),
    ({"sub": '"\\ud83e\\udd8a"'}, None),
    ({"sub": '"a\\"b"'}, None),
    ({"sub": '"a", "sub": "b"'}, Reason.MALFORMED),
    ({"sub": '"a", "sub": "a"'}, Reason.MALFORMED),
    ({"sub": '"a", "\\u0073ub": "b"'}, Reason.MALFORMED),
    ({"exp": f'{NOW + 900}, "exp": {NOW + 1800}'}, Reason.MALFORMED),
    ({"x": '{"a": {"b": 1, "b": 2}}'}, Reason.MALFORMED),
    ({"x": '"\ud800"'}, Reason.MALFORMED),
    ({"x": '"\0"'}, Reason.MALFORMED),
    ({"x": "NaN"}, Reason.MALFORMED),
    ({"x": "1e999"}, Reason.MALFORMED),
    ({"x": "[" * 31 + "]" * 31}, None),
    ({"x": "[" * 32 + "]" * 32}, Reason.MALFORMED),
    ({"x": '{"a":' * 31 + "1" + "}" * 31}, None),
    ({"x": '"' + "[{" * 100 + '"'}, None),
    ({"x": "[" + "[],{}," * 100 + "1]"}, None),
    ({"x": "[" * 10_000 + "]" * 10_000}, Reason.MALFORMED),
    ({"cnf": '{"jkt": "x"}'}, Reason.SENDER_CONSTRAINED),
    ({"cnf": "null"}, Reason.SENDER_CONSTRAINED),
    ({"cnf": '"\\u0000"'}, Reason.SENDER_CONSTRAINED),
]


def shown(members: dict[str, str]) -> str:
    return (
        ", ".join(f"{name}={text if len(text) < 40 else text[:40] + '...'}" for name, text in members.items())
        .encode("unicode-escape")
        .decode()
    )


@pytest.mark.parametrize(("members", "reason"), TIMES + NAMES, ids=[shown(row[0]) for row in TIMES + NAMES])
async def test_claims_are_accepted_or_refused_with_their_reason(
    issuer: LocalIssuer, members: dict[str, str], reason: Reason | None
) -> None:
    assert await refusal(issuer.verifier(), raw(issuer, **members)) is reason


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b"null", b'"sub"', b"{", b"{} {}", b"\xef\xbb\xbf{}", b"\xff", b'{"sub": "\xff"}']
)
async def test_a_payload_that_is_not_a_json_object_is_refused(issuer: LocalIssuer, payload: bytes) -> None:
    token = issuer.sign({"alg": "EdDSA", "kid": issuer.key.kid}, payload)
    assert await refusal(issuer.verifier(), token) is Reason.MALFORMED


async def test_claims_with_unstorable_text_are_left_out(issuer: LocalIssuer) -> None:
    token = raw(
        issuer, name='"a\\u0000"', email='"\\ud800@x"', role='"admin\\u0000"', image='"ok \\u00e9"', x='["\\udfff"]'
    )
    principal = await issuer.verifier().verify(token)
    assert principal.profile == {"image": "ok é"}
    assert principal.roles == ()
    assert set(principal.claims) == {"iss", "aud", "sub", "iat", "exp", "image", "role"}


class TestAccessTokens:
    async def test_an_access_token_of_the_oauth_provider_is_accepted(self, issuer: LocalIssuer) -> None:
        principal = await issuer.verifier().verify(issuer.access_token(scope="tasks:read profile"))
        assert principal.scopes == frozenset({"tasks:read", "profile"})
        assert principal.issuer == "http://localhost:3000/api/auth"
        assert (principal.client_id, principal.session_id) == ("client1", "session1")
        assert principal.profile == {}
        assert not principal.is_machine

    async def test_a_client_credentials_token_belongs_to_a_machine(self, issuer: LocalIssuer) -> None:
        token = issuer.access_token("client1", omit=["sid"], scope="tasks:read")
        assert (await issuer.verifier().verify(token)).is_machine

    @pytest.mark.parametrize("name", ["client_id", "jti"])
    @pytest.mark.parametrize("value", [None, "", " ", 5, "a\0", ["x"]])
    async def test_an_access_token_needs_the_claims_of_rfc_9068(
        self, issuer: LocalIssuer, name: str, value: Any
    ) -> None:
        for token in (issuer.access_token(**{name: value}), issuer.access_token(omit=[name])):
            assert await refusal(issuer.verifier(), token) is Reason.INCOMPLETE

    async def test_an_access_token_bound_to_a_key_is_refused(self, issuer: LocalIssuer) -> None:
        token = issuer.access_token(cnf={"jkt": "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"})
        assert await refusal(issuer.verifier(), token) is Reason.SENDER_CONSTRAINED

    async def test_an_access_token_for_another_resource_is_refused(self, issuer: LocalIssuer) -> None:
        token = issuer.access_token(aud=["https://other.example", "http://localhost:3000/api/auth/oauth2/userinfo"])
        assert await refusal(issuer.verifier(), token) is Reason.BAD_AUDIENCE


@pytest.mark.parametrize("alg", ALGORITHMS)
async def test_a_token_of_each_algorithm_is_accepted(alg: str) -> None:
    issuer = LocalIssuer(alg=alg)
    principal = await issuer.verifier().verify(issuer.token("ada", image="x" * 20_000))
    assert (principal.subject, principal.email) == ("ada", "ada@example.com")


@pytest.mark.parametrize("name", ["issuers", "audiences"])
@pytest.mark.parametrize("value", ["http://localhost:3000", [], [""], ["a", ""], ()])
def test_issuers_and_audiences_must_be_lists_of_names(issuer: LocalIssuer, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        issuer.verifier(**{name: value})


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ({}, "http://localhost:3000/api/auth/token"),
        ({"issuers": ["https://a.example/"]}, "https://a.example/token"),
        ({"token_url": "https://a.example/session-to-jwt"}, "https://a.example/session-to-jwt"),
    ],
)
async def test_the_error_for_a_session_token_names_the_token_url(
    issuer: LocalIssuer, options: dict[str, Any], url: str
) -> None:
    session = "abcDEF0123456789abcDEF0123456789." + "A" * 43 + "="
    with pytest.raises(InvalidToken, match=f"This is a session token: exchange it at {url}.") as error:
        await issuer.verifier(**options).verify(session)
    assert error.value.reason is Reason.OPAQUE_SESSION


async def test_a_token_that_is_too_long_is_not_hashed(issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = issuer.verifier()
    monkeypatch.setattr(verifier_module, "sha256", None)
    assert await refusal(verifier, "a" * (32 * 1024 + 1)) is Reason.TOO_LONG


async def test_seconds_left_include_the_leeway(issuer: LocalIssuer, time: Time) -> None:
    verifier = issuer.verifier(leeway=5)
    principal = await verifier.verify(issuer.token(expires_in=100))
    await time.advance(40)
    assert verifier.seconds_left(principal) == 65


async def test_max_lifetime_and_leeway_are_settings(issuer: LocalIssuer) -> None:
    verifier = issuer.verifier(max_lifetime=60, leeway=0)
    assert await refusal(verifier, issuer.token(expires_in=60)) is None
    assert await refusal(verifier, issuer.token(expires_in=61)) is Reason.LIVES_TOO_LONG
    assert await refusal(verifier, issuer.token(iat=NOW - 10, exp=NOW)) is Reason.EXPIRED
    assert await refusal(verifier, issuer.token(iat=NOW + 1)) is Reason.NOT_YET_VALID


class Outcomes(Observer):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def judged(self, outcome: str) -> None:
        self.seen.append(outcome)


async def test_a_token_that_expires_while_waiting_for_its_key_is_refused(endpoint: Endpoint, time: Time) -> None:
    async with remote_keys(endpoint, time) as keys:
        verifier = endpoint.issuer.verifier(keys, monotonic=time.monotonic)
        endpoint.issuer.rotate()
        endpoint.open.clear()
        verification = asyncio.create_task(verifier.verify(endpoint.issuer.token(expires_in=1)))
        await settle()
        time.wall += 7
        endpoint.open.set()
        with pytest.raises(InvalidToken) as refusal:
            await verification
        assert refusal.value.reason is Reason.EXPIRED


def test_the_repr_of_a_parsed_jws_contains_no_part_of_it(issuer: LocalIssuer) -> None:
    token = issuer.token()
    shown = repr(parse_jws(token))
    assert not any(part in shown for part in token.split("."))
    assert "user1" not in shown


class TestCache:
    def verifier(
        self, issuer: LocalIssuer, time: Time, keys: RemoteKeys | None = None
    ) -> tuple[TokenVerifier, list[str]]:
        outcomes = Outcomes()
        return issuer.verifier(keys, monotonic=time.monotonic, observer=outcomes), outcomes.seen

    async def test_a_cached_token_returns_the_same_principal(self, issuer: LocalIssuer, time: Time) -> None:
        verifier, seen = self.verifier(issuer, time)
        token = issuer.token()
        assert await verifier.verify(token) is await verifier.verify(token)
        assert seen == ["verified", "hit"]

    async def test_only_cached_tokens_have_a_cached_principal(self, issuer: LocalIssuer, time: Time) -> None:
        verifier, seen = self.verifier(issuer, time)
        token = issuer.token(expires_in=100)
        assert not verifier.cached_principal(token)
        await verifier.verify(token)
        assert verifier.cached_principal(token)
        assert not verifier.cached_principal(token + "x")
        assert not verifier.cached_principal(token + "\u00e9")
        assert not verifier.cached_principal(token + "x" * MAX_TOKEN)
        await time.advance(105)
        assert not verifier.cached_principal(token)
        assert seen == ["verified"]

    async def test_failures_are_not_cached(self, issuer: LocalIssuer, time: Time) -> None:
        verifier, seen = self.verifier(issuer, time)
        token = issuer.token(exp=NOW - 10, iat=NOW - 60)
        for _ in range(2):
            with pytest.raises(InvalidToken):
                await verifier.verify(token)
        time.wall -= 20
        await verifier.verify(token)
        assert seen == ["expired", "expired", "verified"]

    async def test_a_cached_token_expires(self, issuer: LocalIssuer, time: Time) -> None:
        verifier, seen = self.verifier(issuer, time)
        token = issuer.token(expires_in=100)
        await verifier.verify(token)
        await time.advance(104.9)
        await verifier.verify(token)
        await time.advance(0.1)
        assert await refusal(verifier, token) is Reason.EXPIRED
        assert seen == ["verified", "hit", "expired"]

    async def test_a_cached_token_is_verified_again_after_five_minutes(self, issuer: LocalIssuer, time: Time) -> None:
        verifier, seen = self.verifier(issuer, time)
        token = issuer.token()
        await verifier.verify(token)
        await time.advance(299.9)
        await verifier.verify(token)
        await time.advance(0.1)
        await verifier.verify(token)
        assert seen == ["verified", "hit", "verified"]

    async def test_a_cached_token_expires_when_the_wall_clock_is_set_forward(
        self, issuer: LocalIssuer, time: Time
    ) -> None:
        verifier, _ = self.verifier(issuer, time)
        token = issuer.token()
        await verifier.verify(token)
        time.wall += 3600
        assert await refusal(verifier, token) is Reason.EXPIRED

    async def test_a_cached_token_is_not_yet_valid_when_the_wall_clock_is_set_back(
        self, issuer: LocalIssuer, time: Time
    ) -> None:
        verifier, _ = self.verifier(issuer, time)
        token = issuer.token(expires_in=100)
        await verifier.verify(token)
        time.wall -= 3600
        assert await refusal(verifier, token) is Reason.NOT_YET_VALID, "as for a token that is not cached"

    async def test_a_cached_token_also_expires_by_the_monotonic_clock(self, issuer: LocalIssuer, time: Time) -> None:
        """The wall clock is set back by 50 s, which prolongs the token by 50 s, but not its cache entry."""
        verifier, seen = self.verifier(issuer, time)
        token = issuer.token(iat=NOW - 100, exp=NOW + 100)
        await verifier.verify(token)
        time.wall -= 50
        await time.advance(106)
        await verifier.verify(token)
        assert seen == ["verified", "verified"]

    async def test_a_cached_token_is_refused_when_its_key_is_removed(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            verifier, seen = self.verifier(endpoint.issuer, time, keys)
            token = endpoint.issuer.token()
            await verifier.verify(token)
            endpoint.issuer.rotate()
            await time.advance(61)
            await verifier.verify(token)
            assert seen == ["verified", "hit"], "the new set still contains the key"
            endpoint.issuer.keys = endpoint.issuer.keys[1:]
            await time.advance(61)
            assert await refusal(verifier, token) is Reason.UNKNOWN_KEY

    async def test_a_cached_token_is_refused_when_its_kid_has_another_key(self, endpoint: Endpoint, time: Time) -> None:
        async with remote_keys(endpoint, time) as keys:
            verifier, _ = self.verifier(endpoint.issuer, time, keys)
            token = endpoint.issuer.token()
            await verifier.verify(token)
            endpoint.issuer.rotate(kid=endpoint.issuer.key.kid, keep=False)
            await time.advance(61)
            assert await refusal(verifier, token) is Reason.BAD_SIGNATURE

    async def test_the_cache_compares_every_byte(self, time: Time) -> None:
        issuer = LocalIssuer(clock=time.clock, alg="ES256")
        verifier, seen = self.verifier(issuer, time)
        first, second = issuer.token(), issuer.token()
        assert first.rpartition(".")[0] == second.rpartition(".")[0]
        await verifier.verify(first)
        await verifier.verify(second)
        assert await refusal(verifier, first[:-8] + "AAAAAAAA") is Reason.BAD_SIGNATURE
        assert seen == ["verified", "verified", "bad_signature"]

    async def test_the_size_of_the_cache_is_bounded(
        self, issuer: LocalIssuer, time: Time, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A token with a large payload or many containers counts as several entries."""
        assert verifier_module.CACHE_ENTRIES == 4096
        monkeypatch.setattr(verifier_module, "CACHE_ENTRIES", 256)
        verifier, _ = self.verifier(issuer, time)
        for n in range(260):
            await verifier.verify(issuer.token(f"u{n}"))
        assert len(verifier._cache) == 256
        for n in range(60):
            await verifier.verify(issuer.token(f"v{n}", image="x" * 20_000))
        assert len(verifier._cache) < 256 / 5
        for n in range(20):
            await verifier.verify(issuer.token(f"w{n}", x=[{}] * 850))
        assert len(verifier._cache) < 256 / 25

    async def test_the_least_recently_used_token_is_evicted(
        self, issuer: LocalIssuer, time: Time, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(verifier_module, "CACHE_ENTRIES", 2)
        verifier, seen = self.verifier(issuer, time)
        one, two, three = (issuer.token(f"u{n}") for n in range(3))
        for token in (one, two, one, three, one, two):
            await verifier.verify(token)
        assert seen == ["verified", "verified", "hit", "verified", "hit", "verified"]


async def test_errors_and_logs_contain_no_token_and_no_claim(
    endpoint: Endpoint, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secrets = ("s3cret", "ada@example.com")
    async with remote_keys(endpoint, time) as keys:
        verifier = endpoint.issuer.verifier(keys)
        stranger = SigningKey.generate("EdDSA", "stranger")
        wrong: list[dict[str, Any]] = [
            {},
            {"iss": "s3cret"},
            {"aud": "s3cret"},
            {"exp": "s3cret"},
            {"iat": 0},
            {"nbf": []},
        ]
        tokens = [endpoint.issuer.token("ada", secret="s3cret", **claims) for claims in wrong]
        tokens += [endpoint.issuer.token(key=stranger), tokens[0] + "A", tokens[0][:-9], "s3cret", "s3cret.x.y"]
        for token in tokens:
            with contextlib.suppress(InvalidToken):
                await verifier.verify(token)
                continue
            with pytest.raises(InvalidToken) as error:
                await verifier.verify(token)
            parts = [part for part in token.split(".") if len(part) > 8]
            assert not any(part in repr(error.value) for part in (*parts, *secrets))
        text = caplog.text
        assert not any(part in text for token in tokens for part in token.split(".") if len(part) > 8)
        assert not any(secret in text for secret in secrets)


@pytest.mark.usefixtures("short_wait")
async def test_unavailable_keys_are_reported_to_the_observer(endpoint: Endpoint, time: Time) -> None:
    endpoint.fails()
    async with remote_keys(endpoint, time) as keys:
        outcomes = Outcomes()
        verifier = endpoint.issuer.verifier(keys, observer=outcomes)
        with pytest.raises(KeysUnavailable):
            await verifier.verify(endpoint.issuer.token())
        assert outcomes.seen == ["keys_unavailable"]
        with pytest.raises(InvalidToken):
            await verifier.verify(None)  # type: ignore[arg-type]  # hostile on purpose
        assert outcomes.seen == ["keys_unavailable", "malformed"]


async def test_the_signature_of_a_security_event_is_verified(endpoint: Endpoint, time: Time) -> None:
    issuer = endpoint.issuer
    async with remote_keys(endpoint, time) as keys:
        jws = parse_jws(issuer.sign({"alg": "EdDSA", "typ": "secevent+jwt", "kid": issuer.key.kid}, b"{}"))
        assert (jws.typ, jws.payload) == ("secevent+jwt", b"{}")
        assert (await verify_signature(jws, keys)).kid == issuer.key.kid
        with pytest.raises(InvalidToken):
            await verify_signature(parse_jws(issuer.token(key=SigningKey.generate("EdDSA", issuer.key.kid))), keys)
