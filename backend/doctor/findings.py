"""The findings of an examination, one line each, with the remedy where something is wrong."""

import json
from enum import StrEnum
from typing import Any, NamedTuple

LONGEST = 120


class Level(StrEnum):
    OK = "ok"
    WARNING = "warn"
    FAILURE = "FAIL"


class Finding(NamedTuple):
    """One line of the report: the subject examined, the observation and the remedy."""

    level: Level
    subject: str
    text: str

    @property
    def holds(self) -> bool:
        """Whether the examination can go on to the next step."""
        return self.level is not Level.FAILURE

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.subject:<11}  {self.text}"


def ok(subject: str, text: str) -> Finding:
    return Finding(Level.OK, subject, text)


def warn(subject: str, text: str) -> Finding:
    """It works, but probably not as intended."""
    return Finding(Level.WARNING, subject, text)


def fail(subject: str, text: str) -> Finding:
    return Finding(Level.FAILURE, subject, text)


def shown(value: Any, longest: int = LONGEST) -> str:
    """Untrusted text, shortened and without control characters, so that it cannot manipulate a terminal."""
    text = value if isinstance(value, str) else json.dumps(value)
    line = "".join(character if character.isprintable() else "?" for character in text)
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def listed(values: Any) -> str:
    return ", ".join(map(shown, values)) or "none"
