"""Base64url and JSON as JOSE writes them: what is not canonical or could be read in two ways is refused."""

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from math import isfinite
from typing import Any

MAX_DEPTH = 32


class Ambiguous(dict[str, Any]):
    """A JSON object in which a name occurs twice."""


def decode_base64url(text: str) -> bytes:
    """Decode unpadded base64url (RFC 7515, 2). Raises ValueError for any other spelling of the same bytes."""
    data = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    # The decoder passes over foreign characters and stray trailing bits; their re-encoding differs.
    if urlsafe_b64encode(data).rstrip(b"=") != text.encode():
        raise ValueError("not canonical base64url")
    return data


def encode_base64url(data: bytes) -> str:
    """Encode as unpadded base64url (RFC 7515, 2)."""
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def decode_object(data: bytes) -> dict[str, Any]:
    """Read a JSON object from strict UTF-8, at most 32 levels deep, each name once in each object, all numbers finite.

    Raises ValueError. It refuses a byte order mark, NaN and Infinity (RFC 8259, 6 and 8.1; RFC 7515, 4).
    """
    return _decode(data, _STRICT)


def decode_jwks(data: bytes) -> dict[str, Any]:
    """Read a JWK set. An object with a repeated name becomes `Ambiguous`: one bad key must not spoil the rest."""
    return _decode(data, _TOLERANT)


def _decode(data: bytes, decoder: json.JSONDecoder) -> dict[str, Any]:
    text = data.decode()
    try:
        value = decoder.decode(text)
    except RecursionError:
        raise ValueError("too deep") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")  # noqa: TRY004 - it is the input that is wrong, not the caller's types
    # Brackets inside strings count here, too: they only cost the closer look.
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
    raise ValueError("too deep")


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name occurs twice")
    return value


def _mark_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    return value if len(value) == len(pairs) else Ambiguous(value)


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError("a number is not finite")
    return number


_STRICT = json.JSONDecoder(object_pairs_hook=_each_name_once, parse_float=_finite, parse_constant=_finite)
_TOLERANT = json.JSONDecoder(object_pairs_hook=_mark_repeated_names, parse_float=_finite, parse_constant=_finite)
