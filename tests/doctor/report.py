"""Runs the doctor and reads its report."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from backend.auth.testing import LocalIssuer
from backend.doctor import Finding, Level, examine
from backend.settings import Settings

SECRET = "hunter2"


class Report(list[Finding]):
    """The findings of one run."""

    @classmethod
    async def of(cls, token: str | None = None, *, clock: Callable[[], float] = time.time, **settings: Any) -> "Report":
        """Run the doctor; asserts that its report contains no secret."""
        found = cls([finding async for finding in examine(Settings(_env_file=None, **settings), token, clock=clock)])
        text = str(found)
        assert SECRET not in text
        assert "\n" not in "".join(map(str, found))
        # Without the end of its signature, a token is useless.
        assert token is None or len(token) < 20 or (token not in text and token[-20:] not in text)
        return found

    def problems(self) -> list[str]:
        """The warnings and failures, in order."""
        return [str(finding) for finding in self if finding.level is not Level.OK]

    def failures(self) -> list[str]:
        return [str(finding) for finding in self if finding.level is Level.FAILURE]

    def on(self, subject: str) -> str:
        """The findings on one subject."""
        return "\n".join(str(finding) for finding in self if finding.subject == subject)


def assert_contains(line: str, words: Sequence[str]) -> None:
    """Assert that a line of the report contains all words."""
    for word in words:
        assert word in line, line


def settings_for(issuer: LocalIssuer, jwks_url: str) -> dict[str, Any]:
    """Settings for a local issuer whose keys are served at `jwks_url`."""
    return {
        "better_auth_url": issuer.url,
        "better_auth_jwks_url": jwks_url,
        "better_auth_audiences": (issuer.audience,),
    }
