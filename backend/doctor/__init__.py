"""Walks from the settings to the claims of a token, and names what to change where the way ends."""

import time
from collections.abc import AsyncIterator, Callable

from backend.doctor.addresses import examine_addresses
from backend.doctor.findings import Finding, Level
from backend.doctor.issuer import Issuer, Road
from backend.doctor.stores import examine_account, examine_database, examine_redis
from backend.doctor.tokens import TokenExamination
from backend.settings import Settings

__all__ = ["Finding", "Level", "examine"]


async def examine(
    settings: Settings, token: str | None = None, *, clock: Callable[[], float] = time.time
) -> AsyncIterator[Finding]:
    """Look at everything that a request to the API needs, in the order in which it needs it.

    A token that is given is judged, too, and never shown; a session token goes to Better Auth, and nowhere else.
    `clock` gives seconds since 1970.
    """
    for finding in examine_addresses(settings):
        yield finding
    # Whoever has set one of the two is to change that one.
    setting = "BETTER_AUTH_JWKS_URL" if settings.better_auth_jwks_url else "BETTER_AUTH_URL"
    issuer = Issuer(settings.base_url, setting)
    async for finding in Road(settings, issuer, clock=clock).walk():
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
