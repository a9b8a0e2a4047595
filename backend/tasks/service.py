"""Operations on the caller's tasks and their errors."""

from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta
from uuid import UUID
from zoneinfo import ZoneInfo

from backend.database import Database, Row, Transaction
from backend.resources import pagination, responses
from backend.resources.responses import Versions
from backend.sync.changes import LOCK_CHANGES, Feed, write_in_turn
from backend.tasks.listing import bound_listing
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
    CHANGES,
    DELETED_AT,
    INSERT_TASK,
    INSERT_TASK_WITH_TAGS,
    PUT_TASK,
    RESTORE_TASK,
    SELECT_TASK,
    SUMMARY,
    TIME_ZONE,
    TRASH_TASK,
    update_task,
)
from backend.web.problems import NotFound, StaleVersion


def day(now: datetime, time_zone: str | None) -> tuple[datetime, datetime]:
    """The start of the current day in a time zone, and of the next day, both in UTC."""
    zone = ZoneInfo(time_zone or "UTC")
    today = now.astimezone(zone).date()
    start, end = (datetime.combine(date, time(), zone).astimezone(UTC) for date in (today, today + timedelta(days=1)))
    return start, end


def versions(if_match: str | None) -> Versions | None:
    return None if if_match is None else responses.parse_if_match(if_match)


FEED = Feed("tasks", "task", TaskRead, CHANGES)


class TaskService:
    """Operations on the caller's tasks, on their database or within an open transaction."""

    def __init__(self, database: Database | Transaction) -> None:
        self._database = database

    async def list(self, query: TaskQuery) -> Row:
        """A page: `items`, `next_cursor`, and `total` if requested. Raises InvalidCursor."""
        statement, values, bound_to, key = bound_listing(query)
        rows = await self._database.rows(statement, **values)
        if query.count is None:
            return pagination.page(rows, query.limit, bound_to, key)
        totals = [row.pop("total") for row in rows]
        page = pagination.page([row for row in rows if row["id"]], query.limit, bound_to, key)
        return {**page, "total": totals[0]}

    async def create(self, data: TaskCreate) -> Row:
        values = data.model_dump()
        row = await (
            write_in_turn(self._database, INSERT_TASK_WITH_TAGS, **values)
            if data.tags
            else self._database.row(INSERT_TASK, **values)
        )
        assert row is not None
        return row

    async def batch(self, operations: Sequence[Operation]) -> Sequence[Row | None]:
        """Apply all operations or none. An error names the failed operation in `errors`."""

        async def work(transaction: Transaction) -> Sequence[Row | None]:
            # Taken first: waiting for it while holding a row lock could deadlock.
            await transaction.rows(LOCK_CHANGES)
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

        if isinstance(self._database, Transaction):
            return await work(self._database)
        return await self._database.transact(work)

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
        """Replace a task, or create it with the id chosen by the client. Returns the task and whether it was created.

        `must_exist`: the request has If-Match, so the task is not created. Raises NotFound for a missing task or one in
        the trash, then StaleVersion.
        """
        statement = update_task(frozenset(TaskCreate.model_fields), excluding=True) if must_exist else PUT_TASK
        values = {**data.model_dump(), "task_id": id, "if_match": if_match, "if_none_match": if_none_match}
        row = await write_in_turn(self._database, statement, **values)
        if row is None:
            await self.get(id)
            raise StaleVersion
        return row, row.pop("created", False)

    async def get(self, id: UUID) -> Row:
        row = await self._database.row(SELECT_TASK, task_id=id)
        if row is None:
            raise NotFound
        return row

    async def update(self, id: UUID, data: TaskUpdate, *, if_match: Versions | None) -> Row:
        """Update the members that were sent. Raises NotFound, then StaleVersion."""
        values = data.model_dump(exclude_unset=True)
        if not values:
            row = await self.get(id)
            if if_match is not None and row["version"] not in if_match:
                raise StaleVersion
            return row
        statement, values = update_task(frozenset(values)), {**values, "task_id": id, "if_match": if_match}
        if "tags" in values:
            changed = await write_in_turn(self._database, statement, **values)
        else:
            changed = await self._database.row(statement, **values)
        if changed is None:
            await self.get(id)  # raises NotFound if the task does not exist
            raise StaleVersion
        return changed

    async def delete(self, id: UUID, *, if_match: Versions | None) -> None:
        """Move a task to the trash. Does nothing if it is already there. Raises NotFound, then StaleVersion."""
        if await self._database.row(TRASH_TASK, task_id=id, if_match=if_match) is None:
            row = await self._database.row(DELETED_AT, task_id=id)
            if row is None:
                raise NotFound
            if row["deleted_at"] is None:
                raise StaleVersion

    async def restore(self, id: UUID, *, if_match: Versions | None) -> Row:
        """Restore a task from the trash. Does nothing if it is not there. Raises NotFound, then StaleVersion."""
        row = await self._database.row(RESTORE_TASK, task_id=id, if_match=if_match)
        if row is not None:
            return row
        raise StaleVersion if await self._database.row(DELETED_AT, task_id=id) else NotFound

    async def summary(self) -> Row:
        """Count tasks. PostgreSQL may lack time zones that users can choose, so the day is computed here."""
        user = await self._database.row(TIME_ZONE)
        today, tomorrow = day(datetime.now(UTC), user["time_zone"] if user else None)
        (row,) = await self._database.rows(SUMMARY, today=today, tomorrow=tomorrow)
        return {"by_status": {status.value: row.pop(status.value) for status in Status}, **row}
