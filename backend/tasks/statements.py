"""The statements on one user's tasks. Each starts from `OWNED` or its like, so none can reach another's."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import TypeAdapter
from sqlalchemy import (
    ARRAY,
    Boolean,
    ColumnElement,
    CompoundSelect,
    DateTime,
    Insert,
    Integer,
    Label,
    Subquery,
    Text,
    Update,
    and_,
    bindparam,
    case,
    collate,
    delete,
    exists,
    func,
    insert,
    literal_column,
    null,
    or_,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlmodel import SQLModel, col, select
from sqlmodel.sql.expression import SelectOfScalar

from backend.database import Cost, Statement, parameters
from backend.resources import models, pagination
from backend.resources.models import CALLER, RETENTION
from backend.resources.types import Instant, Storable
from backend.sync import changes
from backend.tasks.models import LONG, SHORT, Priority, Status, Tag, Task, TaskTag, sort_key
from backend.tasks.schemas import TaskCreate, TaskQuery, TaskRead
from backend.users.models import User

T = TypeVar("T")

TABLE = SQLModel.metadata.tables["tasks"]
DUE_OR_NEVER, DUE_OR_ALWAYS = (sort_key(sort, TABLE.c.due_at) for sort in ("due_at", "-due_at"))
COMPUTED: dict[str, ColumnElement[Any]] = {
    "is_overdue": (func.now() > DUE_OR_NEVER) & (col(Task.status) != Status.done.value),
    "tags": TABLE.c.tag_names,
    # In UTC, without a zone: psycopg reads such times and orjson writes them in half the time (`docs/performance.md`).
    # The name of a zone would be looked up at each.
    **{
        column.key: func.timezone(literal_column("interval '0'"), column)
        for column in TABLE.c
        if isinstance(column.type, DateTime) and column.key in TaskRead.model_fields
    },
}
READ = [COMPUTED[name].label(name) if name in COMPUTED else col(getattr(Task, name)) for name in TaskRead.model_fields]

# What a client sets and the table keeps.
FIELDS = [name for name in TaskCreate.model_fields if name in TABLE.c]

MINE = col(Task.owner_id) == CALLER
OWNED = (MINE, col(Task.deleted_at).is_(None))
BIN = (MINE, col(Task.deleted_at) > func.now() - RETENTION)
KEPT = (MINE, or_(col(Task.deleted_at).is_(None), col(Task.deleted_at) > func.now() - RETENTION))
THIS = (*OWNED, col(Task.id) == bindparam("task_id"))

LIMIT = bindparam("limit", type_=Integer)

# How many of the first rows of a listing a search looks at one by one.
NEAR = 200

# A subquery without a table is worked out once, not once a row.
SEARCHED = select(func.casefold(collate(bindparam("q", type_=Text), "pg_unicode_fast"))).scalar_subquery()


def folded_names(parameter: str) -> SelectOfScalar[str]:
    """The names in a parameter, each once, as tags are compared."""
    name = func.unnest(bindparam(parameter, type_=ARRAY(Text))).column_valued("name")
    return select(collate(func.casefold(collate(name, "pg_unicode_fast")), "C").label("folded")).distinct()


def holds(folded: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether a text has in it what is searched for."""
    return func.strpos(folded, SEARCHED) > 0


FILTERS: dict[str, ColumnElement[bool]] = {
    "status": col(Task.status) == bindparam("status"),
    "priority": col(Task.priority) == bindparam("priority"),
    "due_before": bindparam("due_before", type_=TABLE.c.due_at.type) > DUE_OR_NEVER,
    "due_after": bindparam("due_after", type_=TABLE.c.due_at.type) < DUE_OR_ALWAYS,
    "overdue": COMPUTED["is_overdue"] == bindparam("overdue", type_=Boolean),
    "tag": col(Task.id).in_(
        select(col(TaskTag.task_id))
        .join(Tag, and_(col(TaskTag.owner_id) == Tag.owner_id, col(TaskTag.tag_id) == Tag.id))
        .where(col(TaskTag.owner_id) == CALLER, col(Tag.owner_id) == CALLER, col(Tag.folded).in_(folded_names("tag")))
        .group_by(col(TaskTag.task_id))
        .having(func.count() == select(func.count()).select_from(folded_names("tag").subquery()).scalar_subquery())
    ),
    "q": holds(TABLE.c.folded),
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


def texts(*conditions: ColumnElement[bool], key: ColumnElement[Any]) -> CompoundSelect[Any]:
    """The `id` and `sort_key` of live tasks, read from the index of all texts but for those too long for it."""
    lengths: list[ColumnElement[bool]] = [literal_column(SHORT), literal_column(LONG)]
    each = (select(col(Task.id), key.label("sort_key")).where(*conditions, length) for length in lengths)
    return union_all(*each)


def search(
    rest: Sequence[ColumnElement[bool]],
    key: ColumnElement[Any],
    *,
    after: ColumnElement[Any] | None,
    descending: bool,
) -> Subquery:
    """The `id` and `sort_key` of one page of the live tasks that have `q` in them and meet the other conditions.

    What many tasks have fills the page from the first of the listing. Only if it does not are all texts looked
    through; that is a subquery with an OFFSET, or else PostgreSQL, which cannot know how rare a text is, would hope to
    find it early in the order of the listing, and visit every task in the table.
    """
    columns: list[Any] = [col(Task.id), key.label("sort_key"), col(Task.folded)]
    first = pagination.keyset(select(*columns).where(*rest), key, TABLE.c.id, after=after, descending=descending)
    start = first.limit(literal_column(f"{NEAR}")).subquery("start")
    by = pagination.order(start.c.sort_key, start.c.id, descending=descending)
    hits = select(start.c.id, start.c.sort_key).where(holds(start.c.folded)).order_by(*by).limit(LIMIT)
    near = hits.cte("near")
    too_few = select(func.count()).select_from(near).scalar_subquery() < LIMIT
    every = texts(*rest, holds(TABLE.c.folded), too_few, key=key).offset(literal_column("0")).subquery("every")
    page = select(every.c.id, every.c.sort_key)
    page = pagination.keyset(page, every.c.sort_key, every.c.id, after=after, descending=descending)
    return select(near.c.id, near.c.sort_key).union(page).subquery("found")


@lru_cache(256)
def listing(filters: frozenset[str], sort: str, *, continued: bool, deleted: bool, counted: bool) -> Statement:
    """The statement for one combination of filters and sort; their values come with each request.

    `counted`: each row carries the `total`; where there is none to carry it, one comes that is empty otherwise.
    """
    name, descending = sort.removeprefix("-"), sort.startswith("-")
    column, id = TABLE.c[name], TABLE.c.id
    key = sort_key(sort, column)
    after = sort_key(sort, bindparam("after_key", type_=column.type)) if continued else None
    given = {name: FILTERS[name] for name in sorted(filters)}
    searched = None if deleted else given.pop("q", None)
    wanted = (*(BIN if deleted else OWNED), *given.values())
    if searched is None:
        query = select(*READ, *([key.label("sort_key")] if counted else [])).where(*wanted)
        query = pagination.keyset(query, key, id, after=after, descending=descending)
        total = select(func.count().label("total")).where(*wanted)
    else:
        found = search(wanted, key, after=after, descending=descending)
        query = select(*READ, *([found.c.sort_key] if counted else [])).join(found, found.c.id == id).where(MINE)
        query = query.order_by(*pagination.order(found.c.sort_key, found.c.id, descending=descending)).limit(LIMIT)
        total = select(func.count().label("total")).select_from(texts(*wanted, searched, key=key).subquery())
    # Where nothing narrows it, the index of the sort is the way for everybody, from wherever the cursor points.
    keeps_plan = not (filters or deleted)
    if not counted:
        return Statement(query, keeps_plan=keeps_plan, cost=Cost.short if keeps_plan else Cost.long)
    page, count = query.subquery(), total.subquery()
    fields = [page.c[name] for name in TaskRead.model_fields]
    both = select(count.c.total, *fields).select_from(count.outerjoin(page, true()))
    both = both.order_by(*pagination.order(page.c.sort_key, page.c.id, descending=descending))
    return Statement(both, keeps_plan=keeps_plan, cost=Cost.long)


class BoundListing(NamedTuple):
    """What a listing asks of the database; it depends on nothing but the query."""

    statement: Statement
    values: Mapping[str, object]
    bound_to: str
    key: str


@lru_cache(256)
def bound_listing(query: TaskQuery) -> BoundListing:
    """Raises InvalidCursor."""
    filters = {name: value for name in FILTERS if (value := getattr(query, name)) not in (None, ())}
    bound_to = pagination.fingerprint("tasks", query.sort, {**filters, "deleted": query.deleted})
    key = query.sort.removeprefix("-")
    after = pagination.after(query.cursor, bound_to, CURSOR_KEYS[key])
    statement = listing(
        frozenset(filters),
        query.sort,
        continued=bool(after),
        deleted=query.deleted,
        counted=query.count is not None,
    )
    if query.tag:
        filters["tag"] = list(query.tag)  # psycopg takes a tuple for a row
    return BoundListing(statement, {**filters, **after, "limit": query.limit + 1}, bound_to, key)


def shown_names() -> ColumnElement[list[str]]:
    """The names that a task with the parameter `tags` shows: each as it was first stored, in the order of tags."""
    given = (
        func.unnest(bindparam("tags", type_=ARRAY(Text)))
        .table_valued("name", with_ordinality="place")
        .render_derived("given")
    )
    folded = collate(func.casefold(collate(given.c.name, "pg_unicode_fast")), "C")
    columns: list[Any] = [given.c.name, folded.label("folded")]
    first = select(*columns).ext(postgresql.distinct_on(folded)).order_by(folded, given.c.place).subquery("first")
    known = and_(col(Tag.owner_id) == CALLER, col(Tag.folded) == first.c.folded)
    names = select(func.coalesce(col(Tag.name), first.c.name)).select_from(first.outerjoin(Tag, known))
    return func.array(names.order_by(first.c.folded).scalar_subquery())


SHOWN_NAMES = shown_names()


def with_tags(write: Insert | Update, *more: Label[Any]) -> Statement:
    """Write the one task, give it the `tags` and no others, make those that are new, and return it."""
    task = write.returning(*READ, *more).cte("task")
    name = func.unnest(bindparam("tags", type_=ARRAY(Text))).column_valued("name")
    made = (
        postgresql.insert(Tag)
        .from_select(["owner_id", "name"], select(CALLER, name).where(exists(select(task.c.id))))
        .on_conflict_do_nothing()
        .returning(col(Tag.id))
        .cte("made")
    )
    wanted = (
        select(col(Tag.id))
        .where(col(Tag.owner_id) == CALLER, col(Tag.folded).in_(folded_names("tags")))
        .union_all(select(made.c.id))
        .cte("wanted")
    )
    taken = (
        delete(TaskTag)
        .where(col(TaskTag.owner_id) == CALLER, col(TaskTag.task_id) == select(task.c.id).scalar_subquery())
        .where(col(TaskTag.tag_id).not_in(select(wanted.c.id)))
        .cte("taken")
    )
    given = (
        postgresql.insert(TaskTag)
        .from_select(["owner_id", "task_id", "tag_id"], select(CALLER, task.c.id, wanted.c.id).join(wanted, true()))
        .on_conflict_do_nothing()
        .cte("given")
    )
    return Statement(select(*task.c).add_cte(taken, given))


@lru_cache(256)
def change(columns: frozenset[str], *, excluding: bool = False) -> Statement:
    """Set these columns, if the version is one of `if_match`. Equal values make no new version.

    `excluding`: nor may the version be one of `if_none_match`. With "tags" among the columns, behind `AWAIT_TURN`.
    """
    tags = {"tag_names": SHOWN_NAMES} if "tags" in columns else {}
    values = tags | models.changes(
        TABLE, columns & set(FIELDS), *map(TABLE.c.tag_names.is_distinct_from, tags.values())
    )
    if "status" in values:
        values["completed_at"] = completed(values["status"], col(Task.completed_at))
    conditions = (*THIS, MATCHES, *([EXCLUDED] if excluding else []))
    statement = update(Task).where(*conditions).values(values)
    return with_tags(statement) if "tags" in columns else Statement(statement.returning(*READ))


MATCHES = models.matches(TABLE)
# Null forbids any version: the comparison is null, which is not true.
EXCLUDED = col(Task.version) != func.all(bindparam("if_none_match", type_=ARRAY(Integer)))

GET = Statement(select(*READ).where(*THIS))
CHANGES = changes.statement(TABLE, READ)
NEW = insert(Task).values(
    **parameters(FIELDS),
    owner_id=CALLER,
    completed_at=completed(bindparam("status", type_=Text), None),
)
ADD = Statement(NEW.returning(*READ))
ADD_WITH_TAGS = with_tags(NEW.values(tag_names=SHOWN_NAMES))
REMOVE = Statement(
    update(Task)
    .where(*THIS, MATCHES)
    .values(deleted_at=func.now(), updated_at=func.now(), version=col(Task.version) + 1)
    .returning(col(Task.id))
)


def put() -> Statement:
    """Make the task, or replace it unless `if_none_match` has its version (null: any); `created` says which.

    One whose time in the bin is over is not there any more, whether the purge has run or not: it is made anew. One that
    can still be restored stays where it is. Behind `AWAIT_TURN`.
    """
    statement = postgresql.insert(Task).values(
        **parameters(FIELDS),
        owner_id=CALLER,
        id=bindparam("task_id"),
        completed_at=completed(bindparam("status", type_=Text), None),
        tag_names=SHOWN_NAMES,
    )
    new, gone = statement.excluded, col(Task.deleted_at).is_not(None)
    fields = sorted({*FIELDS, "tag_names"})
    old, replaced = (tuple_(*(table[name] for name in fields)) for table in (TABLE.c, new))
    differs = old.is_distinct_from(replaced)
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
    return with_tags(statement, created.label("created"))


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
ZONE = Statement(select(col(User.time_zone)).where(col(User.id) == CALLER))
TODAY = and_(
    col(Task.status) != Status.done.value,
    col(Task.due_at) >= bindparam("today"),
    col(Task.due_at) < bindparam("tomorrow"),
)
COUNTS = {
    **{status.value: col(Task.status) == status.value for status in Status},
    "overdue": COMPUTED["is_overdue"],
    "due_today": TODAY,
}
SUMMARY = Statement(
    select(*[func.count().filter(what).label(name) for name, what in COUNTS.items()]).where(*OWNED), cost=Cost.long
)
EXISTS = Statement(select(col(Task.deleted_at)).where(*KEPT, col(Task.id) == bindparam("task_id")))
