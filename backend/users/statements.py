"""The statements on the caller's own user row. Each is limited to the caller."""

from functools import lru_cache

from sqlalchemy import bindparam, case, func, select, tuple_, update
from sqlmodel import SQLModel, col

from backend.database import Statement
from backend.resources.models import CALLER
from backend.users.models import User
from backend.users.schemas import Me

TABLE = SQLModel.metadata.tables["users"]
# Members of `Me` that come from the token.
FROM_TOKEN = {"issuer", "scopes", "expires_at"}
READ = [col(getattr(User, name)) for name in Me.model_fields if name not in FROM_TOKEN]
is_own = col(User.id) == CALLER

SELECT_ME = Statement(select(*READ).where(is_own))
EXPORT_ME = Statement(select(TABLE).where(TABLE.c.id == CALLER))


@lru_cache(8)
def update_me(columns: frozenset[str]) -> Statement:
    """Set these columns. `updated_at` changes only if one of them does."""
    new = {name: bindparam(name, type_=TABLE.c[name].type) for name in sorted(columns)}
    differs = tuple_(*(TABLE.c[name] for name in new)).is_distinct_from(tuple_(*new.values()))
    updated_at = case((differs, func.now()), else_=col(User.updated_at))
    return Statement(update(User).where(is_own).values({**new, "updated_at": updated_at}).returning(*READ))
