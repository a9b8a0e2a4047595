"""/api/v1/admin: what administrators see of people, and may do to their accounts here."""

from functools import lru_cache
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import TypeAdapter
from sqlalchemy import ColumnElement, Table, Text, Uuid, bindparam, collate, func, literal, or_
from sqlmodel import SQLModel, select

from backend.auth import CurrentPrincipal, Principal, forbidden
from backend.database import SYSTEM, Cost, Database, Pool, Row, Statement, Transaction
from backend.resources import pagination
from backend.resources.responses import Answer
from backend.resources.types import Instant
from backend.users import lifecycle
from backend.users.audit import record
from backend.users.caller import REFUSALS, require_role
from backend.users.directory import KnownUser, Suspended, Users
from backend.users.models import AuditSource, UserStatus
from backend.users.schemas import AuditPage, AuditQuery, AuditRead, UserPage, UserQuery, UserRead
from backend.web import openapi
from backend.web.problems import DomainError, NotFound

USERS, AUDIT = (SQLModel.metadata.tables[name] for name in ("users", "audit_log"))
TIME: TypeAdapter[Any] = TypeAdapter(Instant)


def _has(column: ColumnElement[str | None]) -> ColumnElement[bool]:
    wanted, found = (func.casefold(collate(text, "pg_unicode_fast")) for text in (bindparam("q", type_=Text), column))
    return func.strpos(found, wanted) > 0


FILTERS: dict[str, ColumnElement[bool]] = {
    "status": USERS.c.status == bindparam("status"),
    "q": or_(_has(USERS.c.email), _has(USERS.c.name)),
    "user_id": AUDIT.c.user_id == bindparam("user_id", type_=Uuid),
}
# The role whose holders are administrators.
ROLE = "admin"
ANOTHER_ADMINISTRATOR = Statement(
    select(USERS.c.id)
    .where(
        USERS.c.id != bindparam("user_id", type_=Uuid),
        USERS.c.status == UserStatus.active.value,
        literal(ROLE) == func.any(USERS.c.roles),
    )
    .limit(1)
)
READ = [USERS.c[name] for name in UserRead.model_fields]
FIND_BY_EITHER_ID = Statement(
    select(USERS.c.id).where(
        USERS.c.issuer == bindparam("issuer"),
        or_(USERS.c.subject == bindparam("subject"), USERS.c.id == bindparam("user_id", type_=Uuid)),
    )
)
GET = Statement(select(*READ).where(USERS.c.id == bindparam("user_id", type_=Uuid)))


@lru_cache(32)
def listing(table: Table, filters: frozenset[str], *, continued: bool) -> Statement:
    """The newest first."""
    names, time = (UserRead, USERS.c.created_at) if table is USERS else (AuditRead, AUDIT.c.at)
    query = select(*(table.c[name] for name in names.model_fields)).where(*(FILTERS[name] for name in sorted(filters)))
    after = bindparam("after_key", type_=time.type) if continued else None
    cost = Cost.long if filters - {"user_id"} else Cost.short
    return Statement(pagination.keyset(query, time, table.c.id, after=after, descending=True), cost=cost)


class OwnAccount(DomainError):
    """An administrator cannot suspend themself."""

    status, code = 409, "own_account"


class LastAdministrator(DomainError):
    """This is the last active administrator: no other one could reinstate them."""

    status, code = 409, "last_administrator"


class PurgedAccount(DomainError):
    """This account was deleted: it can be neither suspended nor reinstated."""

    status, code = 409, "purged_account"


class Administration:
    """What one administrator does. What changes an account is noted in the transaction that changes it."""

    def __init__(
        self, database: Database, users: Users, actor: KnownUser, principal: Principal, request_id: str
    ) -> None:
        self._database = database
        self._users = users
        self._actor = actor
        self._details = {"impersonated_by": principal.impersonated_by} if principal.impersonated_by else {}
        self._request_id = request_id

    async def list(self, table: Table, query: UserQuery | AuditQuery) -> Row:
        given = query.model_dump(exclude={"limit", "cursor"}, exclude_none=True)
        bound_to = pagination.fingerprint(table.name, "newest", given)
        after = pagination.after(query.cursor, bound_to, TIME)
        statement = listing(table, frozenset(given), continued=bool(after))
        rows = await self._database.rows(statement, **given, **after, limit=query.limit + 1)
        return pagination.page(rows, query.limit, bound_to, "created_at" if table is USERS else "at")

    async def get(self, id: UUID) -> Row:
        row = await self._database.row(GET, user_id=id)
        if row is None:
            raise NotFound
        return row

    async def suspend(self, id: UUID) -> Row:
        if id == self._actor.id:
            raise OwnAccount
        return await self._set(id, "suspend", suspended=True)

    async def reinstate(self, id: UUID) -> Row:
        return await self._set(id, "reinstate", suspended=False)

    async def _set(self, id: UUID, action: str, *, suspended: bool) -> Row:
        async def work(transaction: Transaction) -> Row:
            # The actor's row, too: of administrators who suspend each other at once, the second one is refused.
            rows = await lifecycle.lock_all(transaction, self._actor.id, id)
            row = rows.get(id)
            if refusal := _refusal(rows.get(self._actor.id)):
                # An actor who is still an administrator is another one beside `id`.
                if suspended and _refusal(row) is None and not await transaction.row(ANOTHER_ADMINISTRATOR, user_id=id):
                    raise LastAdministrator
                raise refusal
            if row is None:
                raise NotFound
            after = await _suspend_or_reinstate(transaction, row, suspended=suspended)
            await record(
                transaction,
                source=AuditSource.admin,
                actor=self._actor.id,
                action=action,
                subject=row["subject"],
                user_id=id,
                details=self._details,
                request_id=self._request_id,
            )
            return after

        row = await self._database.transact(work)
        self._users.forget(row["subject"])
        return row


def _refusal(actor: Row | None) -> Exception | None:
    """Why the owner of this row may not act as an administrator, or None."""
    if actor is None or ROLE not in actor["roles"]:
        return forbidden("This needs a role that the account does not have.")
    return None if actor["status"] == UserStatus.active else Suspended()


async def _suspend_or_reinstate(transaction: Transaction, row: Row, *, suspended: bool) -> Row:
    """The row, which is locked, as it is then."""
    if row["status"] == UserStatus.purged:
        raise PurgedAccount
    await lifecycle.set_suspended(transaction, row["id"], suspended)
    after = await transaction.row(GET, user_id=row["id"])
    assert after is not None
    return after


async def reinstate(pool: Pool, issuer: str, user: str) -> Row:
    """What the command line does: reinstate the person whose id, here or at Better Auth, is `user`.

    Needs no administrator. `issuer`: the first of the issuer's names. Raises psycopg.Error, or LookupError if there is
    not exactly one such person, or their account was purged.
    """

    id: UUID | None
    try:
        id = UUID(user)
    except ValueError:
        id = None

    async def work(transaction: Transaction) -> Row:
        found = await transaction.rows(FIND_BY_EITHER_ID, issuer=issuer, subject=user, user_id=id)
        if len(found) > 1:
            raise LookupError("is the id of one user here, and of another one at Better Auth")
        row = await lifecycle.lock(transaction, found[0]["id"]) if found else None
        if row is None:
            raise LookupError("is not the id of a user")
        if row["status"] == UserStatus.purged:
            raise LookupError("was deleted at Better Auth")
        after = await _suspend_or_reinstate(transaction, row, suspended=False)
        await record(transaction, source=AuditSource.cli, action="reinstate", subject=row["subject"], user_id=row["id"])
        return after

    return await Database(pool, SYSTEM).transact(work)


async def administration(request: Request, principal: CurrentPrincipal) -> Administration:
    state = request.state
    return Administration(Database(state.pool, SYSTEM), state.users, state.user, principal, state.request_id)


Administrator = Annotated[Administration, Depends(administration)]

router = APIRouter(prefix="/api/v1/admin", tags=["users"], route_class=require_role(ROLE), responses=REFUSALS)
one, many = Answer(UserRead), Answer(UserRead, many=True)
entries = Answer(AuditRead, many=True)


@router.get("/users", response_model=UserPage, responses=openapi.responses(422, headers={200: pagination.LINK}))
async def list_users(request: Request, admin: Administrator, query: Annotated[UserQuery, Query()]) -> Response:
    """Everybody who has been here, the newest first."""
    page = await admin.list(USERS, query)
    return many(page, headers=pagination.link(request, page["next_cursor"]))


@router.get("/users/{id:uuid}", response_model=UserRead, responses=openapi.responses(404))
async def get_user(admin: Administrator, id: UUID) -> Response:
    """One person."""
    return one(await admin.get(id))


@router.post("/users/{id:uuid}/suspend", response_model=UserRead, responses=openapi.responses(404, 409))
async def suspend_user(admin: Administrator, id: UUID) -> Response:
    """Refuse a person every request, from now on and in every worker. Doing it twice is no error."""
    return one(await admin.suspend(id))


@router.post("/users/{id:uuid}/reinstate", response_model=UserRead, responses=openapi.responses(404, 409))
async def reinstate_user(admin: Administrator, id: UUID) -> Response:
    """End the suspension of a person, who is let in again unless Better Auth has banned them. Twice is no error."""
    return one(await admin.reinstate(id))


@router.get("/audit", response_model=AuditPage, responses=openapi.responses(422, headers={200: pagination.LINK}))
async def list_audit(request: Request, admin: Administrator, query: Annotated[AuditQuery, Query()]) -> Response:
    """What was done to accounts, by whom: the newest first."""
    page = await admin.list(AUDIT, query)
    return entries(page, headers=pagination.link(request, page["next_cursor"]))
