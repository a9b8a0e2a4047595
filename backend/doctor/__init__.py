"""Examines what a request needs, from the settings to a token's claims, and names the remedy where something fails."""

import time
from collections.abc import AsyncIterator, Callable
from typing import TextIO

from backend.doctor.addresses import examine_addresses
from backend.doctor.findings import Finding, Level
from backend.doctor.issuer import Issuer, IssuerExamination
from backend.doctor.stores import examine_account, examine_database, examine_redis
from backend.doctor.tokens import TokenExamination
from backend.settings import Settings

__all__ = ["Finding", "Level", "examine", "report"]


async def report(settings: Settings, token: str | None, output: TextIO) -> bool:
    """Write the findings of `examine` in lines. Return whether all hold."""
    succeeded = True
    async for finding in examine(settings, token):
        output.write(f"{finding}\n")
        output.flush()
        succeeded = succeeded and finding.holds
    return succeeded


async def examine(
    settings: Settings, token: str | None = None, *, clock: Callable[[], float] = time.time
) -> AsyncIterator[Finding]:
    """Examine everything that a request needs, in the order in which it is used.

    token: examined, too, and never shown. A session token is sent to Better Auth only.
    clock: returns seconds since 1970.
    """
    for finding in examine_addresses(settings):
        yield finding
    # The advice names the setting in use.
    setting = "BETTER_AUTH_JWKS_URL" if settings.better_auth_jwks_url else "BETTER_AUTH_URL"
    issuer = Issuer(settings.base_url, setting)
    async for finding in IssuerExamination(settings, issuer, clock=clock).findings():
        yield finding
    async for finding in examine_database(settings):
        yield finding
    async for finding in examine_redis(settings):
        yield finding
    if token is not None:
        examination = TokenExamination(token, settings, issuer, clock=clock)
        async for finding in examination.findings():
            yield finding
        if examination.principal is not None:
            async for finding in examine_account(settings, examination.principal):
                yield finding
