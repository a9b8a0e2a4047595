"""Writes the audit log of actions on accounts."""

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

# Only the role `api_system` may insert; no role may update or delete entries.
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
    """Add an entry within the transaction of the action, as SYSTEM. `actor`: the administrator's local id."""
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
