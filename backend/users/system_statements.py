"""The statements on any user's row, for SYSTEM: provisioning and the lifecycle of accounts."""

from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import aliased
from sqlmodel import col, select

from backend.database import Statement, parameters
from backend.users import owned_data
from backend.users.models import Erasure, User, UserStatus

PROFILE = ("email", "email_verified", "name", "image", "roles", "is_anonymous")
ROW = [col(getattr(User, name)) for name in User.model_fields]
CACHED = [col(getattr(User, name)) for name in ("id", "status", "banned", "tokens_valid_after", "claims_at", *PROFILE)]
KEY = [col(User.issuer), col(User.subject)]

_TIME = sa.DateTime(timezone=True)
_AT = sa.bindparam("at", type_=_TIME)
_SUSPENDED, _BANNED = (sa.bindparam(name, type_=sa.Boolean) for name in ("suspended", "banned"))
_ROLES = sa.bindparam("roles", type_=sa.ARRAY(sa.Text))
_OTHER = aliased(User)
is_user = col(User.id) == sa.bindparam("user_id", type_=sa.Uuid)
not_purged = col(User.status) != UserStatus.purged.value

FIND = Statement(
    select(*CACHED).where(col(User.issuer) == sa.bindparam("issuer"), col(User.subject) == sa.bindparam("subject"))
)


@lru_cache(64)
def upsert_claims(fields: frozenset[str]) -> Statement:
    """Insert the row, or update these fields from newer claims. Returns no row if nothing had to change.

    `claims_at`: the time of the data. `said_at`: the update happens only if the row's `claims_at` is not later.
    Concurrent first requests are safe: the unique key admits one insert, and the others read its row.
    """
    statement = insert(User).values(parameters(("issuer", "subject", "claims_at", *fields)))
    if not fields:
        return Statement(statement.on_conflict_do_nothing().returning(*CACHED))
    new, names = statement.excluded, sorted(fields)
    old_values, new_values = [col(getattr(User, name)) for name in names], [new[name] for name in names]
    differs = sa.tuple_(*old_values).is_distinct_from(sa.tuple_(*new_values))
    newer = sa.or_(col(User.claims_at).is_(None), col(User.claims_at) <= sa.bindparam("said_at", type_=_TIME))
    changes: dict[str, Any] = {name: new[name] for name in fields}
    changes |= {"claims_at": sa.func.greatest(col(User.claims_at), new.claims_at), "updated_at": sa.func.now()}
    statement = statement.on_conflict_do_update(index_elements=KEY, set_=changes, where=sa.and_(newer, differs))
    return Statement(statement.returning(*CACHED))


_NEW = insert(User).values(issuer=sa.bindparam("issuer"), subject=sa.bindparam("subject"))
# An update without effect locks and returns an existing row.
ENSURE = Statement(
    _NEW.on_conflict_do_update(index_elements=KEY, set_={"issuer": _NEW.excluded.issuer}).returning(*ROW)
)
# Waits for concurrent writers of the user's rows, which hold a lock on the user row, and blocks new ones.
LOCK = Statement(select(*ROW).where(is_user).with_for_update(), writes=True)
# Ordered by id to avoid deadlocks.
LOCK_ALL = Statement(
    select(*ROW)
    .where(col(User.id) == sa.func.any(sa.bindparam("ids", type_=sa.ARRAY(sa.Uuid))))
    .order_by(col(User.id))
    .with_for_update(),
    writes=True,
)


def _touched(column: Any, value: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """The new `updated_at` when a column is set to a value."""
    return sa.case((col(column) != value, sa.func.now()), else_=col(User.updated_at))


# Administrators set `suspended_here`, Better Auth sets `banned`. A trigger derives `status` from both.
SET_SUSPENDED = Statement(
    sa.update(User)
    .where(is_user, not_purged)
    .values(suspended_here=_SUSPENDED, updated_at=_touched(User.suspended_here, _SUSPENDED))
)
SET_BANNED = Statement(
    sa.update(User)
    .where(is_user, not_purged, sa.or_(col(User.banned_at).is_(None), col(User.banned_at) <= _AT))
    .values(banned=_BANNED, banned_at=_AT, updated_at=_touched(User.banned, _BANNED))
    .returning(col(User.id))
)
SET_ROLES = Statement(
    sa.update(User)
    .where(is_user, not_purged, sa.or_(col(User.claims_at).is_(None), col(User.claims_at) <= _AT))
    .values(roles=_ROLES, claims_at=_AT, updated_at=_touched(User.roles, _ROLES))
    .returning(col(User.id))
)
REVOKE_TOKENS = Statement(
    sa.update(User)
    .where(is_user, sa.or_(col(User.tokens_valid_after).is_(None), col(User.tokens_valid_after) < _AT))
    .values(tokens_valid_after=_AT)
)

_PRESERVED = ("roles", "claims_at", "tokens_valid_after", "status_at", "banned_at")
_ERASURE = insert(Erasure).from_select(
    ["issuer", "subject", *_PRESERVED],
    select(*KEY, *(col(getattr(User, name)) for name in _PRESERVED)).where(is_user),
)
INSERT_ERASURE = Statement(
    _ERASURE.on_conflict_do_update(
        index_elements=[col(Erasure.issuer), col(Erasure.subject)],
        set_={**{name: _ERASURE.excluded[name] for name in _PRESERVED}, "erased_at": sa.func.now()},
    )
)
DELETE = Statement(sa.delete(User).where(is_user))
PURGE = Statement(
    sa.update(User)
    .where(is_user)
    .values(
        # With the old id gone, concurrent requests that still use it cannot write anything.
        id=sa.func.uuidv7(),
        roles=_ROLES,
        claims_at=sa.bindparam("claims_at", type_=_TIME),
        status=UserStatus.purged.value,
        status_at=sa.func.greatest(col(User.status_at), _AT),
        updated_at=sa.func.now(),
        **dict.fromkeys(("email", "name", "image", "time_zone", "locale"), sa.null()),
        **dict.fromkeys(("email_verified", "is_anonymous"), sa.false()),
    )
    .returning(col(User.id))
)
# Copies settings that the new account lacks. See `lifecycle.merge` for the suspension.
MERGE_SETTINGS = Statement(
    sa.update(User)
    .where(col(User.id) == owned_data.NEW, col(_OTHER.id) == owned_data.OLD)
    .values(
        {name: sa.func.coalesce(getattr(User, name), getattr(_OTHER, name)) for name in ("time_zone", "locale")}
        | {"suspended_here": sa.or_(col(User.suspended_here), col(_OTHER.suspended_here), col(_OTHER.banned))}
    )
)
