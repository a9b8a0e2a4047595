"""Runs the doctor with given settings and reads its report."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from backend.auth.testing import LocalIssuer
from backend.doctor import Finding, Level, examine
from backend.settings import Settings

SECRET = "hunter2"


class Report(list[Finding]):
    """The findings; asserts that they contain no secret."""

    @classmethod
    async def of(cls, token: str | None = None, *, clock: Callable[[], float] = time.time, **settings: Any) -> "Report":
        found = cls([finding async for finding in examine(Settings(_env_file=None, **settings), token, clock=clock)])
        text = str(found)
        assert SECRET not in text
        assert "\n" not in "".join(map(str, found))
        # Neither the whole token nor its signature's end, without which it is useless.
        assert token is None or len(token) < 20 or (token not in text and token[-20:] not in text)
        return found

    def wrong(self) -> list[str]:
        """The warnings and failures, in their order."""
        return [str(finding) for finding in self if finding.level is not Level.OK]

    def failures(self) -> list[str]:
        return [str(finding) for finding in self if finding.level is Level.FAILURE]

    def on(self, subject: str) -> str:
        """The findings on one subject."""
        return "\n".join(str(finding) for finding in self if finding.subject == subject)


def names(line: str, words: Sequence[str]) -> None:
    """Assert that the line contains all of these."""
    for word in words:
        assert word in line, line


def at(issuer: LocalIssuer, jwks_url: str) -> dict[str, Any]:
    """Settings that trust a local issuer whose keys are at another address."""
    return {
        "better_auth_url": issuer.url,
        "better_auth_jwks_url": jwks_url,
        "better_auth_audiences": (issuer.audience,),
    }
