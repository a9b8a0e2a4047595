"""Statements that read and write single tasks. Each is scoped to the caller by `OWNED` or a similar filter."""

from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    DateTime,
    Integer,
    Text,
    and_,
    bindparam,
    case,
    func,
    insert,
    literal_column,
    null,
    or_,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlmodel import SQLModel, col, select

from backend.database import Cost, Statement, parameters
from backend.resources import models
from backend.resources.models import CALLER, RETENTION
from backend.sync import changes
from backend.tasks.models import TAGS, Status, Task, sort_key
from backend.tasks.schemas import TaskCreate, TaskRead
from backend.users.models import User

TABLE = SQLModel.metadata.tables["tasks"]
DUE_OR_NEVER, DUE_OR_ALWAYS = (sort_key(sort, TABLE.c.due_at) for sort in ("due_at", "-due_at"))
COMPUTED: dict[str, ColumnElement[Any]] = {
    "is_overdue": (func.now() > DUE_OR_NEVER) & (col(Task.status) != Status.done.value),
    "tags": TABLE.c.tag_names,
    # In UTC without a time zone: psycopg and orjson take half the time for these (`docs/performance.md`). An interval,
    # since PostgreSQL would look up the name of a time zone for each value.
    **{
        column.key: func.timezone(literal_column("interval '0'"), column)
        for column in TABLE.c
        if isinstance(column.type, DateTime) and column.key in TaskRead.model_fields
    },
}
READ = [COMPUTED[name].label(name) if name in COMPUTED else col(getattr(Task, name)) for name in TaskRead.model_fields]

# Columns that clients set.
FIELDS = [name for name in TaskCreate.model_fields if name in TABLE.c]

MINE = col(Task.owner_id) == CALLER
OWNED = (MINE, col(Task.deleted_at).is_(None))
TRASH = (MINE, col(Task.deleted_at) > func.now() - RETENTION)
RETAINED = (MINE, or_(col(Task.deleted_at).is_(None), col(Task.deleted_at) > func.now() - RETENTION))
THIS_TASK = (*OWNED, col(Task.id) == bindparam("task_id"))


def completed(status: Any, before: Any) -> ColumnElement[datetime | None]:
    """The value of `completed_at`: kept or set for the status done, else null."""
    return case((status == Status.done.value, func.coalesce(before, func.now())))


@lru_cache(256)
def update_task(columns: frozenset[str], *, excluding: bool = False) -> Statement:
    """Update these columns if the version is one of `if_match`. Unchanged values make no new version.

    `excluding`: also requires that the version is none of `if_none_match`. "tags" need `LOCK_CHANGES` first.
    """
    changed = columns & set(FIELDS) | ({"tag_names"} if "tags" in columns else set())
    values = models.changes(TABLE, changed, tag_names=TAGS.names("tags"))
    if "status" in values:
        values["completed_at"] = completed(values["status"], col(Task.completed_at))
    conditions = (*THIS_TASK, MATCHES, *([EXCLUDED] if excluding else []))
    statement = update(Task).where(*conditions).values(values)
    return TAGS.write(statement, "tags", *READ) if "tags" in columns else Statement(statement.returning(*READ))


MATCHES = models.matches(TABLE)
# Null excludes any version: the comparison is null, which is not true.
EXCLUDED = col(Task.version) != func.all(bindparam("if_none_match", type_=ARRAY(Integer)))

SELECT_TASK = Statement(select(*READ).where(*THIS_TASK))
CHANGES = changes.statement(TABLE, READ)
_NEW = insert(Task).values(
    **parameters(FIELDS), owner_id=CALLER, completed_at=completed(bindparam("status", type_=Text), None)
)
INSERT_TASK = Statement(_NEW.returning(*READ))
INSERT_TASK_WITH_TAGS = TAGS.write(_NEW, "tags", *READ)
TRASH_TASK = Statement(
    update(Task)
    .where(*THIS_TASK, MATCHES)
    .values(deleted_at=func.now(), updated_at=func.now(), version=col(Task.version) + 1)
    .returning(col(Task.id))
)


def _put_task() -> Statement:
    """Create a task, or replace it unless its version is in `if_none_match` (null: any). `created` says which.

    A task whose time in the trash has expired is created anew, even if the purge has not run. A task that can still be
    restored is not changed. Needs `LOCK_CHANGES` first.
    """
    statement = postgresql.insert(Task).values(
        **parameters(FIELDS),
        owner_id=CALLER,
        id=bindparam("task_id"),
        completed_at=completed(bindparam("status", type_=Text), None),
    )
    new, was_deleted = statement.excluded, col(Task.deleted_at).is_not(None)
    fields = sorted({*FIELDS, "tag_names"})
    old, replaced = (tuple_(*(table[name] for name in fields)) for table in (TABLE.c, new))
    differs = old.is_distinct_from(replaced)
    statement = statement.on_conflict_do_update(
        index_elements=[col(Task.owner_id), col(Task.id)],
        set_={
            **{name: new[name] for name in fields},
            "completed_at": completed(new.status, case((was_deleted, None), else_=col(Task.completed_at))),
            "version": case((was_deleted, 1), (differs, col(Task.version) + 1), else_=col(Task.version)),
            "created_at": case((was_deleted, func.now()), else_=col(Task.created_at)),
            "updated_at": case(
                (was_deleted, func.now()),
                (differs, func.greatest(col(Task.updated_at), func.now())),
                else_=col(Task.updated_at),
            ),
            "deleted_at": null(),
        },
        where=and_(
            MINE, or_(and_(col(Task.deleted_at).is_(None), EXCLUDED), col(Task.deleted_at) <= func.now() - RETENTION)
        ),
    )
    created: ColumnElement[bool] = literal_column("old.id IS NULL OR old.deleted_at IS NOT NULL")
    return TAGS.write(statement, "tags", *READ, created.label("created"))


PUT_TASK = _put_task()
RESTORE_TASK = Statement(
    update(Task)
    .where(*RETAINED, col(Task.id) == bindparam("task_id"), MATCHES)
    .values(
        deleted_at=null(),
        version=col(Task.version) + case((col(Task.deleted_at).is_(None), 0), else_=1),
        updated_at=case((col(Task.deleted_at).is_(None), col(Task.updated_at)), else_=func.now()),
    )
    .returning(*READ)
)
TIME_ZONE = Statement(select(col(User.time_zone)).where(col(User.id) == CALLER))
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
    select(*[func.count().filter(each).label(name) for name, each in COUNTS.items()]).where(*OWNED), cost=Cost.long
)
DELETED_AT = Statement(select(col(Task.deleted_at)).where(*RETAINED, col(Task.id) == bindparam("task_id")))
