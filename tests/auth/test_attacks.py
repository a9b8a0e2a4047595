"""Known attacks on tokens are refused with the right reason by the verifier and by `verify_jws`."""

import json
import time as real_time
from typing import Any

import httpx
import pytest

from backend.auth import AuthError, InvalidToken, Reason, RemoteKeys, UnusableKeys, parse_jws, verify_jws
from backend.auth.encoding import encode_base64url
from backend.auth.testing import ALGORITHMS, LocalIssuer, SigningKey
from tests.auth.forged_tokens import EVERYWHERE, INJECTION, NOW, OWN_KEY, TYPE, Forge


@pytest.fixture(scope="session")
def forged_at(issuers: dict[str, LocalIssuer]) -> dict[str, LocalIssuer]:
    """The issuers, with a fixed clock."""
    for issuer in issuers.values():
        issuer.clock = lambda: NOW
    return issuers


@pytest.mark.parametrize(("forge", "reason"), [row[1:] for row in EVERYWHERE], ids=[row[0] for row in EVERYWHERE])
async def test_refused(forged_at: dict[str, LocalIssuer], forge: Forge, reason: Reason) -> None:
    issuer = forged_at["EdDSA"]
    token = forge(issuer)
    with pytest.raises(InvalidToken) as refusal:
        await issuer.verifier().verify(token)
    assert refusal.value.reason is reason
    with pytest.raises(InvalidToken) as refusal:
        verify_jws(token, issuer.jwks)
    assert refusal.value.reason is reason


@pytest.mark.parametrize(("forge", "reason"), [row[1:] for row in TYPE], ids=[row[0] for row in TYPE])
async def test_tokens_of_another_type(forged_at: dict[str, LocalIssuer], forge: Forge, reason: Reason) -> None:
    with pytest.raises(InvalidToken) as refusal:
        await forged_at["EdDSA"].verifier().verify(forge(forged_at["EdDSA"]))
    assert refusal.value.reason is reason


@pytest.mark.parametrize("typ", ["JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt", "Application/AT+JWT"])
async def test_types_that_are_accepted(forged_at: dict[str, LocalIssuer], typ: str) -> None:
    issuer = forged_at["EdDSA"]
    principal = await issuer.verifier().verify(issuer.access_token(header={"typ": typ}))
    assert (principal.scopes is None) == (typ.lower() == "jwt")


@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize("other", ALGORITHMS)
async def test_no_algorithm_stands_for_another(forged_at: dict[str, LocalIssuer], alg: str, other: str) -> None:
    """Every pair of algorithms, such as PS256 for RS256 or ES256 with a P-521 key."""
    issuer = forged_at[alg]
    tokens = [
        issuer.token(header={"alg": other}),
        issuer.token(key=SigningKey(issuer.key.kid, other, forged_at[other].key.private)),
    ]
    for token in tokens:
        if other == alg:
            assert (await issuer.verifier().verify(token)).subject == "user1"
            assert json.loads(verify_jws(token, issuer.jwks))["sub"] == "user1"
        else:
            with pytest.raises(InvalidToken):
                await issuer.verifier().verify(token)
            with pytest.raises(InvalidToken):
                verify_jws(token, issuer.jwks)


@pytest.mark.parametrize("alg", ALGORITHMS)
async def test_every_single_byte_counts(forged_at: dict[str, LocalIssuer], alg: str) -> None:
    issuer = forged_at[alg]
    verifier, token = issuer.verifier(), issuer.token()
    for place in range(0, len(token), 7):
        changed = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        with pytest.raises(InvalidToken):
            await verifier.verify(changed)
    for length in range(0, len(token), 7):
        with pytest.raises(InvalidToken):
            await verifier.verify(token[:length])


@pytest.mark.parametrize("in_key", ["EdDSA", "Ed25519", None])
@pytest.mark.parametrize("in_header", ["EdDSA", "Ed25519"])
async def test_both_names_of_ed25519(forged_at: dict[str, LocalIssuer], in_key: str | None, in_header: str) -> None:
    """RFC 9864: Ed25519 and EdDSA name the same algorithm, in the key, in the header, or one in each."""
    issuer = forged_at["EdDSA"]
    jwk = {**issuer.key.jwk, "alg": in_key}
    if in_key is None:
        del jwk["alg"]
    token = issuer.token(header={"alg": in_header})
    assert json.loads(verify_jws(token, {"keys": [jwk]}))["sub"] == "user1"


@pytest.mark.parametrize(
    "members",
    [
        {"jwk": OWN_KEY.jwk},
        {"jku": "https://evil.example/jwks"},
        {"x5u": "https://evil.example/cert"},
        {"x5c": ["MIIB"], "x5t": "AAAA"},
        {"unknown": {"nested": [1, 2, {"deep": None}]}, "nonce": "x"},
        {"a": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]},
    ],
)
async def test_ignored_header_members(forged_at: dict[str, LocalIssuer], members: dict[str, Any]) -> None:
    issuer = forged_at["EdDSA"]
    assert (await issuer.verifier().verify(issuer.token(header=members))).subject == "user1"


async def test_nothing_in_a_token_causes_a_connection(forged_at: dict[str, LocalIssuer]) -> None:
    """Tokens that can be refused without keys cause no fetch, and no token causes a request to another URL."""
    issuer = forged_at["EdDSA"]
    asked: list[httpx.URL] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        return httpx.Response(200, json=issuer.jwks)

    cheap = [row for row in EVERYWHERE + TYPE if row[2] not in {Reason.UNKNOWN_KEY, Reason.BAD_SIGNATURE}]
    unsuited: list[dict[str, Any]] = [
        {"iss": "x"},
        {"aud": "x"},
        {"exp": NOW - 60},
        {"sub": ""},
        {"cnf": {}},
        {"iat": NOW + 60},
        {"iat": NOW - 9000},
    ]
    unknown = SigningKey("unknown", "EdDSA", OWN_KEY.private)
    tokens = [row[1](issuer) for row in cheap]
    tokens += [issuer.token(key=key, **claims) for claims in unsuited for key in (None, unknown)]
    async with (
        httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client,
        RemoteKeys(issuer.jwks_url, client=client, monotonic=lambda: 0) as keys,
    ):
        await keys.get(issuer.key.kid)
        verifier = issuer.verifier(keys)
        for token in tokens:
            with pytest.raises(InvalidToken):
                await verifier.verify(token)
        assert len(asked) == 1
        for row in INJECTION[:4]:
            with pytest.raises(InvalidToken):
                await verifier.verify(row[1](issuer))
        assert set(asked) == {httpx.URL(issuer.jwks_url)}


@pytest.mark.parametrize(
    "token", [None, b"a.b.c", 1, 1.5, [], ["a"] * 40_000, {}, object(), True, b"a" * 40_000, ("a", "b", "c")]
)
async def test_a_token_that_is_not_a_string(forged_at: dict[str, LocalIssuer], token: Any) -> None:
    issuer = forged_at["EdDSA"]
    with pytest.raises(InvalidToken):
        await issuer.verifier().verify(token)
    with pytest.raises(InvalidToken):
        verify_jws(token, issuer.jwks)


@pytest.mark.parametrize("jwks", [None, [], "", 1, {}, {"keys": []}, {"keys": [{"kty": "oct", "k": "AA", "kid": "k"}]}])
def test_verify_jws_without_a_usable_key(forged_at: dict[str, LocalIssuer], jwks: Any) -> None:
    with pytest.raises(UnusableKeys) as refusal:
        verify_jws(forged_at["EdDSA"].token(), jwks)
    assert isinstance(refusal.value, AuthError)


@pytest.mark.parametrize("data", [b"", b"\0\xff", b"not JSON", b"{}"])
@pytest.mark.parametrize("typ", ["secevent+jwt", "anything"])
def test_verify_jws_accepts_any_payload_and_type(forged_at: dict[str, LocalIssuer], data: bytes, typ: str) -> None:
    issuer = forged_at["EdDSA"]
    token = issuer.sign({"alg": "EdDSA", "kid": issuer.key.kid, "typ": typ}, data)
    assert verify_jws(token, issuer.jwks) == data
    assert parse_jws(token).typ == typ


def test_verify_jws_refuses_a_typ_that_is_not_a_string(forged_at: dict[str, LocalIssuer]) -> None:
    with pytest.raises(InvalidToken):
        verify_jws(forged_at["EdDSA"].token(header={"typ": 1}), forged_at["EdDSA"].jwks)


@pytest.mark.parametrize(
    "token",
    [
        "a" * 1_048_576,
        "." * 32_000,
        "a." * 16_000,
        encode_base64url(b"[" * 6_000) + ".a.b",
        encode_base64url(b'{"a":' * 1_000) + ".a.b",
        encode_base64url(b'"' + b'\\"' * 3_000) + ".a.b",
        encode_base64url(b'{"alg":"EdDSA","kid":"k","a":[' + b"[],[],[]," * 600 + b"1]}") + ".a.b",
        encode_base64url(b'{"alg":"EdDSA","kid":"k"}') + "." + encode_base64url(b"[" * 24_000) + ".YQ",
        encode_base64url(b'{"alg":"EdDSA","kid":"k"}')
        + "."
        + encode_base64url(b'{"exp":' + b"9" * 24_000 + b"}")
        + ".YQ",
        encode_base64url(b'{"alg":"EdDSA","kid":"k"}')
        + "."
        + encode_base64url(b'{"a":"' + b"\\u0061" * 3_900 + b'"}')
        + ".YQ",
    ],
)
async def test_hostile_tokens_are_little_work(forged_at: dict[str, LocalIssuer], token: str) -> None:
    """About a millisecond each; the limit allows for slow and busy machines."""
    verifier = forged_at["EdDSA"].verifier()
    best = 1.0
    for _ in range(5):
        started = real_time.process_time()
        with pytest.raises(InvalidToken):
            await verifier.verify(token)
        best = min(best, real_time.process_time() - started)
    assert best < 0.05
