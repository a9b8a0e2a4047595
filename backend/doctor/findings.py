"""What an examination finds: one line each, which says what to change where something is wrong."""

import json
from enum import StrEnum
from typing import Any, NamedTuple

LONGEST = 120


class Level(StrEnum):
    OK = "ok"
    WARNING = "warn"
    FAILURE = "FAIL"


class Finding(NamedTuple):
    """One line of the report. `subject` is what was looked at, `text` what was seen and what to do about it."""

    level: Level
    subject: str
    text: str

    @property
    def holds(self) -> bool:
        """Whether the next step can be taken."""
        return self.level is not Level.FAILURE

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.subject:<11}  {self.text}"


def ok(subject: str, text: str) -> Finding:
    return Finding(Level.OK, subject, text)


def warn(subject: str, text: str) -> Finding:
    """It works, and probably not as it was meant to."""
    return Finding(Level.WARNING, subject, text)


def fail(subject: str, text: str) -> Finding:
    return Finding(Level.FAILURE, subject, text)


def shown(value: Any, longest: int = LONGEST) -> str:
    """What others wrote, as a short part of one line: nothing in it can move a terminal's cursor."""
    text = value if isinstance(value, str) else json.dumps(value)
    line = "".join(character if character.isprintable() else "?" for character in text)
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def listed(values: Any) -> str:
    return ", ".join(map(shown, values)) or "none"
