"""The documents that are a JWK set, and keys that share a kid."""

import pytest

from backend.auth import KeySet, SkippedKey, UnusableKeys
from backend.auth.encoding import Ambiguous
from backend.auth.testing import SigningKey
from tests.auth.scripted import Jwks


class TestOneKid:
    def test_the_same_key_twice_is_one_key(self, jwks: Jwks) -> None:
        again = {**jwks["EdDSA"], "alg": "Ed25519", "use": "sig"}
        found = KeySet.from_jwks({"keys": [jwks["EdDSA"], again]})
        assert list(found.keys) == ["k"]
        assert found.skipped == ()

    @pytest.mark.parametrize("others", [("ES256",), ("ES256", "EdDSA"), ("EdDSA", "ES256"), ("ES256", "ES512")])
    def test_two_different_keys_make_the_kid_unusable(self, jwks: Jwks, others: tuple[str, ...]) -> None:
        good = {**jwks["RS256"], "kid": "good"}
        found = KeySet.from_jwks({"keys": [jwks["EdDSA"], *(jwks[alg] for alg in others), good]})
        assert list(found.keys) == ["good"]
        assert found.skipped == (SkippedKey("k", "several keys share this kid"),)

    def test_one_key_for_two_algorithms_is_two_keys(self, jwks: Jwks) -> None:
        with pytest.raises(UnusableKeys, match="share this kid"):
            KeySet.from_jwks({"keys": [jwks["RS256"], {**jwks["RS256"], "alg": "PS256"}]})

    def test_a_skipped_key_does_not_conflict(self, jwks: Jwks) -> None:
        found = KeySet.from_jwks({"keys": [{**jwks["RS256"], "use": "enc"}, jwks["EdDSA"]]})
        assert found.keys["k"].algorithm == "EdDSA"


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (None, "not a JWK set"),
        ("keys", "not a JWK set"),
        ([], "not a JWK set"),
        ({}, "not a JWK set"),
        ({"keys": None}, "not a JWK set"),
        ({"keys": {"0": {}}}, "not a JWK set"),
        (Ambiguous(keys=[]), "not a JWK set"),
        ({"keys": []}, "no usable key, 0 skipped"),
        ({"keys": [{}] * 257}, "more than 256 keys"),
    ],
)
def test_a_document_that_is_not_a_key_set_is_rejected(document: object, reason: str) -> None:
    with pytest.raises(UnusableKeys, match=reason):
        KeySet.from_jwks(document)


def test_a_set_may_have_256_keys() -> None:
    jwk = SigningKey.generate("ES256", "k").jwk
    assert len(KeySet.from_jwks({"keys": [{**jwk, "kid": f"k{n}"} for n in range(256)]}).keys) == 256


def test_a_set_is_immutable(jwks: Jwks) -> None:
    found = KeySet.from_jwks({"keys": [jwks["EdDSA"]]})
    with pytest.raises(TypeError):
        found.keys["k"] = found.keys["k"]  # type: ignore[index]  # that it cannot be is the test
