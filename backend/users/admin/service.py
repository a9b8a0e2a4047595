"""Suspension, reinstatement and listing of users by administrators and the command line."""

from contextlib import suppress
from typing import Any
from uuid import UUID

from pydantic import TypeAdapter
from sqlalchemy import Table

from backend.auth import forbidden
from backend.database import SYSTEM, Database, Pool, Row, Transaction
from backend.resources import pagination
from backend.resources.types import Instant
from backend.users import lifecycle
from backend.users.audit import record
from backend.users.caller import MISSING_ROLE, Caller
from backend.users.models import AuditSource, UserStatus
from backend.users.provisioning import Suspended, Users
from backend.web.problems import DomainError, NotFound

from . import statements
from .schemas import AuditQuery, UserQuery
from .statements import ADMIN_ROLE, SELECT_BY_EITHER_ID, SELECT_OTHER_ADMINISTRATOR, SELECT_USER

TIME: TypeAdapter[Any] = TypeAdapter(Instant)


class OwnAccount(DomainError):
    """Administrators cannot suspend their own account."""

    status, code = 409, "own_account"


class LastAdministrator(DomainError):
    """The last active administrator cannot be suspended."""

    status, code = 409, "last_administrator"


class PurgedAccount(DomainError):
    """The account was deleted. It can be neither suspended nor reinstated."""

    status, code = 409, "purged_account"


class AdminService:
    """The actions of one administrator. A change and its audit entry are committed in one transaction."""

    def __init__(self, system: Database, users: Users, caller: Caller, request_id: str) -> None:
        impersonator = caller.principal.impersonated_by
        self._database = system
        self._users = users
        self._caller_id = caller.user.id
        self._details = {"impersonated_by": impersonator} if impersonator else {}
        self._request_id = request_id

    async def list(self, table: Table, query: UserQuery | AuditQuery) -> Row:
        given = query.model_dump(exclude={"limit", "cursor"}, exclude_none=True)
        bound_to = pagination.fingerprint(table.name, "newest", given)
        after = pagination.after(query.cursor, bound_to, TIME)
        statement = statements.page(table, frozenset(given), continued=bool(after))
        rows = await self._database.rows(statement, **given, **after, limit=query.limit + 1)
        return pagination.page(rows, query.limit, bound_to, "created_at" if table is statements.USERS else "at")

    async def get(self, id: UUID) -> Row:
        row = await self._database.row(SELECT_USER, user_id=id)
        if row is None:
            raise NotFound
        return row

    async def suspend(self, id: UUID) -> Row:
        if id == self._caller_id:
            raise OwnAccount
        return await self._set_suspended(id, "suspend", suspended=True)

    async def reinstate(self, id: UUID) -> Row:
        return await self._set_suspended(id, "reinstate", suspended=False)

    async def _set_suspended(self, id: UUID, action: str, *, suspended: bool) -> Row:
        async def work(transaction: Transaction) -> Row:
            # Locks the actor's row too: if administrators suspend each other concurrently, the second one is refused.
            rows = await lifecycle.lock_all(transaction, self._caller_id, id)
            row = rows.get(id)
            if refusal := _refusal(rows.get(self._caller_id)):
                # The actor has lost the role meanwhile, so the user may now be the last active administrator.
                is_administrator = _refusal(row) is None
                if suspended and is_administrator and not await transaction.row(SELECT_OTHER_ADMINISTRATOR, user_id=id):
                    raise LastAdministrator
                raise refusal
            if row is None:
                raise NotFound
            after = await _suspend_or_reinstate(transaction, row, suspended=suspended)
            await record(
                transaction,
                source=AuditSource.admin,
                actor=self._caller_id,
                action=action,
                subject=row["subject"],
                user_id=id,
                details=self._details,
                request_id=self._request_id,
            )
            return after

        row = await self._database.transact(work)
        self._users.invalidate(row["subject"])
        return row


def _refusal(row: Row | None) -> Exception | None:
    """The reason why the user of this row is not an active administrator, or None."""
    if row is None or ADMIN_ROLE not in row["roles"]:
        return forbidden(MISSING_ROLE)
    return None if row["status"] == UserStatus.active else Suspended()


async def _suspend_or_reinstate(transaction: Transaction, row: Row, *, suspended: bool) -> Row:
    """Return the changed row. The given row must be locked."""
    if row["status"] == UserStatus.purged:
        raise PurgedAccount
    await lifecycle.set_suspended(transaction, row["id"], suspended)
    after = await transaction.row(SELECT_USER, user_id=row["id"])
    assert after is not None
    return after


async def reinstate(pool: Pool, issuer: str, user: str) -> Row:
    """Reinstate the user whose local id or subject is `user`, without an administrator. For the command line.

    `issuer`: the first of the issuer's names. Raises psycopg.Error, or LookupError if `user` matches no user or two of
    them, or if the account was purged.
    """
    id: UUID | None = None
    with suppress(ValueError):
        id = UUID(user)

    async def work(transaction: Transaction) -> Row:
        found = await transaction.rows(SELECT_BY_EITHER_ID, issuer=issuer, subject=user, user_id=id)
        if len(found) > 1:
            raise LookupError("is ambiguous: the local id of one user and the Better Auth id of another")
        row = await lifecycle.lock(transaction, found[0]["id"]) if found else None
        if row is None:
            raise LookupError("is not the id of a user")
        if row["status"] == UserStatus.purged:
            raise LookupError("was deleted at Better Auth")
        after = await _suspend_or_reinstate(transaction, row, suspended=False)
        await record(transaction, source=AuditSource.cli, action="reinstate", subject=row["subject"], user_id=row["id"])
        return after

    return await Database(pool, SYSTEM).transact(work)
