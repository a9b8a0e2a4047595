"""Parses compact JWS strictly and verifies them with the key named by `kid` and that key's algorithm."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from .encoding import decode_base64url, decode_object
from .errors import InvalidToken, Reason
from .jwk import CANONICAL, Key, KeySet, is_kid

MAX_TOKEN: Final = 32 * 1024
MAX_HEADER: Final = 8 * 1024

# These members change how the payload must be processed (RFC 7515, 4.1.10 and 4.1.11; RFC 7797, 7).
_REFUSED_MEMBERS: Final = frozenset({"b64", "crit", "cty", "zip"})

# A session token with or without signature, which Better Auth's bearer plugin gives to mobile clients.
_SESSION_TOKEN: Final = re.compile(r"[A-Za-z0-9]{32}(\.[A-Za-z0-9+/_-]{43}=?)?")


@dataclass(frozen=True, slots=True)
class JWS:
    """A parsed compact JWS. It is unverified: call `is_signed_by` before using the payload."""

    alg: str
    kid: str
    typ: str | None
    payload: bytes = field(repr=False)
    signing_input: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    def is_signed_by(self, key: Key) -> bool:
        """Whether the signature is valid for this key and its algorithm."""
        return key.verifies(self.alg, self.signing_input, self.signature)


def parse_jws(token: str) -> JWS:
    """Parse a compact JWS (RFC 7515, 5.2) without verifying it. Raises InvalidToken.

    The header must name an allowed algorithm and a key id; `jwk`, `jku`, `x5u` and `x5c` are ignored.
    """
    if not isinstance(token, str):
        raise InvalidToken(Reason.MALFORMED)
    if len(token) > MAX_TOKEN:
        raise InvalidToken(Reason.TOO_LONG)
    segments = token.split(".", 3)
    if len(segments) != 3:
        raise InvalidToken(Reason.OPAQUE_SESSION if _SESSION_TOKEN.fullmatch(token) else Reason.MALFORMED)
    if len(segments[0]) > MAX_HEADER:
        raise InvalidToken(Reason.MALFORMED)
    try:
        header = decode_object(decode_base64url(segments[0]))
        payload = decode_base64url(segments[1])
        signature = decode_base64url(segments[2])
    except ValueError:
        raise InvalidToken(Reason.MALFORMED) from None
    alg, kid, typ = _read_header(header)
    return JWS(alg, kid, typ, payload, token[: token.rindex(".")].encode(), signature)


def _read_header(header: Mapping[str, Any]) -> tuple[str, str, str | None]:
    alg, kid = header.get("alg"), header.get("kid")
    if not isinstance(alg, str) or alg not in CANONICAL:
        raise InvalidToken(Reason.BAD_ALGORITHM)
    if not is_kid(kid):
        raise InvalidToken(Reason.BAD_KEY_ID)
    if not _REFUSED_MEMBERS.isdisjoint(header):
        raise InvalidToken(Reason.BAD_HEADER)
    if "typ" not in header:
        return alg, kid, None
    if not isinstance(typ := header["typ"], str):
        raise InvalidToken(Reason.BAD_TYPE)
    return alg, kid, typ.lower()


def verify_jws(token: str, jwks: Mapping[str, Any]) -> bytes:
    """Verify a compact JWS against a JWK set and return its payload. The caller must check `typ` and the payload.

    Raises InvalidToken, also for a JWS without a kid, or UnusableKeys if the set contains no usable key.
    """
    jws = parse_jws(token)
    key = KeySet.from_jwks(jwks).keys.get(jws.kid)
    if key is None:
        raise InvalidToken(Reason.UNKNOWN_KEY)
    if not jws.is_signed_by(key):
        raise InvalidToken(Reason.BAD_SIGNATURE)
    return jws.payload
