"""Known attacks on tokens, against the verifier and `verify_jws`."""

import json
import time as real_time
from typing import Any

import httpx
import pytest

from backend.auth import AuthError, InvalidToken, Reason, RemoteKeys, UnusableKeys, parse_jws, verify_jws
from backend.auth.encoding import encode_base64url
from backend.auth.testing import ALGORITHMS, LocalIssuer, SigningKey
from tests.auth.forged_tokens import ATTACKER_KEY, FORGED, INJECTION, NOW, TYPE, Forge


@pytest.fixture(scope="session")
def fixed_issuers(issuers: dict[str, LocalIssuer]) -> dict[str, LocalIssuer]:
    """The issuers with their clocks stopped at NOW."""
    for issuer in issuers.values():
        issuer.clock = lambda: NOW
    return issuers


@pytest.mark.parametrize(("forge", "reason"), [row[1:] for row in FORGED], ids=[row[0] for row in FORGED])
async def test_a_forged_token_is_refused_with_its_reason(
    fixed_issuers: dict[str, LocalIssuer], forge: Forge, reason: Reason
) -> None:
    issuer = fixed_issuers["EdDSA"]
    token = forge(issuer)
    with pytest.raises(InvalidToken) as refusal:
        await issuer.verifier().verify(token)
    assert refusal.value.reason is reason
    with pytest.raises(InvalidToken) as refusal:
        verify_jws(token, issuer.jwks)
    assert refusal.value.reason is reason


@pytest.mark.parametrize(("forge", "reason"), [row[1:] for row in TYPE], ids=[row[0] for row in TYPE])
async def test_a_token_of_another_type_is_refused(
    fixed_issuers: dict[str, LocalIssuer], forge: Forge, reason: Reason
) -> None:
    with pytest.raises(InvalidToken) as refusal:
        await fixed_issuers["EdDSA"].verifier().verify(forge(fixed_issuers["EdDSA"]))
    assert refusal.value.reason is reason


@pytest.mark.parametrize("typ", ["JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt", "Application/AT+JWT"])
async def test_jwt_and_at_jwt_are_accepted_in_any_case(fixed_issuers: dict[str, LocalIssuer], typ: str) -> None:
    issuer = fixed_issuers["EdDSA"]
    principal = await issuer.verifier().verify(issuer.access_token(header={"typ": typ}))
    assert (principal.scopes is None) == (typ.lower() == "jwt")


@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize("other", ALGORITHMS)
async def test_a_token_is_verified_only_with_its_keys_algorithm(
    fixed_issuers: dict[str, LocalIssuer], alg: str, other: str
) -> None:
    """For every pair of algorithms, such as PS256 for RS256, or ES256 with a P-521 key."""
    issuer = fixed_issuers[alg]
    tokens = [
        issuer.token(header={"alg": other}),
        issuer.token(key=SigningKey(issuer.key.kid, other, fixed_issuers[other].key.private)),
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
async def test_a_token_with_a_changed_or_missing_character_is_refused(
    fixed_issuers: dict[str, LocalIssuer], alg: str
) -> None:
    issuer = fixed_issuers[alg]
    verifier, token = issuer.verifier(), issuer.token()
    for position in range(0, len(token), 7):
        changed = token[:position] + ("A" if token[position] != "A" else "B") + token[position + 1 :]
        with pytest.raises(InvalidToken):
            await verifier.verify(changed)
    for length in range(0, len(token), 7):
        with pytest.raises(InvalidToken):
            await verifier.verify(token[:length])


@pytest.mark.parametrize("in_key", ["EdDSA", "Ed25519", None])
@pytest.mark.parametrize("in_header", ["EdDSA", "Ed25519"])
async def test_eddsa_and_ed25519_name_one_algorithm(
    fixed_issuers: dict[str, LocalIssuer], in_key: str | None, in_header: str
) -> None:
    """RFC 9864: Ed25519 and EdDSA name the same algorithm, in the key, in the header, or one in each."""
    issuer = fixed_issuers["EdDSA"]
    jwk = {**issuer.key.jwk, "alg": in_key}
    if in_key is None:
        del jwk["alg"]
    token = issuer.token(header={"alg": in_header})
    assert json.loads(verify_jws(token, {"keys": [jwk]}))["sub"] == "user1"


@pytest.mark.parametrize(
    "members",
    [
        {"jwk": ATTACKER_KEY.jwk},
        {"jku": "https://evil.example/jwks"},
        {"x5u": "https://evil.example/cert"},
        {"x5c": ["MIIB"], "x5t": "AAAA"},
        {"unknown": {"nested": [1, 2, {"deep": None}]}, "nonce": "x"},
        {"a": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]},
    ],
    ids=["jwk", "jku", "x5u", "x5c", "unknown members", "32 levels"],
)
async def test_a_token_with_ignored_header_members_is_accepted(
    fixed_issuers: dict[str, LocalIssuer], members: dict[str, Any]
) -> None:
    issuer = fixed_issuers["EdDSA"]
    assert (await issuer.verifier().verify(issuer.token(header=members))).subject == "user1"


async def test_a_token_causes_no_request_to_a_url_of_its_own(fixed_issuers: dict[str, LocalIssuer]) -> None:
    """A token that can be refused without its key causes no fetch; other tokens cause only that of the key set."""
    issuer = fixed_issuers["EdDSA"]
    requested: list[httpx.URL] = []

    def respond(request: httpx.Request) -> httpx.Response:
        requested.append(request.url)
        return httpx.Response(200, json=issuer.jwks)

    needs_no_key = [row for row in FORGED + TYPE if row[2] not in {Reason.UNKNOWN_KEY, Reason.BAD_SIGNATURE}]
    bad_claims: list[dict[str, Any]] = [
        {"iss": "x"},
        {"aud": "x"},
        {"exp": NOW - 60},
        {"sub": ""},
        {"cnf": {}},
        {"iat": NOW + 60},
        {"iat": NOW - 9000},
    ]
    unknown = SigningKey("unknown", "EdDSA", ATTACKER_KEY.private)
    tokens = [row[1](issuer) for row in needs_no_key]
    tokens += [issuer.token(key=key, **claims) for claims in bad_claims for key in (None, unknown)]
    async with (
        httpx.AsyncClient(transport=httpx.MockTransport(respond)) as client,
        RemoteKeys(issuer.jwks_url, client=client, monotonic=lambda: 0) as keys,
    ):
        await keys.get(issuer.key.kid)
        verifier = issuer.verifier(keys)
        for token in tokens:
            with pytest.raises(InvalidToken):
                await verifier.verify(token)
        assert len(requested) == 1, "only the first fetch"
        for row in INJECTION[:4]:
            with pytest.raises(InvalidToken):
                await verifier.verify(row[1](issuer))
        assert set(requested) == {httpx.URL(issuer.jwks_url)}


@pytest.mark.parametrize("token", [None, b"a.b.c", 1, [], ["a"] * 40_000, {}, b"a" * 40_000, ("a", "b", "c")])
async def test_a_token_that_is_not_a_string_is_refused(fixed_issuers: dict[str, LocalIssuer], token: Any) -> None:
    issuer = fixed_issuers["EdDSA"]
    with pytest.raises(InvalidToken):
        await issuer.verifier().verify(token)
    with pytest.raises(InvalidToken):
        verify_jws(token, issuer.jwks)


@pytest.mark.parametrize("jwks", [None, [], "", 1, {}, {"keys": []}, {"keys": [{"kty": "oct", "k": "AA", "kid": "k"}]}])
def test_verify_jws_raises_without_a_usable_key(fixed_issuers: dict[str, LocalIssuer], jwks: Any) -> None:
    with pytest.raises(UnusableKeys) as refusal:
        verify_jws(fixed_issuers["EdDSA"].token(), jwks)
    assert isinstance(refusal.value, AuthError)


@pytest.mark.parametrize("data", [b"", b"\0\xff", b"not JSON", b"{}"])
@pytest.mark.parametrize("typ", ["secevent+jwt", "anything"])
def test_verify_jws_accepts_any_payload_and_type(fixed_issuers: dict[str, LocalIssuer], data: bytes, typ: str) -> None:
    issuer = fixed_issuers["EdDSA"]
    token = issuer.sign({"alg": "EdDSA", "kid": issuer.key.kid, "typ": typ}, data)
    assert verify_jws(token, issuer.jwks) == data
    assert parse_jws(token).typ == typ


def test_verify_jws_refuses_a_typ_that_is_not_a_string(fixed_issuers: dict[str, LocalIssuer]) -> None:
    with pytest.raises(InvalidToken):
        verify_jws(fixed_issuers["EdDSA"].token(header={"typ": 1}), fixed_issuers["EdDSA"].jwks)


def with_payload(payload: bytes) -> str:
    header = b'{"alg":"EdDSA","kid":"k"}'
    return f"{encode_base64url(header)}.{encode_base64url(payload)}.YQ"


@pytest.mark.parametrize(
    "token",
    [
        pytest.param("a" * 1_048_576, id="1 MiB"),
        pytest.param("." * 32_000, id="dots"),
        pytest.param("a." * 16_000, id="short segments"),
        pytest.param(encode_base64url(b"[" * 6_000) + ".a.b", id="header of lists"),
        pytest.param(encode_base64url(b'{"a":' * 1_000) + ".a.b", id="header of objects"),
        pytest.param(encode_base64url(b'"' + b'\\"' * 3_000) + ".a.b", id="header of escapes"),
        pytest.param(
            encode_base64url(b'{"alg":"EdDSA","kid":"k","a":[' + b"[],[],[]," * 600 + b"1]}") + ".a.b",
            id="header of empty lists",
        ),
        pytest.param(with_payload(b"[" * 24_000), id="payload of lists"),
        pytest.param(with_payload(b'{"exp":' + b"9" * 24_000 + b"}"), id="long number"),
        pytest.param(with_payload(b'{"a":"' + b"\\u0061" * 3_900 + b'"}'), id="payload of escapes"),
    ],
)
async def test_a_token_made_to_be_slow_is_refused_quickly(fixed_issuers: dict[str, LocalIssuer], token: str) -> None:
    """Each takes about a millisecond; the limit allows for slow and busy machines."""
    verifier = fixed_issuers["EdDSA"].verifier()
    best = 1.0
    for _ in range(5):
        started = real_time.process_time()
        with pytest.raises(InvalidToken):
            await verifier.verify(token)
        best = min(best, real_time.process_time() - started)
    assert best < 0.05
