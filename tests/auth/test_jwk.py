"""The keys that are read from a JWK set, their algorithms, and the keys that are skipped."""

from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from backend.auth import KeySet, UnusableKeys
from backend.auth.encoding import Ambiguous, encode_base64url
from backend.auth.jwk import read_key
from backend.auth.testing import ALGORITHMS, LocalIssuer, SigningKey
from tests.auth.scripted import Jwks

P = 2**255 - 19


def integer(value: int) -> str:
    return encode_base64url(value.to_bytes((value.bit_length() + 7) // 8))


def okp(x: bytes, **members: Any) -> dict[str, Any]:
    return {"kty": "OKP", "crv": "Ed25519", "kid": "k", "x": encode_base64url(x), **members}


def roca(bits: int = 2048) -> int:
    """A modulus with the property of CVE-2017-15361: a power of 65537 modulo the product of the first primes."""
    primes = [n for n in range(2, 168) if all(n % d for d in range(2, n))]
    product = 1
    for prime in primes:
        product *= prime
    return pow(65537, 12345, product) + product * ((1 << (bits - 1)) // product + 3)


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_a_key_published_by_better_auth_is_read(jwks: Jwks, alg: str) -> None:
    key = read_key(jwks[alg])
    assert (key.kid, key.algorithm) == ("k", alg)
    assert "public" not in repr(key)


@pytest.mark.parametrize(
    ("alg", "named", "bound_to"),
    [
        ("EdDSA", None, "EdDSA"),
        ("EdDSA", "Ed25519", "EdDSA"),
        ("ES256", None, "ES256"),
        ("ES512", None, "ES512"),
        ("RS256", None, "RS256"),
        ("RS256", "PS256", "PS256"),
    ],
)
def test_the_algorithm_comes_from_alg_or_the_key_type(jwks: Jwks, alg: str, named: str | None, bound_to: str) -> None:
    jwk = {name: value for name, value in jwks[alg].items() if name != "alg"} | ({"alg": named} if named else {})
    assert read_key(jwk).algorithm == bound_to


def test_thumbprints_equal_the_examples_of_the_standards() -> None:
    """RFC 7638, 3.1 (RSA) and RFC 8037, A.3 (Ed25519)."""
    ed25519 = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "kid": "k"}
    assert read_key(ed25519).thumbprint == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
    rsa_key = {
        "kty": "RSA",
        "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjB"
        "ZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8"
        "KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_"
        "xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw",
        "e": "AQAB",
        "alg": "RS256",
        "kid": "2011-04-29",
    }
    assert read_key(rsa_key).thumbprint == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


Change = Callable[[dict[str, Any]], Any]


def with_(**members: Any) -> Change:
    return lambda jwk: {**jwk, **members}


def without(*names: str) -> Change:
    return lambda jwk: {name: value for name, value in jwk.items() if name not in names}


SKIPPED: list[tuple[str, str, Change, str]] = [
    ("not an object", "EdDSA", lambda _: "key", "not a JWK"),
    ("null", "EdDSA", lambda _: None, "not a JWK"),
    ("a name twice", "EdDSA", Ambiguous, "not a JWK"),
    ("no kid", "EdDSA", without("kid"), "no usable kid"),
    ("kid a number", "EdDSA", with_(kid=1), "no usable kid"),
    ("kid empty", "EdDSA", with_(kid=""), "no usable kid"),
    ("kid with a space", "EdDSA", with_(kid="a b"), "no usable kid"),
    ("kid with a line break", "EdDSA", with_(kid="a\nb"), "no usable kid"),
    ("kid too long", "EdDSA", with_(kid="a" * 257), "no usable kid"),
    ("no kty", "EdDSA", without("kty"), "unknown key type (kty)"),
    ("kty unknown", "EdDSA", with_(kty="AKP"), "unknown key type (kty)"),
    ("kty a list", "EdDSA", with_(kty=["OKP"]), "unknown key type (kty)"),
    ("kty in lower case", "RS256", with_(kty="rsa"), "unknown key type (kty)"),
    ("oct", "EdDSA", lambda _: {"kty": "oct", "kid": "k", "k": "AAAA"}, "private or symmetric"),
    ("oct without k", "EdDSA", lambda _: {"kty": "oct", "kid": "k"}, "unknown key type (kty)"),
    *[(f"private member {name}", "RS256", with_(**{name: "AQ"}), "private or symmetric") for name in ("d", "p", "oth")],
    ("use enc", "EdDSA", with_(use="enc"), "not for signatures (use)"),
    ("use null", "EdDSA", with_(use=None), "not for signatures (use)"),
    ("use a list", "EdDSA", with_(use=["sig"]), "not for signatures (use)"),
    ("key_ops without verify", "EdDSA", with_(key_ops=["sign"]), "not for verifying (key_ops)"),
    ("key_ops empty", "EdDSA", with_(key_ops=[]), "not for verifying (key_ops)"),
    ("key_ops a string", "EdDSA", with_(key_ops="verify"), "not for verifying (key_ops)"),
    ("alg none", "EdDSA", with_(alg="none"), "the algorithm (alg) is not one of this key type's"),
    ("alg null", "EdDSA", with_(alg=None), "the algorithm (alg) is not one of this key type's"),
    ("alg a list", "EdDSA", with_(alg=["EdDSA"]), "the algorithm (alg) is not one of this key type's"),
    ("alg HS256", "RS256", with_(alg="HS256"), "the algorithm (alg) is not one of this key type's"),
    ("alg RSA-OAEP", "RS256", with_(alg="RSA-OAEP"), "the algorithm (alg) is not one of this key type's"),
    ("alg RS512", "RS256", with_(alg="RS512"), "the algorithm (alg) is not one of this key type's"),
    ("alg of another type", "EdDSA", with_(alg="RS256"), "the algorithm (alg) is not one of this key type's"),
    ("alg of another curve", "ES256", with_(alg="ES512"), "the algorithm (alg) is not one of this key type's"),
    ("Ed448", "EdDSA", with_(crv="Ed448"), "unknown curve (crv)"),
    ("X25519", "EdDSA", with_(crv="X25519"), "unknown curve (crv)"),
    ("OKP without crv", "EdDSA", without("crv"), "unknown curve (crv)"),
    ("OKP without x", "EdDSA", without("x"), "x is not base64url"),
    ("x padded", "EdDSA", lambda jwk: {**jwk, "x": jwk["x"] + "="}, "x is not base64url"),
    ("x a number", "EdDSA", with_(x=5), "x is not base64url"),
    ("x not ASCII", "EdDSA", with_(x="é"), "x is not base64url"),
    ("x in the other alphabet", "EdDSA", with_(x="+" * 43), "x is not base64url"),
    ("x too short", "EdDSA", lambda _: okp(bytes(31)), "not a sound point of the curve"),
    ("x too long", "EdDSA", lambda _: okp(bytes(33)), "not a sound point of the curve"),
    *[
        (
            f"unsound y {y % 1000}",
            "EdDSA",
            with_(x=encode_base64url(y.to_bytes(32, "little"))),
            "not a sound point of the curve",
        )
        for y in (
            0,
            1,
            P - 1,
            0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
            P - 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
            1 | 1 << 255,
            0 | 1 << 255,
            P,
            P + 1,
            2**255 - 1,
            2,  # not on the curve
        )
    ],
    ("P-384", "ES256", with_(crv="P-384"), "unknown curve (crv)"),
    ("secp256k1", "ES256", with_(crv="secp256k1"), "unknown curve (crv)"),
    ("EC without crv", "ES256", without("crv"), "unknown curve (crv)"),
    ("crv a list", "ES256", with_(crv=["P-256"]), "unknown curve (crv)"),
    ("EC without y", "ES256", without("y"), "y is not base64url"),
    ("x and y swapped", "ES256", lambda jwk: {**jwk, "x": jwk["y"], "y": jwk["x"]}, "not a sound point of the curve"),
    ("point at infinity", "ES256", with_(x="A" * 43, y="A" * 43), "not a sound point of the curve"),
    ("coordinate too short", "ES512", with_(x="AAAA"), "a coordinate has the wrong length"),
    ("coordinate too long", "ES256", with_(y="A" * 44), "a coordinate has the wrong length"),
    ("P-521 point as P-256", "ES512", with_(crv="P-256", alg="ES256"), "a coordinate has the wrong length"),
    ("RSA without n", "RS256", without("n"), "n is not base64url"),
    ("RSA without e", "RS256", without("e"), "e is not base64url"),
    ("e = 1", "RS256", with_(e="AQ"), "unsound modulus or exponent"),
    ("e = 0", "RS256", with_(e="AA"), "unsound modulus or exponent"),
    ("e empty", "RS256", with_(e=""), "unsound modulus or exponent"),
    ("e even", "RS256", with_(e=integer(65538)), "unsound modulus or exponent"),
    ("e of 65 bit", "RS256", with_(e=integer(2**64 + 1)), "unsound modulus or exponent"),
    ("n even", "RS256", with_(n=integer(2**2047)), "unsound modulus or exponent"),
    ("n of 2047 bit", "RS256", with_(n=integer(2**2046 + 1)), "modulus under 2048 or over 8192 bit"),
    ("n of 8193 bit", "RS256", with_(n=integer(2**8192 + 1)), "modulus under 2048 or over 8192 bit"),
    ("ROCA", "RS256", with_(n=integer(roca())), "made by the flawed generator of CVE-2017-15361 (ROCA)"),
]


@pytest.mark.parametrize(("alg", "change", "reason"), [row[1:] for row in SKIPPED], ids=[row[0] for row in SKIPPED])
def test_an_unusable_key_is_skipped_and_the_others_are_used(jwks: Jwks, alg: str, change: Change, reason: str) -> None:
    bad, good = change(jwks[alg]), {**jwks["ES256"], "kid": "good"}
    found = KeySet.from_jwks({"keys": [bad, good]})
    assert list(found.keys) == ["good"]
    assert [key.reason for key in found.skipped] == [reason]
    with pytest.raises(UnusableKeys, match="no usable key, 1 skipped, the first: "):
        KeySet.from_jwks({"keys": [bad]})


@pytest.mark.parametrize(
    "change",
    [
        with_(use="sig"),
        with_(key_ops=["verify"]),
        with_(key_ops=["sign", "verify"]),
        with_(x5c=["whatever"], x5u="https://evil.example/", nbf=0, expiresAt=None),
        with_(kid="~" * 256),
    ],
)
def test_a_key_with_ignored_members_is_read(jwks: Jwks, change: Change) -> None:
    assert read_key(change(jwks["EdDSA"])).algorithm == "EdDSA"


@pytest.mark.parametrize("bits", [2048, 8192])
def test_rsa_moduli_at_the_bounds_are_accepted(bits: int) -> None:
    modulus = (1 << bits) - 159  # not a secure modulus, but only its size is checked here
    assert read_key({"kty": "RSA", "kid": "k", "n": integer(modulus), "e": "Aw"}).algorithm == "RS256"


def test_a_modulus_that_resembles_roca_except_for_one_prime_is_accepted(jwks: Jwks) -> None:
    other = next(n for n in range(roca() + 2, roca() + 10_000, 2) if n % 11 not in (1, 10))
    assert read_key({**jwks["RS256"], "n": integer(other)}).algorithm == "RS256"


def test_leading_zeros_do_not_change_the_key(jwks: Jwks) -> None:
    key = read_key(jwks["RS256"])
    modulus = key.public.public_numbers().n  # type: ignore[union-attr]  # an RSA key
    assert read_key({**jwks["RS256"], "n": encode_base64url(b"\0" + modulus.to_bytes(256))}) == key


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_a_key_verifies_its_own_algorithm_only(issuers: dict[str, LocalIssuer], jwks: Jwks, alg: str) -> None:
    key, signature = read_key(jwks[alg]), issuers[alg].key.sign(b"message")
    spellings = {"EdDSA", "Ed25519"} if alg == "EdDSA" else {alg}
    for other in [*ALGORITHMS, "Ed25519", "none", "HS256", ""]:
        assert key.verifies(other, b"message", signature) == (other in spellings)
    assert not key.verifies(alg, b"another", signature)
    for wrong in (b"", signature[:-1], signature + b"\0", bytes(len(signature)), signature[::-1]):
        assert not key.verifies(alg, b"message", wrong)


def test_ecdsa_signatures_are_raw_and_malleable(issuers: dict[str, LocalIssuer]) -> None:
    """RFC 7518, 3.4: r and s side by side, and (r, n - s) is as valid as (r, s)."""
    n = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    private = issuers["ES256"].key.private
    key = read_key(issuers["ES256"].key.jwk)
    raw = issuers["ES256"].key.sign(b"message")
    s = int.from_bytes(raw[32:])
    assert key.verifies("ES256", b"message", raw[:32] + (n - s).to_bytes(32))
    assert not key.verifies("ES256", b"message", private.sign(b"message", ec.ECDSA(ECAlgorithm.SHA256())))
    for r_and_s in (bytes(64), raw[:32] + bytes(32), bytes(32) + raw[32:], n.to_bytes(32) * 2):
        assert not key.verifies("ES256", b"message", r_and_s)


def test_ed25519_signatures_are_not_malleable(issuers: dict[str, LocalIssuer]) -> None:
    """RFC 8032, 5.1.7: S + L is refused."""
    order = 2**252 + 27742317777372353535851937790883648493
    signature = issuers["EdDSA"].key.sign(b"message")
    s = int.from_bytes(signature[32:], "little") + order
    assert not read_key(issuers["EdDSA"].key.jwk).verifies(
        "EdDSA", b"message", signature[:32] + s.to_bytes(32, "little")
    )


def test_equality_compares_kid_and_key(jwks: Jwks) -> None:
    assert read_key(jwks["EdDSA"]) == read_key({**jwks["EdDSA"], "alg": "Ed25519"})
    assert read_key(jwks["EdDSA"]) != read_key({**jwks["EdDSA"], "kid": "other"})
    other = {**SigningKey.generate("EdDSA", "k").jwk}
    assert read_key(jwks["EdDSA"]) != read_key(other)
