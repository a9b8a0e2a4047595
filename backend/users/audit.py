"""The audit log: what was done to accounts, by whom, in the transaction that did it."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from uuid import UUID

from sqlalchemy import insert
from sqlmodel import col

from backend.database import Statement, Transaction, parameters
from backend.users.models import AuditEntry, AuditSource

_GIVEN = ("actor", "source", "action", "subject", "user_id", "details", "request_id")

# Nobody may read what is written once into it by this statement; `api_system` alone may say it.
RECORD = Statement(insert(AuditEntry).values(parameters(_GIVEN)).returning(col(AuditEntry.id)))


async def record(
    transaction: Transaction,
    *,
    source: AuditSource,
    action: str,
    subject: str,
    user_id: UUID | None = None,
    actor: UUID | None = None,
    details: Mapping[str, Any] = MappingProxyType({}),
    request_id: str | None = None,
) -> None:
    """Note an action of this transaction, which runs as SYSTEM. `actor`: the administrator's id; `details`: JSON."""
    await transaction.rows(
        RECORD,
        actor=actor,
        source=source.value,
        action=action,
        subject=subject,
        user_id=user_id,
        details=json.dumps(dict(details)),
        request_id=request_id,
    )
