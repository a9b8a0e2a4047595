"""Strict types for values from clients: storable in PostgreSQL, with one accepted spelling."""

import re
import unicodedata
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, BeforeValidator


def _storable(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain NUL")
    return value


def _not_blank(value: str) -> str:
    if not any(unicodedata.category(character)[0] in "LMNPS" and character not in _FILLERS for character in value):
        raise ValueError("must not be blank")
    return value


def _digits(value: object) -> object:
    """Reject `1_0` and `1.0`, which pydantic accepts."""
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        raise ValueError("must be a whole number")
    return value


def _flag(value: object) -> object:
    """Reject `1`, `on` and `yes`, which pydantic accepts."""
    if isinstance(value, str) and value not in ("true", "false"):
        raise ValueError("must be true or false")
    return value


def _rfc3339(value: object) -> object:
    """Reject numbers, which pydantic accepts as a time."""
    if value is None or (isinstance(value, str) and _TIME.fullmatch(value)):
        return value
    raise ValueError("must be a time with an offset (RFC 3339), such as 2026-12-01T18:00:00Z")


def _utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie between the years 1 and 9999 in UTC") from None


# Invisible letters and symbols: the Hangul fillers and the empty Braille pattern.
_FILLERS = "\u115f\u1160\u3164\uffa0\u2800"
_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d(:\d\d(\.\d+)?)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)

Storable = AfterValidator(_storable)
NotBlank = AfterValidator(_not_blank)
Digits = Annotated[int, BeforeValidator(_digits)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Instant = Annotated[AwareDatetime, AfterValidator(_utc)]
Time = Annotated[Instant, BeforeValidator(_rfc3339)]
