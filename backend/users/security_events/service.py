"""Verifies and applies security event tokens, each of them once."""

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final
from uuid import UUID

from backend.auth import KeySource
from backend.database import SYSTEM, Database, Pool, Transaction
from backend.users import lifecycle
from backend.users.audit import record
from backend.users.models import AuditSource
from backend.users.provisioning import Users
from backend.web.event_quotas import EventQuotas
from backend.web.quotas import Decision
from backend.web.rate_limits import RateLimited

from .schemas import Event, EventType, SecurityEvent
from .statements import INSERT_RECEIVED_EVENT
from .verification import Rejected, SecurityEventVerifier


class SecurityEvents:
    """The receiver of the security event tokens of one Better Auth server.

    `issuers`: the issuer's names; user rows have the first one. `audience`: the required audience. `clock`: seconds
    since 1970. `judged` is called once per token with `taken`, the error code, or `rate_limited`.
    """

    def __init__(
        self,
        pool: Pool,
        users: Users,
        *,
        keys: KeySource,
        issuers: Sequence[str],
        audience: str,
        clock: Callable[[], float] = time.time,
        judged: Callable[[str], None] | None = None,
        quotas: EventQuotas | None = None,
    ) -> None:
        self.quotas: Final = quotas or EventQuotas()
        self._database = Database(pool, SYSTEM)
        self._users = users
        self._issuer = issuers[0]
        self._verifier = SecurityEventVerifier(keys=keys, issuers=issuers, audience=audience, clock=clock)
        self._judged = judged or (lambda _: None)

    async def receive(self, token: bytes, request_id: str, address: str) -> Decision:
        """Verify a token and apply its events; a token whose `jti` was applied before changes nothing.

        `address`: the sender's address, for the quota of rejected tokens. Returns the decision on the issuer's quota.
        Raises Rejected, RateLimited, KeysUnavailable or psycopg.Error. After any but Rejected the sender should retry.
        """
        try:
            event = await self._verifier.verify(token, self.quotas, is_over_quota=self.quotas.is_used_up(address))
            decision = self.quotas.verify({each.action for each in event.events})
            await self._database.transact(lambda transaction: self._apply(transaction, event, request_id))
        except Rejected as rejected:
            self._judged(rejected.err)
            raise
        except RateLimited:
            self._judged("rate_limited")
            raise
        self._judged("taken")
        # The database notifies the other workers. In this one the change holds before the sender gets the response.
        for subject in (event.subject, *(each.into for each in event.events if each.into)):
            self._users.invalidate(subject)
        return decision

    async def _apply(self, transaction: Transaction, event: SecurityEvent, request_id: str) -> None:
        if await transaction.row(INSERT_RECEIVED_EVENT, issuer=self._issuer, jti=event.id) is None:
            return
        user = await lifecycle.ensure(transaction, self._issuer, event.subject)
        for each in event.events:
            done = await self._apply_one(transaction, user["id"], event.at, each)
            await record(
                transaction,
                source=AuditSource.event,
                action=each.action,
                subject=event.subject,
                user_id=user["id"],
                details=each.details | {"jti": event.id, "toe": event.at.isoformat(), "done": done},
                request_id=request_id,
            )

    async def _apply_one(self, transaction: Transaction, user_id: UUID, at: datetime, event: Event) -> bool:
        """Return whether the event had an effect: events may arrive out of order, and newer ones win."""
        match event.type:
            case EventType.account_disabled:
                return await lifecycle.set_banned(transaction, user_id, True, at)
            case EventType.account_enabled:
                return await lifecycle.set_banned(transaction, user_id, False, at)
            case EventType.account_purged:
                await lifecycle.purge(transaction, user_id, at)
            case EventType.session_revoked:
                await lifecycle.revoke_tokens(transaction, user_id, at)
            case EventType.token_claims_change if event.roles is not None:
                return await lifecycle.set_roles(transaction, user_id, event.roles, at)
            case EventType.account_merged if event.into is not None:
                into = await lifecycle.ensure(transaction, self._issuer, event.into)
                return await lifecycle.merge(transaction, user_id, into["id"])
            case _:
                return False
        return True
