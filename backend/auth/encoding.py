"""Decodes the base64url and JSON of JOSE strictly: rejects non-canonical and ambiguous input."""

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from math import isfinite
from typing import Any

MAX_DEPTH = 32


class Ambiguous(dict[str, Any]):
    """A JSON object with a duplicate name."""


def decode_base64url(text: str) -> bytes:
    """Decode canonical, unpadded base64url (RFC 7515, 2). Raises ValueError for any other encoding of the bytes."""
    data = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    # The decoder ignores other characters and unused trailing bits; comparing with the re-encoded bytes finds them.
    if urlsafe_b64encode(data).rstrip(b"=") != text.encode():
        raise ValueError("not canonical base64url")
    return data


def encode_base64url(data: bytes) -> str:
    """Encode as unpadded base64url (RFC 7515, 2)."""
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def decode_object(data: bytes) -> dict[str, Any]:
    """Decode a JSON object in UTF-8 (RFC 8259; RFC 7515, 4).

    Raises ValueError for duplicate names, NaN and Infinity, a byte order mark, and more than 32 levels.
    """
    return _decode(data, _STRICT)


def decode_jwks(data: bytes) -> dict[str, Any]:
    """Decode a JWK set. Objects with duplicate names become `Ambiguous`, so that the other keys remain usable."""
    return _decode(data, _TOLERANT)


def _decode(data: bytes, decoder: json.JSONDecoder) -> dict[str, Any]:
    text = data.decode()
    try:
        value = decoder.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")  # noqa: TRY004 - the input is invalid, not an argument's type
    # A cheap upper bound of the depth. It also counts brackets inside strings, which then take the exact check.
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _refuse_depth(value)
    return value


def _refuse_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ValueError("nested too deeply")


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate name")
    return value


def _mark_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    return value if len(value) == len(pairs) else Ambiguous(value)


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError("a number is not finite")
    return number


_STRICT = json.JSONDecoder(object_pairs_hook=_reject_duplicates, parse_float=_finite, parse_constant=_finite)
_TOLERANT = json.JSONDecoder(object_pairs_hook=_mark_duplicates, parse_float=_finite, parse_constant=_finite)
