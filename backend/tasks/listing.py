"""Lists of tasks: filters, sort orders, search and the statements of pages. All are scoped to the caller."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

from pydantic import TypeAdapter
from sqlalchemy import (
    Boolean,
    ColumnElement,
    CompoundSelect,
    Integer,
    Subquery,
    Text,
    bindparam,
    collate,
    func,
    literal_column,
    true,
    union_all,
)
from sqlmodel import col, select

from backend.database import Cost, Statement
from backend.resources import pagination
from backend.resources.types import Instant, Storable
from backend.tasks.models import LONG, SHORT, TAGS, Priority, Task, sort_key
from backend.tasks.schemas import TaskQuery, TaskRead
from backend.tasks.statements import (
    COMPUTED,
    DUE_OR_ALWAYS,
    DUE_OR_NEVER,
    MINE,
    OWNED,
    READ,
    TABLE,
    TRASH,
)

LIMIT = bindparam("limit", type_=Integer)

# Number of rows that a search reads in the order of the list before it scans all texts.
SCANNED_FIRST = 200

# A subquery without a table is evaluated once, not once per row.
SEARCH_TEXT = select(func.casefold(collate(bindparam("q", type_=Text), "pg_unicode_fast"))).scalar_subquery()


def contains_q(folded: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether a folded text contains the parameter `q`."""
    return func.strpos(folded, SEARCH_TEXT) > 0


FILTERS: dict[str, ColumnElement[bool]] = {
    "status": col(Task.status) == bindparam("status"),
    "priority": col(Task.priority) == bindparam("priority"),
    "due_before": bindparam("due_before", type_=TABLE.c.due_at.type) > DUE_OR_NEVER,
    "due_after": bindparam("due_after", type_=TABLE.c.due_at.type) < DUE_OR_ALWAYS,
    "overdue": COMPUTED["is_overdue"] == bindparam("overdue", type_=Boolean),
    "tag": TAGS.all_of("tag"),
    "q": contains_q(TABLE.c.folded),
}
pagination.check_filters(TaskQuery, FILTERS, others=["deleted", "count"])
CURSOR_KEYS: dict[str, TypeAdapter[Any]] = {
    "created_at": TypeAdapter(Instant),
    "updated_at": TypeAdapter(Instant),
    "due_at": TypeAdapter(Instant | None),
    "priority": TypeAdapter(Priority),
    "title": TypeAdapter(Annotated[str, Storable]),
}


def live_tasks(*conditions: ColumnElement[bool], key: ColumnElement[Any]) -> CompoundSelect[Any]:
    """The `id` and `sort_key` of live tasks, read from the two indexes of texts: short and long ones."""
    lengths: list[ColumnElement[bool]] = [literal_column(SHORT), literal_column(LONG)]
    each = (select(col(Task.id), key.label("sort_key")).where(*conditions, length) for length in lengths)
    return union_all(*each)


def search(
    rest: Sequence[ColumnElement[bool]], key: ColumnElement[Any], *, after: ColumnElement[Any] | None, descending: bool
) -> Subquery:
    """The `id` and `sort_key` of a page of live tasks that contain `q` and meet the conditions `rest`.

    A frequent text fills the page from the first rows of the list. Only a rare one needs a scan of all texts. This scan
    is a subquery with an OFFSET: PostgreSQL cannot estimate how rare a text is, and would otherwise read the table in
    the order of the list, expecting to find enough rows early.
    """
    columns: list[Any] = [col(Task.id), key.label("sort_key"), col(Task.folded)]
    first = pagination.keyset(select(*columns).where(*rest), key, TABLE.c.id, after=after, descending=descending)
    start = first.limit(literal_column(f"{SCANNED_FIRST}")).subquery("start")
    by = pagination.order(start.c.sort_key, start.c.id, descending=descending)
    hits = select(start.c.id, start.c.sort_key).where(contains_q(start.c.folded)).order_by(*by).limit(LIMIT)
    found_early = hits.cte("found_early")
    too_few = select(func.count()).select_from(found_early).scalar_subquery() < LIMIT
    every = (
        live_tasks(*rest, contains_q(TABLE.c.folded), too_few, key=key).offset(literal_column("0")).subquery("every")
    )
    page = select(every.c.id, every.c.sort_key)
    page = pagination.keyset(page, every.c.sort_key, every.c.id, after=after, descending=descending)
    return select(found_early.c.id, found_early.c.sort_key).union(page).subquery("found")


@lru_cache(256)
def listing(filters: frozenset[str], sort: str, *, continued: bool, deleted: bool, counted: bool) -> Statement:
    """The statement for a combination of filters and sort order; their values are parameters.

    `counted`: each row also contains the `total`; without tasks, one row contains nothing else.
    """
    name, descending = sort.removeprefix("-"), sort.startswith("-")
    column, id = TABLE.c[name], TABLE.c.id
    key = sort_key(sort, column)
    after = sort_key(sort, bindparam("after_key", type_=column.type)) if continued else None
    conditions = {name: FILTERS[name] for name in sorted(filters)}
    searched = None if deleted else conditions.pop("q", None)
    wanted = (*(TRASH if deleted else OWNED), *conditions.values())
    if searched is None:
        query = select(*READ, *([key.label("sort_key")] if counted else [])).where(*wanted)
        query = pagination.keyset(query, key, id, after=after, descending=descending)
        total = select(func.count().label("total")).where(*wanted)
    else:
        found = search(wanted, key, after=after, descending=descending)
        query = select(*READ, *([found.c.sort_key] if counted else [])).join(found, found.c.id == id).where(MINE)
        query = query.order_by(*pagination.order(found.c.sort_key, found.c.id, descending=descending)).limit(LIMIT)
        total = select(func.count().label("total")).select_from(live_tasks(*wanted, searched, key=key).subquery())
    # Without filters, the index of the sort order is the best plan for all parameters.
    keeps_plan = not (filters or deleted)
    if not counted:
        return Statement(query, keeps_plan=keeps_plan, cost=Cost.short if keeps_plan else Cost.long)
    page, count = query.subquery(), total.subquery()
    fields = [page.c[name] for name in TaskRead.model_fields]
    counted_page = select(count.c.total, *fields).select_from(count.outerjoin(page, true()))
    counted_page = counted_page.order_by(*pagination.order(page.c.sort_key, page.c.id, descending=descending))
    return Statement(counted_page, keeps_plan=keeps_plan, cost=Cost.long)


class BoundListing(NamedTuple):
    """The statement and parameters of a query for a list of tasks."""

    statement: Statement
    values: Mapping[str, object]
    bound_to: str
    key: str


@lru_cache(256)
def bound_listing(query: TaskQuery) -> BoundListing:
    """The statement of a query, cached. Raises InvalidCursor."""
    filters = {name: value for name in FILTERS if (value := getattr(query, name)) not in (None, ())}
    bound_to = pagination.fingerprint("tasks", query.sort, {**filters, "deleted": query.deleted})
    key = query.sort.removeprefix("-")
    after = pagination.after(query.cursor, bound_to, CURSOR_KEYS[key])
    statement = listing(
        frozenset(filters), query.sort, continued=bool(after), deleted=query.deleted, counted=query.count is not None
    )
    if query.tag:
        filters["tag"] = list(query.tag)  # psycopg adapts a tuple as a composite value
    return BoundListing(statement, {**filters, **after, "limit": query.limit + 1}, bound_to, key)
