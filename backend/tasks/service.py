"""One user's tasks. Every statement starts from `OWNED`, so none can reach another's."""

from datetime import datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

from pydantic import AwareDatetime, TypeAdapter
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Integer,
    Text,
    Uuid,
    bindparam,
    case,
    cast,
    func,
    insert,
    or_,
    tuple_,
    update,
)
from sqlmodel import SQLModel, col, select

from backend import pagination
from backend.answers import Versions
from backend.database import Database, Row, Statement, parameters
from backend.problems import NotFound, StaleVersion
from backend.tasks.models import Status, Task
from backend.tasks.schemas import TaskCreate, TaskQuery, TaskRead, TaskUpdate

TABLE = SQLModel.metadata.tables["tasks"]
COMPUTED: dict[str, ColumnElement[Any]] = {
    "is_overdue": func.coalesce(col(Task.due_at) < func.now(), False) & (col(Task.status) != Status.done.value),
    "priority": cast(col(Task.priority), Text),
}
READ = [COMPUTED[name].label(name) if name in COMPUTED else col(getattr(Task, name)) for name in TaskRead.model_fields]

CALLER = bindparam("caller", type_=Uuid)
OWNED = (col(Task.owner_id) == CALLER, col(Task.deleted_at).is_(None))
THIS = (*OWNED, col(Task.id) == bindparam("task_id"))

FILTERS: dict[str, ColumnElement[bool]] = {"status": col(Task.status) == bindparam("status")}
SORT_KEYS: dict[str, TypeAdapter[Any]] = {"created_at": TypeAdapter(AwareDatetime)}


def completed(status: Any, before: Any) -> ColumnElement[datetime | None]:
    """`completed_at` follows the status: set when it becomes done, cleared when it no longer is."""
    return case((status == Status.done.value, func.coalesce(before, func.now())))


@lru_cache(256)
def listing(filters: frozenset[str], sort: str, continued: bool) -> Statement:
    """The statement for one combination of filters and sort; their values come with each request."""
    key, descending = sort.removeprefix("-"), sort.startswith("-")
    order = [col(getattr(Task, name)) for name in (key, "id")]
    query = select(*READ).where(*OWNED, *(FILTERS[name] for name in sorted(filters)))
    if continued:
        here, end = tuple_(*order), tuple_(bindparam("after_key"), bindparam("after_id"))
        query = query.where(here < end if descending else here > end)
    query = query.order_by(*(column.desc() if descending else column for column in order))
    return Statement(query.limit(bindparam("limit", type_=Integer)))


@lru_cache(256)
def change(columns: frozenset[str]) -> Statement:
    """Set these columns, if the version is one of `if_match`. Equal values make no new version."""
    names = sorted(columns)
    new = {name: bindparam(name, type_=TABLE.c[name].type) for name in names}
    differs = tuple_(*(col(getattr(Task, name)) for name in names)).is_distinct_from(tuple_(*new.values()))
    values: dict[str, Any] = {
        **new,
        "version": col(Task.version) + case((differs, 1), else_=0),
        # Whoever waited for a lock may have begun before the one who held it.
        "updated_at": case((differs, func.greatest(col(Task.updated_at), func.now())), else_=col(Task.updated_at)),
    }
    if "status" in new:
        values["completed_at"] = completed(new["status"], col(Task.completed_at))
    return Statement(update(Task).where(*THIS, MATCHES).values(values).returning(*READ))


_VERSIONS = bindparam("if_match", type_=ARRAY(Integer))
MATCHES = or_(_VERSIONS.is_(None), col(Task.version) == func.any(_VERSIONS))

GET = Statement(select(*READ).where(*THIS))
ADD = Statement(
    insert(Task)
    .values(
        **parameters(TaskCreate.model_fields),
        owner_id=CALLER,
        completed_at=completed(bindparam("status", type_=Text), None),
    )
    .returning(*READ)
)
REMOVE = Statement(
    update(Task)
    .where(*THIS, MATCHES)
    .values(deleted_at=func.now(), updated_at=func.now(), version=col(Task.version) + 1)
    .returning(col(Task.id))
)
EXISTS = Statement(
    select(col(Task.deleted_at)).where(col(Task.owner_id) == CALLER, col(Task.id) == bindparam("task_id"))
)


class TaskService:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(self, query: TaskQuery) -> Row:
        filters = query.model_dump(include=set(FILTERS), exclude_none=True)
        bound_to = pagination.fingerprint("tasks", query.sort, filters)
        key = query.sort.removeprefix("-")
        values = dict(filters)
        if query.cursor is not None:
            values["after_key"], values["after_id"] = pagination.decode(query.cursor, bound_to, SORT_KEYS[key])
        statement = listing(frozenset(filters), query.sort, query.cursor is not None)
        rows = await self._database.rows(statement, **values, limit=query.limit + 1)
        return pagination.page(rows, query.limit, bound_to, key)

    async def create(self, data: TaskCreate) -> Row:
        (row,) = await self._database.rows(ADD, **data.model_dump())
        return row

    async def get(self, id: UUID) -> Row:
        row = await self._database.row(GET, task_id=id)
        if row is None:
            raise NotFound
        return row

    async def update(self, id: UUID, data: TaskUpdate, *, if_match: Versions | None) -> Row:
        """Only the members that were sent. 404 if there is no such task, then 412 if its version is another."""
        values = data.model_dump(exclude_unset=True)
        if not values:
            row = await self.get(id)
            if if_match is not None and row["version"] not in if_match:
                raise StaleVersion
            return row
        changed = await self._database.row(change(frozenset(values)), **values, task_id=id, if_match=if_match)
        if changed is None:
            await self.get(id)  # a 404 if it is not there at all
            raise StaleVersion
        return changed

    async def delete(self, id: UUID, *, if_match: Versions | None) -> None:
        """Into the bin. Deleting what is there already changes nothing, and is no error."""
        if await self._database.row(REMOVE, task_id=id, if_match=if_match) is None:
            row = await self._database.row(EXISTS, task_id=id)
            if row is None:
                raise NotFound
            if row["deleted_at"] is None:
                raise StaleVersion
