"""Each known attack on a token gets its answer, from the verifier and from `verify_jws` alike."""

import hashlib
import hmac
import json
import time as real_time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from backend.auth import AuthError, InvalidToken, Reason, RemoteKeys, UnusableKeys, parse_jws, verify_jws
from backend.auth.encoding import encode_base64url
from backend.auth.testing import ALGORITHMS, LocalIssuer, SigningKey

NOW = 1_800_000_000
Forge = Callable[[LocalIssuer], str]


@pytest.fixture(scope="session")
def forged_at(issuers: dict[str, LocalIssuer]) -> dict[str, LocalIssuer]:
    """The issuers, whose clock stands still."""
    for issuer in issuers.values():
        issuer.clock = lambda: NOW
    return issuers


def payload(issuer: LocalIssuer, **claims: Any) -> dict[str, Any]:
    return {
        "iss": issuer.url,
        "aud": issuer.audience,
        "sub": "user1",
        "iat": NOW,
        "exp": NOW + 900,
    } | claims


def header(**members: Any) -> Forge:
    """A token that is good but for these members of its header."""
    return lambda issuer: issuer.token(header=members)


def raw_header(text: str) -> Forge:
    """A token with this header, whatever it is; `$kid` stands for the key's."""
    return lambda issuer: issuer.sign(text.replace("$kid", issuer.key.kid).encode(), payload(issuer))


def raw_payload(data: bytes) -> Forge:
    return lambda issuer: issuer.sign({"alg": issuer.key.alg, "kid": issuer.key.kid}, data)


def edited(change: Callable[[str, str, str], str]) -> Forge:
    """A good token, its three segments changed after signing."""
    return lambda issuer: change(*issuer.token().split("."))


def hmac_with(key: Callable[[LocalIssuer], bytes]) -> Forge:
    """HS256, keyed with something public."""

    def forge(issuer: LocalIssuer) -> str:
        head = encode_base64url(json.dumps({"alg": "HS256", "kid": issuer.key.kid}).encode())
        body = encode_base64url(json.dumps(payload(issuer)).encode())
        mac = hmac.new(key(issuer), f"{head}.{body}".encode(), hashlib.sha256).digest()
        return f"{head}.{body}.{encode_base64url(mac)}"

    return forge


def signed_by(alg: str, **members: Any) -> Forge:
    """Signed by a key of the attacker's that bears the issuer's kid."""
    return lambda issuer: issuer.token(key=SigningKey.generate(alg, issuer.key.kid), header=members)


def _public(issuer: LocalIssuer, encoding: Encoding, form: PublicFormat) -> bytes:
    data: bytes = issuer.key.private.public_key().public_bytes(encoding, form)
    return data


ALG: list[tuple[str, Forge, Reason]] = [
    *[(f"alg {alg!r}", header(alg=alg), Reason.BAD_ALGORITHM) for alg in ("none", "None", "NONE", "nOnE", "", " none")],
    ("alg none, no signature", edited(lambda _, body, __: f"{_none()}.{body}."), Reason.BAD_ALGORITHM),
    ("HS256 by the raw key", hmac_with(lambda i: _public(i, Encoding.Raw, PublicFormat.Raw)), Reason.BAD_ALGORITHM),
    (
        "HS256 by the PEM",
        hmac_with(lambda i: _public(i, Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)),
        Reason.BAD_ALGORITHM,
    ),
    ("HS256 by the JWK", hmac_with(lambda i: json.dumps(i.key.jwk).encode()), Reason.BAD_ALGORITHM),
    ("HS256 by nothing", hmac_with(lambda _: b""), Reason.BAD_ALGORITHM),
    ("alg null", header(alg=None), Reason.BAD_ALGORITHM),
    ("alg a list", header(alg=["EdDSA"]), Reason.BAD_ALGORITHM),
    ("alg an object", header(alg={"EdDSA": 1}), Reason.BAD_ALGORITHM),
    ("alg a number", header(alg=1), Reason.BAD_ALGORITHM),
    ("alg true", header(alg=True), Reason.BAD_ALGORITHM),
    ("alg missing", raw_header('{"kid": "$kid"}'), Reason.BAD_ALGORITHM),
    ("alg in lower case", header(alg="eddsa"), Reason.BAD_ALGORITHM),
    ("alg Ed448", header(alg="Ed448"), Reason.BAD_ALGORITHM),
    ("alg ES256K", header(alg="ES256K"), Reason.BAD_ALGORITHM),
    ("alg ES384", header(alg="ES384"), Reason.BAD_ALGORITHM),
    ("alg RS512", header(alg="RS512"), Reason.BAD_ALGORITHM),
    ("alg RSA1_5", header(alg="RSA1_5"), Reason.BAD_ALGORITHM),
    ("alg twice", raw_header('{"alg": "none", "alg": "EdDSA", "kid": "$kid"}'), Reason.MALFORMED),
    *[(f"alg {alg}, the key's is EdDSA", header(alg=alg), Reason.BAD_SIGNATURE) for alg in ALGORITHMS[1:]],
    ("a key of another type under the kid", signed_by("ES256"), Reason.BAD_SIGNATURE),
    ("a key of the same type under the kid", signed_by("EdDSA"), Reason.BAD_SIGNATURE),
]

OWN_KEY = SigningKey.generate("EdDSA", "own")
INJECTION: list[tuple[str, Forge, Reason]] = [
    ("jwk", signed_by("EdDSA", jwk=OWN_KEY.jwk), Reason.BAD_SIGNATURE),
    ("jku", signed_by("EdDSA", jku="https://evil.example/jwks"), Reason.BAD_SIGNATURE),
    ("x5u", signed_by("EdDSA", x5u="https://evil.example/cert"), Reason.BAD_SIGNATURE),
    ("x5c", signed_by("EdDSA", x5c=["MIIB"]), Reason.BAD_SIGNATURE),
    ("kid a path", header(kid="../../../../dev/null"), Reason.UNKNOWN_KEY),
    ("kid SQL", header(kid="x'/**/UNION/**/SELECT/**/1--"), Reason.UNKNOWN_KEY),
    ("kid a URL", header(kid="https://evil.example/jwks"), Reason.UNKNOWN_KEY),
    ("kid with spaces", header(kid="a b"), Reason.BAD_KEY_ID),
    ("kid with a NUL", header(kid="a\0"), Reason.BAD_KEY_ID),
    ("kid with CRLF", header(kid="a\r\nX-Evil: 1"), Reason.BAD_KEY_ID),
    ("kid with a lone surrogate", header(kid="\ud800"), Reason.BAD_KEY_ID),
    ("kid not ASCII", header(kid="schlüssel"), Reason.BAD_KEY_ID),
    ("kid of 257 characters", header(kid="a" * 257), Reason.BAD_KEY_ID),
    ("kid of 10 kB", header(kid="a" * 10_000), Reason.MALFORMED),
    ("kid a number", header(kid=1), Reason.BAD_KEY_ID),
    ("kid null", header(kid=None), Reason.BAD_KEY_ID),
    ("kid a list", header(kid=["a"]), Reason.BAD_KEY_ID),
    ("kid an object", header(kid={}), Reason.BAD_KEY_ID),
    ("kid empty", header(kid=""), Reason.BAD_KEY_ID),
    ("kid missing", raw_header('{"alg": "EdDSA"}'), Reason.BAD_KEY_ID),
    ("kid twice", raw_header('{"alg": "EdDSA", "kid": "x", "kid": "$kid"}'), Reason.MALFORMED),
    *[
        (f"{name} {value!r}", header(**{name: value}), Reason.BAD_HEADER)
        for name, value in (
            ("crit", ["exp"]),
            ("crit", []),
            ("crit", None),
            ("crit", ["b64"]),
            ("b64", False),
            ("b64", True),
            ("zip", "DEF"),
            ("cty", "JWT"),
            ("cty", "application/json"),
            ("cty", None),
        )
    ],
]

TYPES: tuple[Any, ...] = (
    "logout+jwt",
    "better-auth.session-cache+jwt",
    "dpop+jwt",
    "secevent+jwt",
    "id_token",
    "application/jwt",
    "JWT ",
    "at+jwt; x=y",
    "",
    1,
    None,
    ["JWT"],
    {},
    True,
)
TYPE: list[tuple[str, Forge, Reason]] = [(f"typ {typ!r}", header(typ=typ), Reason.BAD_TYPE) for typ in TYPES]

FORM: list[tuple[str, Forge, Reason]] = [
    ("empty", lambda _: "", Reason.MALFORMED),
    ("one word", lambda _: "token", Reason.MALFORMED),
    ("2 segments", edited(lambda head, body, _: f"{head}.{body}"), Reason.MALFORMED),
    ("4 segments", edited(lambda head, body, tag: f"{head}.{body}.{tag}.{tag}"), Reason.MALFORMED),
    ("5 segments, a JWE", edited(lambda head, body, tag: f"{head}..{body}.{body}.{tag}"), Reason.MALFORMED),
    ("6 segments", edited(lambda head, body, tag: f"{head}.{body}.{tag}.a.b.c"), Reason.MALFORMED),
    ("dots", lambda _: "..", Reason.MALFORMED),
    ("30,000 dots", lambda _: "." * 30_000, Reason.MALFORMED),
    ("no header", edited(lambda _, body, tag: f".{body}.{tag}"), Reason.MALFORMED),
    (
        "JSON serialisation",
        edited(lambda head, body, tag: json.dumps({"protected": head, "payload": body, "signature": tag})),
        Reason.MALFORMED,
    ),
    ("padding in the signature", edited(lambda head, body, tag: f"{head}.{body}.{tag}=="), Reason.MALFORMED),
    ("padding in the header", edited(lambda head, body, tag: f"{head}=.{body}.{tag}"), Reason.MALFORMED),
    ("leading space", edited(lambda *parts: " " + ".".join(parts)), Reason.MALFORMED),
    ("trailing line break", edited(lambda *parts: ".".join(parts) + "\n"), Reason.MALFORMED),
    ("a space in the payload", edited(lambda head, body, tag: f"{head}.{body[:9]} {body[9:]}.{tag}"), Reason.MALFORMED),
    ("a line break in the payload", edited(lambda h, b, tag: f"{h}.{b[:9]}\n{b[9:]}.{tag}"), Reason.MALFORMED),
    ("the other alphabet", edited(lambda head, body, _: f"{head}.{body}.{'+/' * 43}"), Reason.MALFORMED),
    ("stray bits in the signature", edited(lambda head, body, tag: f"{head}.{body}.{_stray(tag)}"), Reason.MALFORMED),
    ("a segment of length 1 mod 4", edited(lambda head, body, _: f"{head}.{body}.AAAAA"), Reason.MALFORMED),
    ("not ASCII", edited(lambda head, body, tag: f"{head}.{body}.{tag[:-1]}é"), Reason.MALFORMED),
    ("fullwidth", edited(lambda head, body, tag: f"{head}.{body}.{tag[:-1]}\uff21"), Reason.MALFORMED),
    ("a NUL", edited(lambda head, body, tag: f"{head}.{body}.{tag}\0"), Reason.MALFORMED),
    ("a lone surrogate", lambda _: "\ud800.a.b", Reason.MALFORMED),
    ("32 KiB and one", lambda _: "a" * (32 * 1024 + 1), Reason.TOO_LONG),
    ("64 KiB", lambda issuer: issuer.token(image="x" * 49_000), Reason.TOO_LONG),
    ("1 MiB", lambda _: "a." * 524_288, Reason.TOO_LONG),
    ("header over 8 KiB", header(pad="x" * 7_000), Reason.MALFORMED),
    ("header a list", raw_header('["alg"]'), Reason.MALFORMED),
    ("header a string", raw_header('"alg"'), Reason.MALFORMED),
    ("header null", raw_header("null"), Reason.MALFORMED),
    ("header not JSON", raw_header("{alg: EdDSA}"), Reason.MALFORMED),
    ("header with a comma too many", raw_header('{"alg": "EdDSA", "kid": "$kid",}'), Reason.MALFORMED),
    ("header and more", raw_header('{"alg": "EdDSA", "kid": "$kid"} {}'), Reason.MALFORMED),
    ("header nested 2,000 deep", raw_header('{"a":' + "[" * 2_000 + "]" * 2_000 + "}"), Reason.MALFORMED),
    ("header nested 33 deep", raw_header('{"a":' + "[" * 32 + "]" * 32 + "}"), Reason.MALFORMED),
    ("header with NaN", raw_header('{"alg": "EdDSA", "kid": "$kid", "x": NaN}'), Reason.MALFORMED),
    ("header with a raw line break", raw_header('{"alg": "EdDSA", "kid": "a\n"}'), Reason.MALFORMED),
    ("header in UTF-16", lambda i: i.sign('{"alg": "EdDSA"}'.encode("utf-16"), payload(i)), Reason.MALFORMED),
    ("header with a byte order mark", raw_header('\ufeff{"alg": "EdDSA", "kid": "$kid"}'), Reason.MALFORMED),
    ("header with bad UTF-8", lambda i: i.sign(b'{"alg": "EdDSA", "kid": "\xff"}', payload(i)), Reason.MALFORMED),
    ("a session token", lambda _: "a" * 32 + "." + "B" * 43 + "=", Reason.OPAQUE_SESSION),
    ("an unsigned session token", lambda _: "aB3" * 10 + "xy", Reason.OPAQUE_SESSION),
    ("not quite a session token", lambda _: "a" * 31 + "." + "B" * 43 + "=", Reason.MALFORMED),
]

SIGNATURE: list[tuple[str, Forge, Reason]] = [
    ("empty", edited(lambda head, body, _: f"{head}.{body}."), Reason.BAD_SIGNATURE),
    ("zero", edited(lambda head, body, _: f"{head}.{body}.{encode_base64url(bytes(64))}"), Reason.BAD_SIGNATURE),
    ("short", edited(lambda head, body, tag: f"{head}.{body}.{tag[:-6]}"), Reason.BAD_SIGNATURE),
    ("long", edited(lambda head, body, tag: f"{head}.{body}.{tag[:-2]}AAAA"), Reason.BAD_SIGNATURE),
    ("of another payload", lambda i: _graft(i.token("admin"), i.token("user1")), Reason.BAD_SIGNATURE),
    ("of another header", lambda i: _graft(i.token(header={"typ": "JWT"}), i.token()), Reason.BAD_SIGNATURE),
    ("DER", lambda i: _resigned(i, b"\x30\x06\x02\x01\x01\x02\x01\x01"), Reason.BAD_SIGNATURE),
]


def _none() -> str:
    return encode_base64url(b'{"alg": "none", "kid": "k"}')


def _stray(segment: str) -> str:
    """Another spelling of the same bytes: 64 of them leave four bits of the last character unused."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return segment[:-1] + alphabet[alphabet.index(segment[-1]) ^ 1]


def _graft(token: str, donor: str) -> str:
    return f"{token.rpartition('.')[0]}.{donor.rpartition('.')[2]}"


def _resigned(issuer: LocalIssuer, signature: bytes) -> str:
    return f"{issuer.token().rpartition('.')[0]}.{encode_base64url(signature)}"


GOOD_HEADER = encode_base64url(b'{"alg":"EdDSA","kid":"k"}') + "."
EVERYWHERE = ALG + INJECTION + FORM + SIGNATURE


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
    """PS256 for RS256, ES256 with a P-521 key, and all the rest."""
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
    """RFC 9864: the fully specified name and the old one are one algorithm, in the key, in the header, or mixed."""
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
async def test_what_a_good_token_may_carry_beside(forged_at: dict[str, LocalIssuer], members: dict[str, Any]) -> None:
    issuer = forged_at["EdDSA"]
    assert (await issuer.verifier().verify(issuer.token(header=members))).subject == "user1"


async def test_nothing_in_a_token_causes_a_connection(forged_at: dict[str, LocalIssuer]) -> None:
    """No attack that could be seen through without keys is a reason to fetch them, and none leads elsewhere."""
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
async def test_what_is_no_string(forged_at: dict[str, LocalIssuer], token: Any) -> None:
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
def test_verify_jws_takes_any_payload_and_type(forged_at: dict[str, LocalIssuer], data: bytes, typ: str) -> None:
    issuer = forged_at["EdDSA"]
    token = issuer.sign({"alg": "EdDSA", "kid": issuer.key.kid, "typ": typ}, data)
    assert verify_jws(token, issuer.jwks) == data
    assert parse_jws(token).typ == typ


def test_verify_jws_refuses_a_typ_that_is_no_text(forged_at: dict[str, LocalIssuer]) -> None:
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
    """About a millisecond each; the bound is wide, for machines that do other things meanwhile."""
    verifier = forged_at["EdDSA"].verifier()
    best = 1.0
    for _ in range(5):
        started = real_time.process_time()
        with pytest.raises(InvalidToken):
            await verifier.verify(token)
        best = min(best, real_time.process_time() - started)
    assert best < 0.05
