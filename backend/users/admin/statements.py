"""The statements of the administration: lists of users and of audit entries, newest first."""

from functools import lru_cache

from sqlalchemy import ColumnElement, Table, Text, Uuid, bindparam, collate, func, literal, or_
from sqlmodel import SQLModel, select

from backend.database import Cost, Statement
from backend.resources import pagination
from backend.users.models import UserStatus

from .schemas import AuditRead, UserRead

ADMIN_ROLE = "admin"
USERS, AUDIT = (SQLModel.metadata.tables[name] for name in ("users", "audit_log"))


def _contains(column: ColumnElement[str | None]) -> ColumnElement[bool]:
    """Whether the column contains the parameter `q`, ignoring case."""
    wanted, found = (func.casefold(collate(text, "pg_unicode_fast")) for text in (bindparam("q", type_=Text), column))
    return func.strpos(found, wanted) > 0


_USER_ID = bindparam("user_id", type_=Uuid)
FILTERS: dict[str, ColumnElement[bool]] = {
    "status": USERS.c.status == bindparam("status"),
    "q": or_(_contains(USERS.c.email), _contains(USERS.c.name)),
    "user_id": AUDIT.c.user_id == _USER_ID,
}
SELECT_OTHER_ADMINISTRATOR = Statement(
    select(USERS.c.id)
    .where(USERS.c.id != _USER_ID, USERS.c.status == UserStatus.active.value)
    .where(literal(ADMIN_ROLE) == func.any(USERS.c.roles))
    .limit(1)
)
SELECT_BY_EITHER_ID = Statement(
    select(USERS.c.id)
    .where(USERS.c.issuer == bindparam("issuer"))
    .where(or_(USERS.c.subject == bindparam("subject"), USERS.c.id == _USER_ID))
)
SELECT_USER = Statement(select(*(USERS.c[name] for name in UserRead.model_fields)).where(USERS.c.id == _USER_ID))


@lru_cache(32)
def page(table: Table, filters: frozenset[str], *, continued: bool) -> Statement:
    """A page of `USERS` or `AUDIT`, newest first. `continued`: after the key of a cursor."""
    names, time = (UserRead, USERS.c.created_at) if table is USERS else (AuditRead, AUDIT.c.at)
    query = select(*(table.c[name] for name in names.model_fields)).where(*(FILTERS[name] for name in sorted(filters)))
    after = bindparam("after_key", type_=time.type) if continued else None
    cost = Cost.long if filters - {"user_id"} else Cost.short
    return Statement(pagination.keyset(query, time, table.c.id, after=after, descending=True), cost=cost)
