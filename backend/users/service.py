"""What a person may see and change of their own row."""

from datetime import UTC, datetime
from functools import lru_cache

from sqlalchemy import Uuid, bindparam, case, func, tuple_, update
from sqlmodel import SQLModel, col, select

from backend.auth import Principal
from backend.database import Database, Row, Statement
from backend.problems import NotFound
from backend.users.models import User
from backend.users.schemas import Me, MeUpdate

# How the token was judged is not in the row.
OF_THE_TOKEN = {"issuer", "scopes", "expires_at"}
READ = [col(getattr(User, name)) for name in Me.model_fields if name not in OF_THE_TOKEN]
OWN = col(User.id) == bindparam("caller", type_=Uuid)
TABLE = SQLModel.metadata.tables["users"]

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

    def _judged(self, row: Row | None) -> Row:
        if row is None:
            raise NotFound("This account was just erased.")
        scopes = self._principal.scopes
        judged = {
            "issuer": self._principal.issuer,
            "scopes": None if scopes is None else sorted(scopes),
            "expires_at": datetime.fromtimestamp(self._principal.expires_at, UTC),
        }
        return {name: judged.get(name, row.get(name)) for name in Me.model_fields}
