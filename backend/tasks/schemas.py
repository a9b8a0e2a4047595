"""The shapes that the tasks API takes and gives."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from backend.resources.pagination import Page, PageQuery, without_default
from backend.resources.types import Flag, NotBlank, Storable, Time
from backend.sync.changes import ChangePage
from backend.tasks.models import DESCRIPTION_LENGTH, TAG_LENGTH, TITLE_LENGTH, Priority, Status

Title = Annotated[str, Field(min_length=1, max_length=TITLE_LENGTH), Storable, NotBlank]
Description = Annotated[str, Field(max_length=DESCRIPTION_LENGTH), Storable]

TagName = Annotated[str, Field(min_length=1, max_length=TAG_LENGTH), Storable, NotBlank]
Tags = Annotated[list[TagName], Field(max_length=20)]

TITLE = "In one line; not blank."
DESCRIPTION = "At length, as it was sent; null: there is none."
STATUS = "How far it is; `done` sets `completed_at`, anything else clears it."
PRIORITY = "How much it matters: low, normal, high, urgent in this order."
DUE_AT = "When it has to be done, with an offset (RFC 3339), told in UTC; null: at no certain time."
TAG_NAME = "Not blank; no two tags of one person are equal but for the case of their letters."
TAGS = "Names, whatever their case; one that is new makes a tag."

_EXAMPLE: dict[str, Any] = {
    "title": "Buy milk",
    "description": "Two litres",
    "priority": "high",
    "due_at": "2026-12-01T18:00:00Z",
    "tags": ["home"],
}


class TaskCreate(BaseModel):
    """A whole task: what is left out gets its default."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [_EXAMPLE]})

    title: Title = Field(description=TITLE)
    description: Description | None = Field(default=None, description=DESCRIPTION)
    status: Status = Field(default=Status.todo, description=STATUS)
    priority: Priority = Field(default=Priority.normal, description=PRIORITY)
    due_at: Time | None = Field(default=None, description=DUE_AT)
    tags: Tags = Field(
        default_factory=list,
        description=TAGS,
        json_schema_extra={"default": []},
    )


class TaskUpdate(BaseModel):
    """A JSON merge patch (RFC 7396): members left out stay as they are, null brings the default back."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"status": "done"}]})

    title: Title = Field(default="", json_schema_extra=without_default, description=TITLE)
    description: Description | None = Field(default=None, json_schema_extra=without_default, description=DESCRIPTION)
    status: Annotated[Status | None, AfterValidator(lambda status: status or Status.todo)] = Field(
        default=None, json_schema_extra=without_default, description=STATUS
    )
    priority: Annotated[Priority | None, AfterValidator(lambda priority: priority or Priority.normal)] = Field(
        default=None, json_schema_extra=without_default, description=PRIORITY
    )
    due_at: Time | None = Field(default=None, json_schema_extra=without_default, description=DUE_AT)
    tags: Annotated[Tags | None, AfterValidator(lambda tags: tags or [])] = Field(
        default=None, json_schema_extra=without_default, description=f"All that it is to have. {TAGS}"
    )


class TaskRead(BaseModel):
    """A task as it is stored, and what follows from it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f",
                    **_EXAMPLE,
                    "status": "todo",
                    "is_overdue": False,
                    "completed_at": None,
                    "created_at": "2026-11-23T10:00:00Z",
                    "updated_at": "2026-11-23T10:00:00Z",
                    "deleted_at": None,
                    "version": 1,
                }
            ]
        }
    )

    id: UUID
    title: str = Field(description=TITLE)
    description: str | None = Field(description=DESCRIPTION)
    status: Status = Field(description=STATUS)
    priority: Priority = Field(description=PRIORITY)
    due_at: datetime | None = Field(description=DUE_AT)
    tags: list[str] = Field(description="As they were first stored, sorted.")
    is_overdue: bool = Field(description="`due_at` has passed and the task is not done.")
    completed_at: datetime | None = Field(description="When `status` became done.")
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None = Field(description="When it was put into the bin; null: it is not there.")
    version: int = Field(description="Counts the changes; the ETag of the task.")


class TaskPage(Page[TaskRead]):
    """Tasks, as many as were asked for, unless these are the last."""

    total: int = Field(
        default=0, json_schema_extra=without_default, description="With `count=exact`: how many on all pages."
    )


class TaskChanges(ChangePage[TaskRead]):
    """Tasks that were changed or deleted."""


Sort = Literal[
    "created_at", "-created_at", "updated_at", "-updated_at", "due_at", "-due_at",
    "priority", "-priority", "title", "-title",
]  # fmt: skip


class TaskQuery(PageQuery):
    """What a listing can be narrowed by. Each field that is set adds the condition of the same name."""

    status: Status | None = Field(default=None, description="Only tasks of this status.", examples=["todo"])
    priority: Priority | None = Field(default=None, description="Only tasks of this priority.", examples=["high"])
    # No list: what a query asks of the database is remembered, so it has to be hashable.
    tag: Annotated[tuple[TagName, ...], Field(max_length=20)] = Field(
        default_factory=tuple,
        description="Only tasks that have this tag; given often: that have all.",
        examples=[["home"]],
    )
    due_before: Time | None = Field(
        default=None, description="Only tasks that are due before this time.", examples=["2026-12-02T00:00:00Z"]
    )
    due_after: Time | None = Field(
        default=None, description="Only tasks that are due after this time.", examples=["2026-12-01T00:00:00Z"]
    )
    overdue: Flag | None = Field(
        default=None, description="Only tasks that are overdue, or only those that are not.", examples=[True]
    )
    q: Annotated[str, Storable] | None = Field(
        default=None,
        max_length=200,
        description="Only tasks whose title or description has this in it, whatever the case of the letters.",
        examples=["milk"],
    )
    deleted: Flag = Field(
        default=False, description="The bin instead: what was deleted in the last 30 days.", examples=[True]
    )
    count: Literal["exact"] | None = Field(
        default=None, description="`exact` adds `total` to the answer.", examples=["exact"]
    )
    sort: Sort = Field(
        default="-created_at",
        description="`-` for descending. Titles are compared by code point; tasks without a due date come last.",
        examples=["-due_at"],
    )


IfMatch = Annotated[
    str | None,
    Field(
        max_length=1000, description="As the header If-Match: only if the version is one of these.", examples=['"3"']
    ),
]


class BatchCreate(BaseModel):
    """A new task."""

    model_config = ConfigDict(extra="forbid")

    op: Literal["create"]
    id: UUID | None = Field(default=None, description="Of the client's own choice; there must be no such task yet.")
    task: TaskCreate


class BatchUpdate(BaseModel):
    """Some members of a task, as with PATCH."""

    model_config = ConfigDict(extra="forbid")

    op: Literal["update"]
    id: UUID
    changes: TaskUpdate
    if_match: IfMatch = None


class BatchDelete(BaseModel):
    """A task to put into the bin."""

    model_config = ConfigDict(extra="forbid")

    op: Literal["delete"]
    id: UUID
    if_match: IfMatch = None


Operation = Annotated[BatchCreate | BatchUpdate | BatchDelete, Field(discriminator="op")]


class Batch(BaseModel):
    """What to do, in this order: all of it or nothing."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "operations": [
                        {"op": "create", "task": {"title": "Buy milk"}},
                        {
                            "op": "update",
                            "id": "019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f",
                            "changes": {"status": "done"},
                            "if_match": '"3"',
                        },
                        {"op": "delete", "id": "019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e60"},
                    ]
                }
            ]
        },
    )

    operations: list[Operation] = Field(
        min_length=1, max_length=100, description="Each sees what those before it have done."
    )


class BatchResult(BaseModel):
    """What came of each operation."""

    items: list[TaskRead | None] = Field(description="In the order of the operations; null for what was deleted.")


class ByStatus(BaseModel):
    """How many there are of each status."""

    todo: int
    in_progress: int
    done: int


class TaskSummary(BaseModel):
    """The caller's tasks in numbers, those in the bin left out."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"by_status": {"todo": 4, "in_progress": 1, "done": 12}, "overdue": 2, "due_today": 1}]
        }
    )

    by_status: ByStatus = Field(description="All of them, each counted once.")
    overdue: int = Field(description="Not done, and `due_at` has passed.")
    due_today: int = Field(description="Not done, and due today in the caller's time zone; in UTC when that is unset.")


class TagCreate(BaseModel):
    """A new tag."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"name": "home"}]})

    name: TagName = Field(description=TAG_NAME)


class TagUpdate(BaseModel):
    """A JSON merge patch (RFC 7396)."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"name": "at home"}]})

    name: TagName = Field(default="", json_schema_extra=without_default, description=TAG_NAME)


class TagRead(BaseModel):
    """A tag, and how much it is used."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"id": "019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f", "name": "home", "task_count": 3}]
        }
    )

    id: UUID
    name: str = Field(description="As it was first stored, or last renamed.")
    task_count: int = Field(description="How many tasks have it, those in the bin left out.")


class TagList(BaseModel):
    """All of the caller's tags: a page is not needed."""

    items: list[TagRead] = Field(description="Sorted by name.")
