"""Reads JWK sets: accepts secure public keys, binds each to one algorithm, and skips all other entries."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Self, TypeGuard

from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP521R1,
    EllipticCurve,
    EllipticCurvePublicKey,
    EllipticCurvePublicNumbers,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers
from jwt.algorithms import Algorithm, ECAlgorithm, OKPAlgorithm, RSAAlgorithm, RSAPSSAlgorithm

from .encoding import Ambiguous, decode_base64url, encode_base64url
from .errors import UnusableKeys

MAX_KEYS: Final = 256

# RFC 9864, 2.2, names the algorithm Ed25519 that RFC 8037 calls EdDSA. Both names are accepted.
CANONICAL: Final[Mapping[str, str]] = MappingProxyType(
    {"EdDSA": "EdDSA", "Ed25519": "EdDSA", "ES256": "ES256", "ES512": "ES512", "PS256": "PS256", "RS256": "RS256"}
)

SIGNATURES: Final[Mapping[str, Algorithm]] = MappingProxyType(
    {
        "EdDSA": OKPAlgorithm(),
        "ES256": ECAlgorithm(ECAlgorithm.SHA256, SECP256R1),
        "ES512": ECAlgorithm(ECAlgorithm.SHA512, SECP521R1),
        "PS256": RSAPSSAlgorithm(RSAPSSAlgorithm.SHA256),
        "RS256": RSAAlgorithm(RSAAlgorithm.SHA256),
    }
)
_CURVES: Final[Mapping[str, tuple[str, EllipticCurve, int]]] = MappingProxyType(
    {"P-256": ("ES256", SECP256R1(), 32), "P-521": ("ES512", SECP521R1(), 66)}
)
_PRIVATE_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})

_KID: Final = re.compile(r"[\x21-\x7e]{1,256}")

# The curve of RFC 8032, 5.1: -x^2 + y^2 = 1 + d x^2 y^2 modulo p, and the y of all points whose order divides 8.
_P: Final = 2**255 - 19
_D: Final = -121665 * pow(121666, -1, _P) % _P
_Y_OF_ORDER_8: Final = int.from_bytes(
    bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"
)
_LOW_ORDER_Y: Final = frozenset({0, 1, _P - 1, _Y_OF_ORDER_8, _P - _Y_OF_ORDER_8})

# The modulus of a ROCA key (CVE-2017-15361) is a power of 65537 modulo each of these primes. For another modulus the
# probability is 2^-27. The other primes below 168 are useless here: modulo them, every residue is a power of 65537.
_ROCA_RESIDUES: Final = tuple(
    (prime, frozenset(pow(65537, exponent, prime) for exponent in range(prime)))
    for prime in (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)
)

PublicKey = Ed25519PublicKey | EllipticCurvePublicKey | RSAPublicKey


@dataclass(frozen=True, slots=True)
class Key:
    """A public key with its id and its only algorithm. Keys are equal if id, algorithm and thumbprint are equal."""

    kid: str
    algorithm: str
    thumbprint: str  # SHA-256 (RFC 7638)
    public: PublicKey = field(repr=False, compare=False)

    def verifies(self, algorithm: str, message: bytes, signature: bytes) -> bool:
        """Whether `signature` over `message` is valid and `algorithm` (the header's `alg`) is the key's algorithm."""
        return CANONICAL.get(algorithm) == self.algorithm and SIGNATURES[self.algorithm].verify(
            message, self.public, signature
        )


class SkippedKey(NamedTuple):
    """A published key that is not used, with the reason."""

    kid: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class KeySet:
    """The usable keys by id, and the skipped keys."""

    keys: Mapping[str, Key]
    skipped: tuple[SkippedKey, ...] = ()

    @classmethod
    def from_jwks(cls, document: object) -> Self:
        """Read a JWK set (RFC 7517, 5). Raises UnusableKeys if it is malformed, too long or without a usable key."""
        entries = document.get("keys") if isinstance(document, Mapping) else None
        if isinstance(document, Ambiguous) or not isinstance(entries, (list, tuple)):
            raise UnusableKeys("not a JWK set")
        if len(entries) > MAX_KEYS:
            raise UnusableKeys(f"more than {MAX_KEYS} keys")
        keys: dict[str, Key] = {}
        contested: set[str] = set()
        skipped: list[SkippedKey] = []
        for entry in entries:
            try:
                key = read_key(entry)
            except UnusableKeys as error:
                kid = entry.get("kid") if isinstance(entry, Mapping) else None
                skipped.append(SkippedKey(kid if is_kid(kid) else None, str(error)))
                continue
            if keys.setdefault(key.kid, key) != key:
                contested.add(key.kid)
        skipped += [SkippedKey(kid, "several keys share this kid") for kid in sorted(contested)]
        usable = {kid: key for kid, key in keys.items() if kid not in contested}
        if not usable:
            first = f", the first: {skipped[0].reason}" if skipped else ""
            raise UnusableKeys(f"no usable key, {len(skipped)} skipped{first}")
        return cls(MappingProxyType(usable), tuple(skipped))


def is_kid(value: object) -> TypeGuard[str]:
    """Whether a value can be a key id: 1 to 256 visible ASCII characters."""
    return isinstance(value, str) and _KID.fullmatch(value) is not None


def read_key(jwk: object) -> Key:
    """Read one JWK (RFC 7517, 4). Raises UnusableKeys with the reason."""
    if not isinstance(jwk, Mapping) or isinstance(jwk, Ambiguous):
        raise UnusableKeys("not a JWK")
    if not is_kid(kid := jwk.get("kid")):
        raise UnusableKeys("no usable kid")
    if not _PRIVATE_MEMBERS.isdisjoint(jwk):
        raise UnusableKeys("private or symmetric")
    if jwk.get("use", "sig") != "sig":
        raise UnusableKeys("not for signatures (use)")
    operations = jwk.get("key_ops", ["verify"])
    if not isinstance(operations, (list, tuple)) or "verify" not in operations:
        raise UnusableKeys("not for verifying (key_ops)")
    try:
        read = _READERS[jwk["kty"]]
    except (KeyError, TypeError):
        raise UnusableKeys("unknown key type (kty)") from None
    algorithms, public, required = read(jwk)
    algorithm = jwk.get("alg", algorithms[0])
    if not isinstance(algorithm, str) or CANONICAL.get(algorithm) not in algorithms:
        raise UnusableKeys("the algorithm (alg) is not one of this key type's")
    canonical = json.dumps(required, sort_keys=True, separators=(",", ":"))
    return Key(kid, CANONICAL[algorithm], encode_base64url(sha256(canonical.encode()).digest()), public)


def _read_okp(jwk: Mapping[str, Any]) -> tuple[tuple[str, ...], PublicKey, dict[str, str]]:
    if jwk.get("crv") != "Ed25519":
        raise UnusableKeys("unknown curve (crv)")
    x = _octets(jwk, "x")
    if len(x) != 32 or not _is_sound_point(x):
        raise UnusableKeys("not a sound point of the curve")
    return ("EdDSA",), Ed25519PublicKey.from_public_bytes(x), {"crv": "Ed25519", "kty": "OKP", "x": jwk["x"]}


def _read_ec(jwk: Mapping[str, Any]) -> tuple[tuple[str, ...], PublicKey, dict[str, str]]:
    try:
        algorithm, curve, size = _CURVES[jwk["crv"]]
    except (KeyError, TypeError):
        raise UnusableKeys("unknown curve (crv)") from None
    x, y = _octets(jwk, "x"), _octets(jwk, "y")
    if len(x) != size or len(y) != size:
        raise UnusableKeys("a coordinate has the wrong length")
    try:
        public = EllipticCurvePublicNumbers(int.from_bytes(x), int.from_bytes(y), curve).public_key()
    except ValueError:
        raise UnusableKeys("not a sound point of the curve") from None
    return (algorithm,), public, {"crv": jwk["crv"], "kty": "EC", "x": jwk["x"], "y": jwk["y"]}


def _read_rsa(jwk: Mapping[str, Any]) -> tuple[tuple[str, ...], PublicKey, dict[str, str]]:
    n, e = int.from_bytes(_octets(jwk, "n")), int.from_bytes(_octets(jwk, "e"))
    if not 2048 <= n.bit_length() <= 8192:
        raise UnusableKeys("modulus under 2048 or over 8192 bit")
    # A larger exponent has no use and makes every verification slow.
    if n % 2 == 0 or e % 2 == 0 or not 3 <= e < 2**64:
        raise UnusableKeys("unsound modulus or exponent")
    if all(n % prime in residues for prime, residues in _ROCA_RESIDUES):
        raise UnusableKeys("made by the flawed generator of CVE-2017-15361 (ROCA)")
    required = {
        "e": encode_base64url(e.to_bytes((e.bit_length() + 7) // 8)),
        "kty": "RSA",
        "n": encode_base64url(n.to_bytes((n.bit_length() + 7) // 8)),
    }
    return ("RS256", "PS256"), RSAPublicNumbers(e, n).public_key(), required


_READERS: Final = MappingProxyType({"OKP": _read_okp, "EC": _read_ec, "RSA": _read_rsa})


def _octets(jwk: Mapping[str, Any], member: str) -> bytes:
    value = jwk.get(member)
    if isinstance(value, str):
        try:
            return decode_base64url(value)
        except ValueError:
            pass
    raise UnusableKeys(f"{member} is not base64url")


def _is_sound_point(x: bytes) -> bool:
    """Whether a key is canonical, on the curve and not of low order. Low-order keys verify forged signatures."""
    y = int.from_bytes(x, "little") & (2**255 - 1)
    if y >= _P or y in _LOW_ORDER_Y:
        return False
    u, v = y * y - 1, _D * y * y + 1
    return pow(u * v, (_P - 1) // 2, _P) == 1
