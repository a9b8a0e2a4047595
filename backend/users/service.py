"""What a person may see and change of their own row."""

from datetime import UTC, datetime
from functools import lru_cache
from uuid import UUID

from sqlalchemy import Uuid, bindparam, case, func, tuple_, update
from sqlmodel import SQLModel, col, select

from backend.auth import Principal
from backend.database import Actor, Database, Row, Statement, Transaction
from backend.users import export, lifecycle
from backend.users.audit import record
from backend.users.directory import Suspended, Users
from backend.users.models import AuditSource, User, UserStatus
from backend.users.schemas import Me, MeUpdate
from backend.web.problems import NotFound

# How the token was judged is not in the row.
OF_THE_TOKEN = {"issuer", "scopes", "expires_at"}
READ = [col(getattr(User, name)) for name in Me.model_fields if name not in OF_THE_TOKEN]
OWN = col(User.id) == bindparam("caller", type_=Uuid)
TABLE = SQLModel.metadata.tables["users"]

ERASED = "This account was just erased."

GET = Statement(select(*READ).where(OWN))


@lru_cache(8)
def change(columns: frozenset[str]) -> Statement:
    """Set these columns. `updated_at` tells of a change, so it stays where nothing is changed."""
    new = {name: bindparam(name, type_=TABLE.c[name].type) for name in sorted(columns)}
    differs = tuple_(*(TABLE.c[name] for name in new)).is_distinct_from(tuple_(*new.values()))
    updated_at = case((differs, func.now()), else_=col(User.updated_at))
    return Statement(update(User).where(OWN).values({**new, "updated_at": updated_at}).returning(*READ))


class UserService:
    def __init__(self, database: Database, principal: Principal) -> None:
        self._database = database
        self._principal = principal

    async def get(self) -> Row:
        return self._judged(await self._database.row(GET))

    async def update(self, data: MeUpdate) -> Row:
        values = data.model_dump(exclude_unset=True)
        if not values:
            return await self.get()
        return self._judged(await self._database.row(change(frozenset(values)), **values))

    async def export(self) -> export.Lines:
        """Everything of the caller. Raises before anything is sent, or not at all while the database is there."""
        me = await self._database.row(export.ME)
        if me is None:
            raise NotFound(ERASED)
        today = datetime.now(UTC).date().isoformat()
        disposition = {"Content-Disposition": f'attachment; filename="export-{today}.ndjson"'}
        return export.Lines(export.lines(self._database, me), headers=disposition)

    def _judged(self, row: Row | None) -> Row:
        if row is None:
            raise NotFound(ERASED)
        scopes = self._principal.scopes
        judged = {
            "issuer": self._principal.issuer,
            "scopes": None if scopes is None else sorted(scopes),
            "expires_at": datetime.fromtimestamp(self._principal.expires_at, UTC),
        }
        return {name: judged.get(name, row.get(name)) for name in Me.model_fields}


async def erase(system: Database, users: Users, principal: Principal, user_id: UUID, request_id: str) -> None:
    """Erase everything of the caller. Doing it twice is no error.

    Raises Suspended when that was said of them while the request was under way: an erasure would let them in again.
    """
    details = {"impersonated_by": principal.impersonated_by} if principal.impersonated_by else {}

    async def work(transaction: Transaction) -> None:
        row = await lifecycle.lock(transaction, user_id)
        if row is not None and row["status"] != UserStatus.active:
            raise Suspended
        if await lifecycle.erase(transaction, user_id):
            await record(
                transaction,
                source=AuditSource.self,
                action="erase",
                subject=principal.subject,
                user_id=user_id,
                details=details,
                request_id=request_id,
            )

    await system.transact(work, asked_by=Actor.user(user_id))
    users.forget(principal.subject)
