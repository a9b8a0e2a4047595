"""One user's tags. Which task has which is written with the task, in `statements.py`.

A task that shows another name, or one less, is a new version: triggers see to it (migration 0008).
"""

from uuid import UUID

from sqlalchemy import and_, bindparam, delete, func, insert, literal_column, update
from sqlmodel import col, select

from backend.database import Cost, Database, Row, Statement, Transaction
from backend.resources.models import CALLER
from backend.sync.changes import AWAIT_TURN
from backend.tasks.models import Tag, Task, TaskTag
from backend.tasks.schemas import TagCreate, TagUpdate
from backend.tasks.statements import OWNED
from backend.web.problems import NotFound

MINE = col(Tag.owner_id) == CALLER
THIS = (MINE, col(Tag.id) == bindparam("tag_id"))
COUNTED = (
    select(func.count())
    .select_from(TaskTag)
    .join(Task, and_(col(Task.owner_id) == TaskTag.owner_id, col(Task.id) == TaskTag.task_id))
    .where(*OWNED, col(TaskTag.owner_id) == CALLER, col(TaskTag.tag_id) == Tag.id)
    .correlate(Tag)
    .scalar_subquery()
    .label("task_count")
)
LIST = Statement(select(col(Tag.id), col(Tag.name), COUNTED).where(MINE).order_by(col(Tag.folded)), cost=Cost.long)
GET = Statement(select(col(Tag.id), col(Tag.name), COUNTED).where(*THIS), cost=Cost.long)
ADD = Statement(
    insert(Tag)
    .values(owner_id=CALLER, name=bindparam("name"))
    .returning(col(Tag.id), col(Tag.name), literal_column("0").label("task_count"))
)
RENAME = Statement(
    update(Tag).where(*THIS).values(name=bindparam("name")).returning(col(Tag.id), col(Tag.name), COUNTED)
)
REMOVE = Statement(delete(Tag).where(*THIS).returning(col(Tag.id)))


class TagService:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(self) -> list[Row]:
        return await self._database.rows(LIST)

    async def create(self, data: TagCreate) -> Row:
        """A name that there is, whatever its case, is a `psycopg.errors.UniqueViolation`: a 409."""

        async def work(transaction: Transaction) -> Row | None:
            # Who gives a task this tag meanwhile would neither see it nor make it.
            await transaction.rows(AWAIT_TURN)
            return await transaction.row(ADD, name=data.name)

        row = await self._database.transact(work)
        assert row is not None
        return row

    async def update(self, id: UUID, data: TagUpdate) -> Row:
        values = data.model_dump(exclude_unset=True)
        row = await (self._write(RENAME, id, **values) if values else self._database.row(GET, tag_id=id))
        if row is None:
            raise NotFound
        return row

    async def delete(self, id: UUID) -> None:
        if await self._write(REMOVE, id) is None:
            raise NotFound

    async def _write(self, statement: Statement, id: UUID, **values: object) -> Row | None:
        async def work(transaction: Transaction) -> Row | None:
            await transaction.rows(AWAIT_TURN)
            return await transaction.row(statement, tag_id=id, **values)

        return await self._database.transact(work)
