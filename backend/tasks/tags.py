"""Operations on the caller's tags. The tags of a task are written with the task, in `statements.py`.

Renaming or deleting a tag makes a new version of its tasks, through triggers.
"""

from uuid import UUID

from sqlalchemy import bindparam, delete, insert, literal_column, update
from sqlmodel import col, select

from backend.database import Cost, Database, Row, Statement
from backend.resources.models import CALLER
from backend.sync.changes import write_in_turn
from backend.tasks.models import TAGS, Tag
from backend.tasks.schemas import TagCreate, TagUpdate
from backend.tasks.statements import OWNED
from backend.web.problems import NotFound

MINE = col(Tag.owner_id) == CALLER
THIS_TAG = (MINE, col(Tag.id) == bindparam("tag_id"))
TASK_COUNT = TAGS.count(*OWNED).label("task_count")
LIST_TAGS = Statement(
    select(col(Tag.id), col(Tag.name), TASK_COUNT).where(MINE).order_by(col(Tag.folded)), cost=Cost.long
)
SELECT_TAG = Statement(select(col(Tag.id), col(Tag.name), TASK_COUNT).where(*THIS_TAG), cost=Cost.long)
INSERT_TAG = Statement(
    insert(Tag)
    .values(owner_id=CALLER, name=bindparam("name"))
    .returning(col(Tag.id), col(Tag.name), literal_column("0").label("task_count"))
)
RENAME_TAG = Statement(
    update(Tag).where(*THIS_TAG).values(name=bindparam("name")).returning(col(Tag.id), col(Tag.name), TASK_COUNT)
)
DELETE_TAG = Statement(delete(Tag).where(*THIS_TAG).returning(col(Tag.id)))


class TagService:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(self) -> list[Row]:
        return await self._database.rows(LIST_TAGS)

    async def create(self, data: TagCreate) -> Row:
        """Raises `psycopg.errors.UniqueViolation` (409) if the name exists in any case."""
        # Otherwise, a concurrent write of a task with this tag could neither see nor create it.
        row = await write_in_turn(self._database, INSERT_TAG, name=data.name)
        assert row is not None
        return row

    async def update(self, id: UUID, data: TagUpdate) -> Row:
        values = {**data.model_dump(exclude_unset=True), "tag_id": id}
        row = await (
            write_in_turn(self._database, RENAME_TAG, **values)
            if "name" in values
            else self._database.row(SELECT_TAG, **values)
        )
        if row is None:
            raise NotFound
        return row

    async def delete(self, id: UUID) -> None:
        if await write_in_turn(self._database, DELETE_TAG, tag_id=id) is None:
            raise NotFound
