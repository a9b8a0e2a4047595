"""Property-based tests: every token and key that this package accepts is accepted by PyJWT and joserfc.

Forgeries often use parsers that read the same bytes differently. Exceptions other than the package's own fail a test.
"""

import asyncio
import copy
import json
import time
import warnings
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from joserfc import errors as joserfc_errors
from joserfc import jwk as joserfc_jwk
from joserfc import jws as joserfc_jws

from backend.auth import AuthError, InvalidToken, KeySet, TokenVerifier, UnusableKeys, parse_jws, verify_jws
from backend.auth.encoding import decode_base64url, decode_object, encode_base64url
from backend.auth.jwk import read_key
from backend.auth.testing import ALGORITHMS, LocalIssuer

examples = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

ISSUERS = {alg: LocalIssuer(alg=alg) for alg in ("EdDSA", "ES256")}
REGISTRY = joserfc_jws.JWSRegistry(strict_check_header=False, algorithms=[*ALGORITHMS, "Ed25519"])

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["", "sig", "enc", "verify", "EdDSA", "ES256", "RS256", "none", "JWT", "at+jwt", "a\0", "\ud800"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def pyjwt_accepts(token: str, issuer: LocalIssuer) -> bytes | None:
    try:
        key = jwt.PyJWK(issuer.key.jwk)
        decoded = jwt.PyJWS().decode_complete(token, key.key, algorithms=[issuer.key.alg])
    except jwt.PyJWTError:
        return None
    payload: bytes = decoded["payload"]
    return payload


def joserfc_accepts(token: str, issuer: LocalIssuer) -> bytes | None:
    key = joserfc_jwk.import_key(issuer.key.jwk)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joserfc deprecates the name EdDSA, which Better Auth uses
            return joserfc_jws.deserialize_compact(token, key, registry=REGISTRY).payload
    except (joserfc_errors.JoseError, ValueError, TypeError, KeyError, AttributeError):
        return None


def this_package_accepts(token: str, issuer: LocalIssuer) -> bytes | None:
    try:
        return verify_jws(token, issuer.jwks)
    except InvalidToken:
        return None


@st.composite
def changed_tokens(draw: st.DrawFn) -> tuple[LocalIssuer, str]:
    """A valid token with characters replaced, removed, inserted or moved."""
    issuer = ISSUERS[draw(st.sampled_from(sorted(ISSUERS)))]
    token = issuer.token(draw(st.sampled_from(["user1", "ü", "a" * 100])))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(token)))
        length = draw(st.integers(0, 3))
        new = draw(st.text("AZaz09-_.=+/ \n\0é%", max_size=3))
        token = token[:place] + new + token[place + length :]
    segments = token.split(".")
    if draw(st.booleans()):
        segments = draw(st.lists(st.sampled_from(segments), min_size=1, max_size=5))
    return issuer, ".".join(segments)


@examples
@given(changed_tokens())
def test_a_changed_token_is_accepted_only_if_both_libraries_accept_it(case: tuple[LocalIssuer, str]) -> None:
    issuer, token = case
    payload = this_package_accepts(token, issuer)
    event("accepted" if payload is not None else "refused")
    if payload is not None:
        assert payload == pyjwt_accepts(token, issuer) == joserfc_accepts(token, issuer)


# Members that both libraries ignore if well formed; this package always ignores them.
IGNORED = {"jku": "https://evil.example/", "x5u": "https://evil.example/", "x5c": ["AA"], "x5t": "AA"}
headers = st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "nonce", "other"]), json_values, max_size=2)
refused = st.dictionaries(st.sampled_from(["cty", "b64", "zip", "crit"]), json_values, max_size=1)


@examples
@given(
    st.sampled_from(sorted(ISSUERS)),
    headers,
    refused,
    st.sets(st.sampled_from(sorted(IGNORED))),
    st.binary(max_size=30),
)
def test_a_header_is_accepted_only_if_both_libraries_accept_it(
    alg: str, members: dict[str, Any], more: dict[str, Any], ignored: set[str], payload: bytes
) -> None:
    issuer = ISSUERS[alg]
    header = {"alg": alg, "kid": issuer.key.kid, **{name: IGNORED[name] for name in ignored}, **members, **more}
    token = issuer.sign(header, payload)
    accepted = this_package_accepts(token, issuer)
    event("accepted" if accepted is not None else "refused")
    if accepted is not None:
        assert accepted == payload == joserfc_accepts(token, issuer)
        if header["alg"] != "Ed25519":  # PyJWT does not know this name
            assert pyjwt_accepts(token, issuer) == payload
    elif not more and not {"alg", "kid", "typ", "crit"} & set(members):
        assert not is_strict_json(header), "a valid header is refused"


def is_strict_json(value: dict[str, Any]) -> bool:
    try:
        decode_object(json.dumps(value).encode())
    except ValueError:
        return False
    return True


def verifier(issuer: LocalIssuer) -> TokenVerifier:
    return issuer.verifier(leeway=0)


CLAIMS = ("iss", "aud", "exp", "iat", "nbf", "jti", "cnf", "client_id", "scope", "name", "email", "role", "banned")
AUDIENCE = "http://localhost:3000"
near_now = st.integers(-4000, 4000).map(lambda seconds: int(time.time()) + seconds)
claim_values = json_values | near_now | near_now.map(float) | st.sampled_from([AUDIENCE, [AUDIENCE], [AUDIENCE, 1]])


@examples
@given(
    st.dictionaries(st.sampled_from(CLAIMS), claim_values, max_size=3),
    st.just("user1") | json_values,
    st.sets(st.sampled_from(CLAIMS), max_size=1),
)
def test_claims_are_accepted_only_if_pyjwt_accepts_them(
    claims: dict[str, Any], subject: Any, omitted: set[str]
) -> None:
    issuer = ISSUERS["EdDSA"]
    token = issuer.token(subject, omit=omitted, **claims)
    try:
        principal = asyncio.run(verifier(issuer).verify(token))
    except InvalidToken as error:
        event(error.reason.name)
        return
    event("accepted")
    decoded = jwt.decode(
        token,
        jwt.PyJWK(issuer.key.jwk).key,
        algorithms=["EdDSA"],
        issuer=list(issuer.issuers),
        audience=issuer.audience,
        leeway=1,
        options={"require": ["exp", "iat", "sub", "iss", "aud"], "verify_jti": False},
    )
    assert principal.subject == decoded["sub"]
    assert principal.expires_at == decoded["exp"]
    assert set(principal.claims) <= set(decoded)


@examples
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("latin-1")))
def test_arbitrary_text_is_no_valid_token(text: str) -> None:
    with pytest.raises(AuthError):
        verify_jws(text, ISSUERS["EdDSA"].jwks)
    with pytest.raises(InvalidToken):
        asyncio.run(verifier(ISSUERS["EdDSA"]).verify(text))


@examples
@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=80))
def test_arbitrary_segments_are_no_valid_token(header: bytes, payload: bytes, signature: bytes) -> None:
    token = ".".join(map(encode_base64url, (header, payload, signature)))
    with pytest.raises(InvalidToken):
        verify_jws(token, ISSUERS["EdDSA"].jwks)


JWKS = {alg: LocalIssuer(alg=alg).key.jwk for alg in ALGORITHMS}
NAMES = ["EdDSA", "Ed25519", "ES256", "ES512", "PS256", "RS256", "P-256", "P-521", "OKP", "EC", "RSA"]
numbers = st.sampled_from([jwk[name] for jwk in JWKS.values() for name in ("x", "y", "n", "e") if name in jwk])
member_values = json_values | st.sampled_from(NAMES) | numbers


@st.composite
def changed_keys(draw: st.DrawFn) -> dict[str, Any]:
    """A valid JWK with members changed, added or removed."""
    jwk = copy.deepcopy(JWKS[draw(st.sampled_from(ALGORITHMS))])
    names = st.sampled_from(["kty", "crv", "x", "y", "n", "e", "d", "k", "alg", "use", "key_ops", "kid", "x5c"])
    for name in draw(st.lists(names, max_size=2)):
        jwk.pop(name, None)
    return jwk | draw(st.dictionaries(names, member_values, max_size=2))


@examples
@given(changed_keys())
def test_a_changed_key_is_read_as_both_libraries_read_it(jwk: dict[str, Any]) -> None:
    try:
        key = read_key(jwk)
    except UnusableKeys as error:
        event(str(error))
        return
    event("accepted")
    members = ("kty", "crv", "x", "y", "n", "e")
    material: dict[str, Any] = {name: jwk[name] for name in members if name in jwk}
    imported = joserfc_jwk.import_key(material)
    assert imported.thumbprint() == key.thumbprint
    assert not imported.is_private
    loaded = jwt.PyJWK(material, algorithm=key.algorithm).key
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    assert loaded.public_bytes(*form) == key.public.public_bytes(*form)


@examples
@given(json_values | st.fixed_dictionaries({"keys": json_values | st.lists(changed_keys() | json_values, max_size=4)}))
def test_an_arbitrary_document_is_a_key_set_or_rejected(document: Any) -> None:
    try:
        found = KeySet.from_jwks(document)
    except UnusableKeys:
        return
    assert found.keys
    assert all(kid == key.kid for kid, key in found.keys.items())
    assert len(found.keys) + len(found.skipped) <= len(document["keys"])


@examples
@given(json_values)
def test_json_is_decoded_as_by_python_or_rejected(value: Any) -> None:
    data = json.dumps({"v": value}).encode()
    try:
        read = decode_object(data)
    except ValueError:
        assert any(text in data for text in (b"NaN", b"Infinity"))
        return
    assert read == json.loads(data)


@examples
@given(st.binary(max_size=40))
def test_base64url_round_trip(data: bytes) -> None:
    assert decode_base64url(encode_base64url(data)) == data


@examples
@given(st.text("AQgw_-=+/ \n.é", max_size=9))
def test_only_canonical_base64url_is_decoded(text: str) -> None:
    try:
        data = decode_base64url(text)
    except ValueError:
        return
    assert encode_base64url(data) == text


@examples
@given(st.binary(max_size=200))
def test_arbitrary_signatures_are_not_valid(signature: bytes) -> None:
    for issuer in ISSUERS.values():
        jws = parse_jws(issuer.token().rpartition(".")[0] + "." + encode_base64url(signature))
        assert not jws.is_signed_by(read_key(issuer.key.jwk))
