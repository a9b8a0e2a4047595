"""Tables of forged tokens: a name, a function that creates the token, and the reason for its refusal."""

import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from backend.auth import Reason
from backend.auth.encoding import encode_base64url
from backend.auth.testing import ALGORITHMS, LocalIssuer, SigningKey

NOW = 1_800_000_000
Forge = Callable[[LocalIssuer], str]


def payload(issuer: LocalIssuer, **claims: Any) -> dict[str, Any]:
    return {
        "iss": issuer.url,
        "aud": issuer.audience,
        "sub": "user1",
        "iat": NOW,
        "exp": NOW + 900,
    } | claims


def header(**members: Any) -> Forge:
    """A valid token except for these header members."""
    return lambda issuer: issuer.token(header=members)


def raw_header(text: str) -> Forge:
    """A token with this text as its header; `$kid` is replaced by the key's kid."""
    return lambda issuer: issuer.sign(text.replace("$kid", issuer.key.kid).encode(), payload(issuer))


def edited(change: Callable[[str, str, str], str]) -> Forge:
    """A valid token whose segments are changed after signing."""
    return lambda issuer: change(*issuer.token().split("."))


def hmac_with(key: Callable[[LocalIssuer], bytes]) -> Forge:
    """An HS256 token with public bytes as its key."""

    def forge(issuer: LocalIssuer) -> str:
        head = encode_base64url(json.dumps({"alg": "HS256", "kid": issuer.key.kid}).encode())
        body = encode_base64url(json.dumps(payload(issuer)).encode())
        mac = hmac.new(key(issuer), f"{head}.{body}".encode(), hashlib.sha256).digest()
        return f"{head}.{body}.{encode_base64url(mac)}"

    return forge


def signed_by(alg: str, **members: Any) -> Forge:
    """A token signed by an attacker's key with the issuer's kid."""
    return lambda issuer: issuer.token(key=SigningKey.generate(alg, issuer.key.kid), header=members)


def _public(issuer: LocalIssuer, encoding: Encoding, form: PublicFormat) -> bytes:
    data: bytes = issuer.key.private.public_key().public_bytes(encoding, form)
    return data


_ALG_NONE = encode_base64url(b'{"alg": "none", "kid": "k"}')
ALG: list[tuple[str, Forge, Reason]] = [
    *[(f"alg {alg!r}", header(alg=alg), Reason.BAD_ALGORITHM) for alg in ("none", "None", "NONE", "nOnE", "", " none")],
    ("alg none, no signature", edited(lambda _, body, __: f"{_ALG_NONE}.{body}."), Reason.BAD_ALGORITHM),
    (
        "HS256 keyed with the raw key",
        hmac_with(lambda i: _public(i, Encoding.Raw, PublicFormat.Raw)),
        Reason.BAD_ALGORITHM,
    ),
    (
        "HS256 keyed with the PEM",
        hmac_with(lambda i: _public(i, Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)),
        Reason.BAD_ALGORITHM,
    ),
    ("HS256 keyed with the JWK", hmac_with(lambda i: json.dumps(i.key.jwk).encode()), Reason.BAD_ALGORITHM),
    ("HS256 with an empty key", hmac_with(lambda _: b""), Reason.BAD_ALGORITHM),
    ("alg null", header(alg=None), Reason.BAD_ALGORITHM),
    ("alg a list", header(alg=["EdDSA"]), Reason.BAD_ALGORITHM),
    ("alg missing", raw_header('{"kid": "$kid"}'), Reason.BAD_ALGORITHM),
    ("alg in lower case", header(alg="eddsa"), Reason.BAD_ALGORITHM),
    ("alg ES384", header(alg="ES384"), Reason.BAD_ALGORITHM),
    ("alg RS512", header(alg="RS512"), Reason.BAD_ALGORITHM),
    ("alg twice", raw_header('{"alg": "none", "alg": "EdDSA", "kid": "$kid"}'), Reason.MALFORMED),
    *[(f"alg {alg}, the key's is EdDSA", header(alg=alg), Reason.BAD_SIGNATURE) for alg in ALGORITHMS[1:]],
    ("a key of another type under the kid", signed_by("ES256"), Reason.BAD_SIGNATURE),
    ("a key of the same type under the kid", signed_by("EdDSA"), Reason.BAD_SIGNATURE),
]

ATTACKER_KEY = SigningKey.generate("EdDSA", "attacker")
INJECTION: list[tuple[str, Forge, Reason]] = [
    ("jwk", signed_by("EdDSA", jwk=ATTACKER_KEY.jwk), Reason.BAD_SIGNATURE),
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
    ("kid empty", header(kid=""), Reason.BAD_KEY_ID),
    ("kid missing", raw_header('{"alg": "EdDSA"}'), Reason.BAD_KEY_ID),
    ("kid twice", raw_header('{"alg": "EdDSA", "kid": "x", "kid": "$kid"}'), Reason.MALFORMED),
    *[
        (f"{name} {value!r}", header(**{name: value}), Reason.BAD_HEADER)
        for name, value in (
            ("crit", ["exp"]),
            ("crit", None),
            ("b64", False),
            ("zip", "DEF"),
            ("cty", "JWT"),
        )
    ],
]

TYPES: tuple[Any, ...] = (
    "logout+jwt",
    "better-auth.session-cache+jwt",
    "dpop+jwt",
    "secevent+jwt",
    "application/jwt",
    "JWT ",
    "at+jwt; x=y",
    "",
    1,
    None,
    ["JWT"],
)
TYPE: list[tuple[str, Forge, Reason]] = [(f"typ {typ!r}", header(typ=typ), Reason.BAD_TYPE) for typ in TYPES]

FORM: list[tuple[str, Forge, Reason]] = [
    ("empty", lambda _: "", Reason.MALFORMED),
    ("no dot", lambda _: "token", Reason.MALFORMED),
    ("2 segments", edited(lambda head, body, _: f"{head}.{body}"), Reason.MALFORMED),
    ("4 segments", edited(lambda head, body, tag: f"{head}.{body}.{tag}.{tag}"), Reason.MALFORMED),
    ("5 segments, as in a JWE", edited(lambda head, body, tag: f"{head}..{body}.{body}.{tag}"), Reason.MALFORMED),
    ("6 segments", edited(lambda head, body, tag: f"{head}.{body}.{tag}.a.b.c"), Reason.MALFORMED),
    ("3 empty segments", lambda _: "..", Reason.MALFORMED),
    ("30,000 dots", lambda _: "." * 30_000, Reason.MALFORMED),
    ("empty header", edited(lambda _, body, tag: f".{body}.{tag}"), Reason.MALFORMED),
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
    ("+ and / in the signature", edited(lambda head, body, _: f"{head}.{body}.{'+/' * 43}"), Reason.MALFORMED),
    (
        "unused bits of the signature set",
        edited(lambda head, body, tag: f"{head}.{body}.{_with_unused_bit(tag)}"),
        Reason.MALFORMED,
    ),
    ("a segment of length 1 mod 4", edited(lambda head, body, _: f"{head}.{body}.AAAAA"), Reason.MALFORMED),
    ("a letter that is not ASCII", edited(lambda head, body, tag: f"{head}.{body}.{tag[:-1]}é"), Reason.MALFORMED),
    ("a fullwidth letter", edited(lambda head, body, tag: f"{head}.{body}.{tag[:-1]}\uff21"), Reason.MALFORMED),
    ("a NUL", edited(lambda head, body, tag: f"{head}.{body}.{tag}\0"), Reason.MALFORMED),
    ("a lone surrogate", lambda _: "\ud800.a.b", Reason.MALFORMED),
    ("32 KiB and a byte", lambda _: "a" * (32 * 1024 + 1), Reason.TOO_LONG),
    ("64 KiB", lambda issuer: issuer.token(image="x" * 49_000), Reason.TOO_LONG),
    ("1 MiB", lambda _: "a." * 524_288, Reason.TOO_LONG),
    ("header over 8 KiB", header(pad="x" * 7_000), Reason.MALFORMED),
    ("header a list", raw_header('["alg"]'), Reason.MALFORMED),
    ("header null", raw_header("null"), Reason.MALFORMED),
    ("header not JSON", raw_header("{alg: EdDSA}"), Reason.MALFORMED),
    ("header with a trailing comma", raw_header('{"alg": "EdDSA", "kid": "$kid",}'), Reason.MALFORMED),
    ("header with text after it", raw_header('{"alg": "EdDSA", "kid": "$kid"} {}'), Reason.MALFORMED),
    ("header nested 2,000 deep", raw_header('{"a":' + "[" * 2_000 + "]" * 2_000 + "}"), Reason.MALFORMED),
    ("header nested 33 deep", raw_header('{"a":' + "[" * 32 + "]" * 32 + "}"), Reason.MALFORMED),
    ("header with NaN", raw_header('{"alg": "EdDSA", "kid": "$kid", "x": NaN}'), Reason.MALFORMED),
    ("header with a raw line break", raw_header('{"alg": "EdDSA", "kid": "a\n"}'), Reason.MALFORMED),
    ("header in UTF-16", lambda i: i.sign('{"alg": "EdDSA"}'.encode("utf-16"), payload(i)), Reason.MALFORMED),
    ("header with a byte order mark", raw_header('\ufeff{"alg": "EdDSA", "kid": "$kid"}'), Reason.MALFORMED),
    ("header with bad UTF-8", lambda i: i.sign(b'{"alg": "EdDSA", "kid": "\xff"}', payload(i)), Reason.MALFORMED),
    ("a session token", lambda _: "a" * 32 + "." + "B" * 43 + "=", Reason.OPAQUE_SESSION),
    ("an unsigned session token", lambda _: "aB3" * 10 + "xy", Reason.OPAQUE_SESSION),
    ("a session token but for one character", lambda _: "a" * 31 + "." + "B" * 43 + "=", Reason.MALFORMED),
]

SIGNATURE: list[tuple[str, Forge, Reason]] = [
    ("empty signature", edited(lambda head, body, _: f"{head}.{body}."), Reason.BAD_SIGNATURE),
    (
        "zero signature",
        edited(lambda head, body, _: f"{head}.{body}.{encode_base64url(bytes(64))}"),
        Reason.BAD_SIGNATURE,
    ),
    ("short signature", edited(lambda head, body, tag: f"{head}.{body}.{tag[:-6]}"), Reason.BAD_SIGNATURE),
    ("long signature", edited(lambda head, body, tag: f"{head}.{body}.{tag[:-2]}AAAA"), Reason.BAD_SIGNATURE),
    (
        "signature of another payload",
        lambda i: _with_signature_of(i.token("admin"), i.token("user1")),
        Reason.BAD_SIGNATURE,
    ),
    (
        "signature of another header",
        lambda i: _with_signature_of(i.token(header={"typ": "JWT"}), i.token()),
        Reason.BAD_SIGNATURE,
    ),
    ("signature in DER", lambda i: _with_signature(i, b"\x30\x06\x02\x01\x01\x02\x01\x01"), Reason.BAD_SIGNATURE),
]


def _with_unused_bit(segment: str) -> str:
    """Change an unused bit: 64 bytes leave four bits of the last character unused."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return segment[:-1] + alphabet[alphabet.index(segment[-1]) ^ 1]


def _with_signature_of(token: str, other: str) -> str:
    return f"{token.rpartition('.')[0]}.{other.rpartition('.')[2]}"


def _with_signature(issuer: LocalIssuer, signature: bytes) -> str:
    return f"{issuer.token().rpartition('.')[0]}.{encode_base64url(signature)}"


# All except TYPE: `verify_jws` accepts every type.
FORGED = ALG + INJECTION + FORM + SIGNATURE
