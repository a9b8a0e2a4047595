"""One user's tasks. Every statement starts from `OWNED`, so none can reach another's."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any
from uuid import UUID

from pydantic import TypeAdapter
from sqlalchemy import (
    ARRAY,
    Boolean,
    ColumnElement,
    Integer,
    Text,
    Uuid,
    and_,
    bindparam,
    case,
    collate,
    func,
    insert,
    literal_column,
    null,
    or_,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlmodel import SQLModel, col, select

from backend import pagination
from backend.answers import Versions
from backend.database import Database, Row, Statement, parameters
from backend.problems import NotFound, StaleVersion
from backend.tasks.models import Priority, Status, Task, sort_key
from backend.tasks.schemas import Instant, Storable, TaskCreate, TaskQuery, TaskRead, TaskUpdate

TABLE = SQLModel.metadata.tables["tasks"]
DUE_OR_NEVER, DUE_OR_ALWAYS = (sort_key(sort, TABLE.c.due_at) for sort in ("due_at", "-due_at"))
COMPUTED = {"is_overdue": (func.now() > DUE_OR_NEVER) & (col(Task.status) != Status.done.value)}
READ = [COMPUTED[name].label(name) if name in COMPUTED else col(getattr(Task, name)) for name in TaskRead.model_fields]

# How long a deleted task can be restored.
RETENTION: ColumnElement[timedelta] = literal_column("interval '30 days'")

CALLER = bindparam("caller", type_=Uuid)
MINE = col(Task.owner_id) == CALLER
OWNED = (MINE, col(Task.deleted_at).is_(None))
BIN = (MINE, col(Task.deleted_at) > func.now() - RETENTION)
KEPT = (MINE, or_(col(Task.deleted_at).is_(None), col(Task.deleted_at) > func.now() - RETENTION))
THIS = (*OWNED, col(Task.id) == bindparam("task_id"))

# A subquery without a table is worked out once, not once a row.
SEARCHED = select(func.casefold(collate(bindparam("q", type_=Text), "pg_unicode_fast"))).scalar_subquery()
FILTERS: dict[str, ColumnElement[bool]] = {
    "status": col(Task.status) == bindparam("status"),
    "priority": col(Task.priority) == bindparam("priority"),
    "due_before": bindparam("due_before", type_=TABLE.c.due_at.type) > DUE_OR_NEVER,
    "due_after": bindparam("due_after", type_=TABLE.c.due_at.type) < DUE_OR_ALWAYS,
    "overdue": COMPUTED["is_overdue"] == bindparam("overdue", type_=Boolean),
    "q": func.strpos(col(Task.folded), SEARCHED) > 0,
}
CURSOR_KEYS: dict[str, TypeAdapter[Any]] = {
    "created_at": TypeAdapter(Instant),
    "updated_at": TypeAdapter(Instant),
    "due_at": TypeAdapter(Instant | None),
    "priority": TypeAdapter(Priority),
    "title": TypeAdapter(Annotated[str, Storable]),
}


def completed(status: Any, before: Any) -> ColumnElement[datetime | None]:
    """`completed_at` follows the status: set when it becomes done, cleared when it no longer is."""
    return case((status == Status.done.value, func.coalesce(before, func.now())))


@lru_cache(256)
def listing(filters: frozenset[str], sort: str, *, continued: bool, deleted: bool, counted: bool) -> Statement:
    """The statement for one combination of filters and sort; their values come with each request.

    `counted`: each row carries the `total`; where there is none to carry it, one comes that is empty otherwise.
    """
    name, descending = sort.removeprefix("-"), sort.startswith("-")
    column, id = TABLE.c[name], TABLE.c.id
    key = sort_key(sort, column)
    wanted = (*(BIN if deleted else OWNED), *(FILTERS[name] for name in sorted(filters)))

    def ordered(*by: ColumnElement[Any]) -> Iterator[ColumnElement[Any]]:
        return (column.desc() if descending else column for column in by)

    query = select(*READ, *([key.label("sort_key")] if counted else [])).where(*wanted)
    if continued:
        here = tuple_(key, id)
        end = tuple_(sort_key(sort, bindparam("after_key", type_=column.type)), bindparam("after_id", type_=Uuid))
        query = query.where(here < end if descending else here > end)
    query = query.order_by(*ordered(key, id)).limit(bindparam("limit", type_=Integer))
    if not counted:
        return Statement(query)
    page, count = query.subquery(), select(func.count().label("total")).where(*wanted).subquery()
    fields = [page.c[name] for name in TaskRead.model_fields]
    both = select(count.c.total, *fields).select_from(count.outerjoin(page, true()))
    return Statement(both.order_by(*ordered(page.c.sort_key, page.c.id)))


@lru_cache(256)
def change(columns: frozenset[str], *, excluding: bool = False) -> Statement:
    """Set these columns, if the version is one of `if_match`. Equal values make no new version.

    `excluding`: nor may the version be one of `if_none_match`.
    """
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
    conditions = (*THIS, MATCHES, *([EXCLUDED] if excluding else []))
    return Statement(update(Task).where(*conditions).values(values).returning(*READ))


_VERSIONS = bindparam("if_match", type_=ARRAY(Integer))
MATCHES = or_(_VERSIONS.is_(None), col(Task.version) == func.any(_VERSIONS))
# Null forbids any version: the comparison is null, which is not true.
EXCLUDED = col(Task.version) != func.all(bindparam("if_none_match", type_=ARRAY(Integer)))

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


def put() -> Statement:
    """Make the task, or replace it unless `if_none_match` has its version (null: any); `created` says which.

    One whose time in the bin is over is not there any more, whether the purge has run or not: it is made anew. One that
    can still be restored stays where it is.
    """
    statement = postgresql.insert(Task).values(
        **parameters(TaskCreate.model_fields),
        owner_id=CALLER,
        id=bindparam("task_id"),
        completed_at=completed(bindparam("status", type_=Text), None),
    )
    new, gone = statement.excluded, col(Task.deleted_at).is_not(None)
    fields = sorted(TaskCreate.model_fields)
    differs = tuple_(*(TABLE.c[name] for name in fields)).is_distinct_from(tuple_(*(new[name] for name in fields)))
    statement = statement.on_conflict_do_update(
        index_elements=[col(Task.owner_id), col(Task.id)],
        set_={
            **{name: new[name] for name in fields},
            "completed_at": completed(new.status, case((gone, None), else_=col(Task.completed_at))),
            "version": case((gone, 1), (differs, col(Task.version) + 1), else_=col(Task.version)),
            "created_at": case((gone, func.now()), else_=col(Task.created_at)),
            "updated_at": case(
                (gone, func.now()),
                (differs, func.greatest(col(Task.updated_at), func.now())),
                else_=col(Task.updated_at),
            ),
            "deleted_at": null(),
        },
        where=and_(
            MINE,
            or_(
                and_(col(Task.deleted_at).is_(None), EXCLUDED),
                col(Task.deleted_at) <= func.now() - RETENTION,
            ),
        ),
    )
    created: ColumnElement[bool] = literal_column("old.id IS NULL OR old.deleted_at IS NOT NULL")
    return Statement(statement.returning(*READ, created.label("created")))


PUT = put()
RESTORE = Statement(
    update(Task)
    .where(*KEPT, col(Task.id) == bindparam("task_id"), MATCHES)
    .values(
        deleted_at=null(),
        version=col(Task.version) + case((col(Task.deleted_at).is_(None), 0), else_=1),
        updated_at=case((col(Task.deleted_at).is_(None), col(Task.updated_at)), else_=func.now()),
    )
    .returning(*READ)
)
EXISTS = Statement(select(col(Task.deleted_at)).where(*KEPT, col(Task.id) == bindparam("task_id")))


class TaskService:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(self, query: TaskQuery) -> Row:
        """A page: `items`, `next_cursor`, and `total` if it was asked for."""
        filters = query.model_dump(include=set(FILTERS), exclude_none=True)
        bound_to = pagination.fingerprint("tasks", query.sort, {**filters, "deleted": query.deleted})
        key = query.sort.removeprefix("-")
        values = dict(filters)
        if query.cursor is not None:
            values["after_key"], values["after_id"] = pagination.decode(query.cursor, bound_to, CURSOR_KEYS[key])
        statement = listing(
            frozenset(filters),
            query.sort,
            continued=query.cursor is not None,
            deleted=query.deleted,
            counted=query.count is not None,
        )
        rows = await self._database.rows(statement, **values, limit=query.limit + 1)
        if query.count is None:
            return pagination.page(rows, query.limit, bound_to, key)
        totals = [row.pop("total") for row in rows]
        page = pagination.page([row for row in rows if row["id"]], query.limit, bound_to, key)
        return {**page, "total": totals[0]}

    async def create(self, data: TaskCreate) -> Row:
        (row,) = await self._database.rows(ADD, **data.model_dump())
        return row

    async def put(
        self, id: UUID, data: TaskCreate, *, if_match: Versions | None, if_none_match: Versions | None, must_exist: bool
    ) -> tuple[Row, bool]:
        """Replace the task, or make it under the client's id; whether it was made. An id is unique per owner.

        `must_exist`: there was an If-Match, which nothing can match that is not there: a 404, then a 412. A task in the
        bin is a 404 until it is restored.
        """
        values = {**data.model_dump(), "task_id": id}
        if must_exist:
            allowed = change(frozenset(TaskCreate.model_fields), excluding=True)
            row = await self._database.row(allowed, **values, if_match=if_match, if_none_match=if_none_match)
        else:
            row = await self._database.row(PUT, **values, if_none_match=if_none_match)
        if row is None:
            await self.get(id)
            raise StaleVersion
        return row, row.pop("created", False)

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

    async def restore(self, id: UUID, *, if_match: Versions | None) -> Row:
        """Out of the bin. What is not in it is left as it is."""
        row = await self._database.row(RESTORE, task_id=id, if_match=if_match)
        if row is not None:
            return row
        raise StaleVersion if await self._database.row(EXISTS, task_id=id) else NotFound
