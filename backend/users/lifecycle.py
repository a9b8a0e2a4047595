"""Changes of an account's state: suspension, ban, roles, erasure, purge and merge. All functions run as SYSTEM."""

from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import UUID

from backend.database import Row, Transaction
from backend.users import owned_data, system_statements
from backend.users.audit import record
from backend.users.models import AuditSource, UserStatus

# Later than any token's claims, so that none of them fills the profile of a purged account again.
_NO_NEWER_CLAIMS = datetime(9999, 12, 31, tzinfo=UTC)


async def ensure(transaction: Transaction, issuer: str, subject: str) -> Row:
    """Return the locked row of a subject, inserted if missing. `issuer`: the first of the issuer's names."""
    row = await transaction.row(system_statements.ENSURE, issuer=issuer, subject=subject)
    assert row is not None
    return row


async def lock(transaction: Transaction, user_id: UUID) -> Row | None:
    """Return the row or None. The lock blocks changes of the row and inserts of rows that the user owns."""
    return await transaction.row(system_statements.LOCK, user_id=user_id)


async def lock_all(transaction: Transaction, *ids: UUID) -> dict[UUID, Row]:
    """Return the rows found for these ids, locked as by `lock`."""
    return {row["id"]: row for row in await transaction.rows(system_statements.LOCK_ALL, ids=list(ids))}


async def set_suspended(transaction: Transaction, user_id: UUID, suspended: bool) -> None:
    """Set the suspension by this API's administrators. Does not change a purged account."""
    await transaction.rows(system_statements.SET_SUSPENDED, user_id=user_id, suspended=suspended)


async def set_banned(transaction: Transaction, user_id: UUID, banned: bool, at: datetime) -> bool:
    """Set Better Auth's ban as of `at`. Return False if the account is purged or a later event was applied."""
    return await transaction.row(system_statements.SET_BANNED, user_id=user_id, banned=banned, at=at) is not None


async def set_roles(transaction: Transaction, user_id: UUID, roles: Sequence[str], at: datetime) -> bool:
    """Set the roles as of `at`. Return False if the account is purged or has newer claims."""
    return await transaction.row(system_statements.SET_ROLES, user_id=user_id, roles=list(roles), at=at) is not None


async def revoke_tokens(transaction: Transaction, user_id: UUID, at: datetime) -> None:
    """Revoke all tokens issued at or before `at`."""
    await transaction.rows(system_statements.REVOKE_TOKENS, user_id=user_id, at=at)


async def erase(transaction: Transaction, user_id: UUID) -> bool:
    """Delete the account and all its data. Return False if there was none. The next token creates a new account."""
    if await lock(transaction, user_id) is None:
        return False
    await _delete_owned(transaction, user_id)
    await transaction.rows(system_statements.INSERT_ERASURE, user_id=user_id)
    await transaction.rows(system_statements.DELETE, user_id=user_id)
    return True


async def purge(transaction: Transaction, user_id: UUID, at: datetime) -> None:
    """Delete all data of the account for good. An empty row with another id stays and refuses the user."""
    await lock(transaction, user_id)
    await _delete_owned(transaction, user_id)
    await transaction.rows(system_statements.PURGE, user_id=user_id, roles=[], claims_at=_NO_NEWER_CLAIMS, at=at)


async def _delete_owned(transaction: Transaction, user_id: UUID) -> None:
    for statement in owned_data.deletions():
        await transaction.rows(statement, user_id=user_id)


async def merge(transaction: Transaction, old_id: UUID, new_id: UUID) -> bool:
    """Transfer all data of the old account to the new one (see `owned_data.transfers`) and purge the old one.

    Returns False, without any change, if one of the accounts is missing or purged.
    If the old account is suspended or banned, the new one is suspended, and the audit log says why. A ban becomes a
    suspension because Better Auth has not banned the new account, and so will never report the end of that ban.
    """
    rows = await lock_all(transaction, old_id, new_id)
    if len(rows) < 2 or any(row["status"] == UserStatus.purged for row in rows.values()):
        return False
    for statement in (*owned_data.transfers(), system_statements.MERGE_SETTINGS):
        await transaction.rows(statement, old_id=old_id, new_id=new_id)
    old, new = rows[old_id], rows[new_id]
    if old["suspended_here"] or old["banned"]:
        await record(
            transaction,
            source=AuditSource.event,
            action="suspend",
            subject=new["subject"],
            user_id=new_id,
            details={"merged_from": old["subject"]},
        )
    await purge(transaction, old_id, datetime.now(UTC))
    return True
