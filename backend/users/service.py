"""The caller's own account: read, change, export and erase it."""

from datetime import UTC, datetime

from backend.database import Database, Row, Transaction
from backend.users import export, lifecycle
from backend.users.audit import record
from backend.users.caller import Caller
from backend.users.models import AuditSource, UserStatus
from backend.users.provisioning import Suspended, Users
from backend.users.schemas import Me, MeUpdate
from backend.users.statements import EXPORT_ME, SELECT_ME, update_me
from backend.web.problems import NotFound

ERASED = "The account was erased by a concurrent request."


class UserService:
    def __init__(self, caller: Caller) -> None:
        self._database = caller.database
        self._principal = caller.principal

    async def get(self) -> Row:
        return self._with_claims(await self._database.row(SELECT_ME))

    async def update(self, data: MeUpdate) -> Row:
        values = data.model_dump(exclude_unset=True)
        if not values:
            return await self.get()
        return self._with_claims(await self._database.row(update_me(frozenset(values)), **values))

    async def export(self) -> export.Lines:
        """All data of the caller. Raises NotFound or psycopg.Error before the response starts."""
        me = await self._database.row(EXPORT_ME)
        if me is None:
            raise NotFound(ERASED)
        today = datetime.now(UTC).date().isoformat()
        disposition = {"Content-Disposition": f'attachment; filename="export-{today}.ndjson"'}
        return export.Lines(export.lines(self._database, me), headers=disposition)

    def _with_claims(self, row: Row | None) -> Row:
        if row is None:
            raise NotFound(ERASED)
        scopes = self._principal.scopes
        claims = {
            "issuer": self._principal.issuer,
            "scopes": None if scopes is None else sorted(scopes),
            "expires_at": datetime.fromtimestamp(self._principal.expires_at, UTC),
        }
        return {name: claims.get(name, row.get(name)) for name in Me.model_fields}


async def erase(system: Database, users: Users, caller: Caller, request_id: str) -> None:
    """Delete the caller's account and all its data. Erasing twice is not an error.

    Raises Suspended if the account was suspended during the request: erasing would end the suspension.
    """
    principal, user_id = caller.principal, caller.user.id
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

    await system.transact(work, asked_by=caller.user.actor)
    users.invalidate(principal.subject)
