"""What may happen to an account: its row and everything that it owns, in the transaction of whoever decides it.

All of it runs as SYSTEM.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Boolean,
    DateTime,
    Text,
    Uuid,
    bindparam,
    case,
    delete,
    false,
    func,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import aliased
from sqlmodel import col

from backend.database import Row, Statement, Transaction
from backend.users import belongings
from backend.users.audit import record
from backend.users.models import AuditSource, Erasure, User, UserStatus

# As old as any claim can be: no token fills the profile of a purged account again.
_NO_NEWER_CLAIMS = datetime(9999, 12, 31, tzinfo=UTC)

ROW = [col(getattr(User, name)) for name in User.model_fields]
THIS = col(User.id) == bindparam("user_id", type_=Uuid)
KEPT = (THIS, col(User.status) != UserStatus.purged.value)
AT = bindparam("at", type_=DateTime(timezone=True))


_NEW = insert(User).values(issuer=bindparam("issuer"), subject=bindparam("subject"))
ENSURE = Statement(
    # A write that changes nothing locks the row that is there, and returns it.
    _NEW.on_conflict_do_update(
        index_elements=[col(User.issuer), col(User.subject)], set_={"issuer": _NEW.excluded.issuer}
    ).returning(*ROW)
)
# Whoever writes in the name of a user holds a lock on their row that this one waits for, and keeps waiting.
LOCK = Statement(select(*ROW).where(THIS).with_for_update(), writes=True)

# Administrators of this API and Better Auth each set a column of their own; a trigger derives `status` from both.
_SUSPENDED = bindparam("suspended", type_=Boolean)
SET_SUSPENDED = Statement(
    update(User)
    .where(*KEPT)
    .values(
        suspended_here=_SUSPENDED,
        updated_at=case((col(User.suspended_here) != _SUSPENDED, func.now()), else_=col(User.updated_at)),
    )
)
_BANNED = bindparam("banned", type_=Boolean)
SET_BANNED = Statement(
    update(User)
    .where(*KEPT, or_(col(User.banned_at).is_(None), col(User.banned_at) <= AT))
    .values(
        banned=_BANNED,
        banned_at=AT,
        updated_at=case((col(User.banned) != _BANNED, func.now()), else_=col(User.updated_at)),
    )
    .returning(col(User.id))
)
_ROLES = bindparam("roles", type_=ARRAY(Text))
SET_ROLES = Statement(
    update(User)
    .where(*KEPT, or_(col(User.claims_at).is_(None), col(User.claims_at) <= AT))
    .values(
        roles=_ROLES,
        claims_at=AT,
        updated_at=case((col(User.roles) != _ROLES, func.now()), else_=col(User.updated_at)),
    )
    .returning(col(User.id))
)
REVOKE_TOKENS = Statement(
    update(User)
    .where(THIS, or_(col(User.tokens_valid_after).is_(None), col(User.tokens_valid_after) < AT))
    .values(tokens_valid_after=AT)
)

_REMEMBERED = ("roles", "claims_at", "tokens_valid_after", "status_at", "banned_at")
_ERASURE = insert(Erasure).from_select(
    ["issuer", "subject", *_REMEMBERED],
    select(col(User.issuer), col(User.subject), *(col(getattr(User, name)) for name in _REMEMBERED)).where(THIS),
)
# In one order, so that two transactions that lock the same rows wait for the same row first.
LOCK_ALL = Statement(
    select(*ROW)
    .where(col(User.id) == func.any(bindparam("ids", type_=ARRAY(Uuid))))
    .order_by(col(User.id))
    .with_for_update(),
    writes=True,
)
_OTHER = aliased(User)
HAND_ON = Statement(
    update(User)
    .where(col(User.id) == belongings.NEW, col(_OTHER.id) == belongings.OLD)
    .values(
        {name: func.coalesce(getattr(User, name), getattr(_OTHER, name)) for name in ("time_zone", "locale")}
        | {"suspended_here": or_(col(User.suspended_here), col(_OTHER.suspended_here), col(_OTHER.banned))}
    )
)
REMEMBER = Statement(
    _ERASURE.on_conflict_do_update(
        index_elements=[col(Erasure.issuer), col(Erasure.subject)],
        set_={**{name: _ERASURE.excluded[name] for name in _REMEMBERED}, "erased_at": func.now()},
    )
)
ERASE = Statement(delete(User).where(THIS))
BURY = Statement(
    update(User)
    .where(KEPT[0])
    .values(
        # Who still knows the old id can write nothing in its name: no row has it any more.
        id=func.uuidv7(),
        email=null(),
        email_verified=false(),
        name=null(),
        image=null(),
        roles=bindparam("roles", type_=ARRAY(Text)),
        is_anonymous=false(),
        claims_at=bindparam("claims_at", type_=DateTime(timezone=True)),
        status=UserStatus.purged.value,
        status_at=func.greatest(col(User.status_at), AT),
        time_zone=null(),
        locale=null(),
        updated_at=func.now(),
    )
    .returning(col(User.id))
)


async def ensure(transaction: Transaction, issuer: str, subject: str) -> Row:
    """The row of a subject, locked; made if there is none. `issuer`: the first of the issuer's names."""
    row = await transaction.row(ENSURE, issuer=issuer, subject=subject)
    assert row is not None
    return row


async def lock(transaction: Transaction, user_id: UUID) -> Row | None:
    """The row, locked against every change and against new rows in its name, or None."""
    return await transaction.row(LOCK, user_id=user_id)


async def lock_all(transaction: Transaction, *ids: UUID) -> dict[UUID, Row]:
    """The rows that there are of these ids, locked like that of `lock`."""
    return {row["id"]: row for row in await transaction.rows(LOCK_ALL, ids=list(ids))}


async def set_suspended(transaction: Transaction, user_id: UUID, suspended: bool) -> None:
    """What this API's administrators say: whether the person is suspended. A purged account stays as it is."""
    await transaction.rows(SET_SUSPENDED, user_id=user_id, suspended=suspended)


async def set_banned(transaction: Transaction, user_id: UUID, banned: bool, at: datetime) -> bool:
    """What Better Auth says as of `at`; whether that holds now: not if it is purged, or said otherwise as of later."""
    return await transaction.row(SET_BANNED, user_id=user_id, banned=banned, at=at) is not None


async def set_roles(transaction: Transaction, user_id: UUID, roles: Sequence[str], at: datetime) -> bool:
    """The roles as of `at`; whether they hold now: not if it is purged, or newer claims are known."""
    return await transaction.row(SET_ROLES, user_id=user_id, roles=list(roles), at=at) is not None


async def revoke_tokens(transaction: Transaction, user_id: UUID, at: datetime) -> None:
    """Tokens issued up to `at` are refused."""
    await transaction.rows(REVOKE_TOKENS, user_id=user_id, at=at)


async def erase(transaction: Transaction, user_id: UUID) -> bool:
    """Everything of the account goes, its row, too; whether there was one. The next token makes a fresh one."""
    if await lock(transaction, user_id) is None:
        return False
    await _clear(transaction, user_id)
    await transaction.rows(REMEMBER, user_id=user_id)
    await transaction.rows(ERASE, user_id=user_id)
    return True


async def purge(transaction: Transaction, user_id: UUID, at: datetime) -> None:
    """Everything of the account goes, for good: a bare row stays, under another id, that refuses the person."""
    await lock(transaction, user_id)
    await _clear(transaction, user_id)
    await transaction.rows(BURY, user_id=user_id, roles=[], claims_at=_NO_NEWER_CLAIMS, at=at)


async def _clear(transaction: Transaction, user_id: UUID) -> None:
    for statement in belongings.clearing():
        await transaction.rows(statement, user_id=user_id)


async def merge(transaction: Transaction, old_id: UUID, new_id: UUID) -> bool:
    """Everything of the old account becomes the new one's, as `belongings.moving` says; the old one is purged.

    Whether it was done: a purged account neither gives nor takes, and what it does not take stays where it is.

    If the old account is suspended or banned, the new one is suspended, and the audit log says why. A ban becomes a
    suspension because Better Auth has not banned the new account, and so will never report the end of that ban.
    """
    rows = await lock_all(transaction, old_id, new_id)
    if len(rows) < 2 or any(row["status"] == UserStatus.purged for row in rows.values()):
        return False
    for statement in (*belongings.moving(), HAND_ON):
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
