"""One user's tasks: what may be done with them, and what is refused."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, time, timedelta
from typing import TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

from backend.database import Database, Row, Statement, Transaction
from backend.resources import pagination, responses
from backend.resources.responses import Versions
from backend.sync.changes import AWAIT_TURN, Feed
from backend.tasks.models import Status
from backend.tasks.schemas import (
    BatchCreate,
    BatchDelete,
    BatchUpdate,
    Operation,
    TaskCreate,
    TaskQuery,
    TaskRead,
    TaskUpdate,
)
from backend.tasks.statements import (
    ADD,
    ADD_WITH_TAGS,
    CHANGES,
    EXISTS,
    GET,
    PUT,
    REMOVE,
    RESTORE,
    SUMMARY,
    ZONE,
    bound_listing,
    change,
)
from backend.web.problems import NotFound, StaleVersion

T = TypeVar("T")


def day(now: datetime, time_zone: str | None) -> tuple[datetime, datetime]:
    """The first moments, in UTC, of the day that it is in a time zone, and of the next."""
    zone = ZoneInfo(time_zone or "UTC")
    today = now.astimezone(zone).date()
    first, next = (datetime.combine(date, time(), zone).astimezone(UTC) for date in (today, today + timedelta(days=1)))
    return first, next


def versions(if_match: str | None) -> Versions | None:
    return None if if_match is None else responses.allowed(if_match)


FEED = Feed("tasks", "task", TaskRead, CHANGES)


class TaskService:
    """On the caller's database, or within a transaction of theirs that goes on."""

    def __init__(self, database: Database | Transaction) -> None:
        self._database = database

    async def list(self, query: TaskQuery) -> Row:
        """A page: `items`, `next_cursor`, and `total` if it was asked for."""
        statement, values, bound_to, key = bound_listing(query)
        rows = await self._database.rows(statement, **values)
        if query.count is None:
            return pagination.page(rows, query.limit, bound_to, key)
        totals = [row.pop("total") for row in rows]
        page = pagination.page([row for row in rows if row["id"]], query.limit, bound_to, key)
        return {**page, "total": totals[0]}

    async def create(self, data: TaskCreate) -> Row:
        values = data.model_dump()
        row = await (self._write_tags(ADD_WITH_TAGS, values) if data.tags else self._database.row(ADD, **values))
        assert row is not None
        return row

    async def _write_tags(self, statement: Statement, values: Mapping[str, object]) -> Row | None:
        async def work(transaction: Transaction) -> Row | None:
            await transaction.rows(AWAIT_TURN)
            return await transaction.row(statement, **values)

        return await self._within(work)

    async def _within(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        if isinstance(self._database, Transaction):
            return await work(self._database)
        return await self._database.transact(work)

    async def batch(self, operations: Sequence[Operation]) -> Sequence[Row | None]:
        """All of them or none. A refusal says in `errors` which operation it is of."""

        async def work(transaction: Transaction) -> Sequence[Row | None]:
            # First of all: who waited for it with a task in hand would wait in a circle.
            await transaction.rows(AWAIT_TURN)
            tasks = TaskService(transaction)
            rows = []
            for number, operation in enumerate(operations):
                try:
                    rows.append(await tasks._apply(operation))
                except (NotFound, StaleVersion) as error:
                    loc = ["body", "operations", number]
                    error.errors = [{"loc": loc, "msg": error.__doc__ or "", "type": error.code}]
                    raise
            return rows

        return await self._within(work)

    async def _apply(self, operation: Operation) -> Row | None:
        match operation:
            case BatchCreate(id=id, task=task):
                if id is None:
                    return await self.create(task)
                row, _ = await self.put(id, task, if_match=None, if_none_match=None, must_exist=False)
                return row
            case BatchUpdate(id=id, changes=changes, if_match=if_match):
                return await self.update(id, changes, if_match=versions(if_match))
            case BatchDelete(id=id, if_match=if_match):
                await self.delete(id, if_match=versions(if_match))
        return None

    async def put(
        self, id: UUID, data: TaskCreate, *, if_match: Versions | None, if_none_match: Versions | None, must_exist: bool
    ) -> tuple[Row, bool]:
        """Replace the task, or make it under the client's id; whether it was made. An id is unique per owner.

        `must_exist`: there was an If-Match, which nothing can match that is not there: a 404, then a 412. A task in the
        bin is a 404 until it is restored.
        """
        statement = change(frozenset(TaskCreate.model_fields), excluding=True) if must_exist else PUT
        values = {"task_id": id, "if_match": if_match, "if_none_match": if_none_match}
        row = await self._write_tags(statement, {**data.model_dump(), **values})
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
        statement, values = change(frozenset(values)), {**values, "task_id": id, "if_match": if_match}
        if "tags" in values:
            changed = await self._write_tags(statement, values)
        else:
            changed = await self._database.row(statement, **values)
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

    async def summary(self) -> Row:
        """Two statements: PostgreSQL may have older time zones than those that a user can choose from."""
        user = await self._database.row(ZONE)
        today, tomorrow = day(datetime.now(UTC), user["time_zone"] if user else None)
        (row,) = await self._database.rows(SUMMARY, today=today, tomorrow=tomorrow)
        return {"by_status": {status.value: row.pop(status.value) for status in Status}, **row}
