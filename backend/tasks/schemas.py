"""Request and response models of tasks and tags."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from backend.resources.links import MAX_NAMES, Name, Names, NamesOrNull
from backend.resources.pagination import Page, PageQuery, without_default
from backend.resources.types import Flag, NotBlank, Storable, Time
from backend.sync.changes import ChangePage
from backend.tasks.models import DESCRIPTION_LENGTH, TITLE_LENGTH, Priority, Status
from backend.web.parameters import cacheable

Title = Annotated[str, Field(min_length=1, max_length=TITLE_LENGTH), Storable, NotBlank]
Description = Annotated[str, Field(max_length=DESCRIPTION_LENGTH), Storable]

TITLE = "Title in one line; not blank."
DESCRIPTION = "Description as it was sent, or null."
STATUS = "Progress; `done` sets `completed_at`, other values clear it."
PRIORITY = "Priority, in ascending order: low, normal, high, urgent."
DUE_AT = "Due time with an offset (RFC 3339), returned in UTC; null: no due time."
TAG_NAME = "Name, not blank; unique per user regardless of case."
TAGS = "Tag names, compared regardless of case; new names create tags."

_EXAMPLE: dict[str, Any] = {
    "title": "Buy milk",
    "description": "Two litres",
    "priority": "high",
    "due_at": "2026-12-01T18:00:00Z",
    "tags": ["home"],
}


class TaskCreate(BaseModel):
    """A complete task; omitted members get their defaults."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [_EXAMPLE]})

    title: Title = Field(description=TITLE)
    description: Description | None = Field(default=None, description=DESCRIPTION)
    status: Status = Field(default=Status.todo, description=STATUS)
    priority: Priority = Field(default=Priority.normal, description=PRIORITY)
    due_at: Time | None = Field(default=None, description=DUE_AT)
    tags: Names = Field(default_factory=list, description=TAGS, json_schema_extra={"default": []})


class TaskUpdate(BaseModel):
    """A JSON merge patch (RFC 7396): omitted members do not change, null resets a member to its default."""

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
    tags: NamesOrNull = Field(default=None, json_schema_extra=without_default, description=f"Replaces all tags. {TAGS}")


class TaskRead(BaseModel):
    """A task."""

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
    tags: list[str] = Field(description="Tag names in the spelling first stored, sorted.")
    is_overdue: bool = Field(description="Whether `due_at` has passed and the task is not done.")
    completed_at: datetime | None = Field(description="Time when `status` became `done`.")
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None = Field(description="Time when the task was moved to the trash, else null.")
    version: int = Field(description="Version number, as in the ETag.")


class TaskPage(Page[TaskRead]):
    """A page of tasks."""

    total: int = Field(
        default=0, json_schema_extra=without_default, description="Number of tasks on all pages, with `count=exact`."
    )


class TaskChanges(ChangePage[TaskRead]):
    """A page of changed and deleted tasks."""


Sort = Literal[
    "created_at", "-created_at", "updated_at", "-updated_at", "due_at", "-due_at",
    "priority", "-priority", "title", "-title",
]  # fmt: skip


@cacheable
class TaskQuery(PageQuery):
    """Filters and sort order of a list. Each field that is set adds the filter of the same name."""

    status: Status | None = Field(default=None, description="Tasks with this status.", examples=["todo"])
    priority: Priority | None = Field(default=None, description="Tasks with this priority.", examples=["high"])
    # A tuple, since the statement of a query is cached and the query must be hashable.
    tag: Annotated[tuple[Name, ...], Field(max_length=MAX_NAMES)] = Field(
        default_factory=tuple,
        description="Tasks with this tag; if repeated, tasks with all of these tags.",
        examples=[["home"]],
    )
    due_before: Time | None = Field(
        default=None, description="Tasks due before this time.", examples=["2026-12-02T00:00:00Z"]
    )
    due_after: Time | None = Field(
        default=None, description="Tasks due after this time.", examples=["2026-12-01T00:00:00Z"]
    )
    overdue: Flag | None = Field(
        default=None, description="Tasks that are overdue (`true`) or not overdue (`false`).", examples=[True]
    )
    q: Annotated[str, Storable] | None = Field(
        default=None,
        max_length=200,
        description="Tasks whose title or description contains this text, regardless of case.",
        examples=["milk"],
    )
    deleted: Flag = Field(
        default=False, description="List the trash instead: tasks deleted in the last 30 days.", examples=[True]
    )
    count: Literal["exact"] | None = Field(
        default=None, description="`exact` adds `total` to the response.", examples=["exact"]
    )
    sort: Sort = Field(
        default="-created_at",
        description="Sort order; `-` for descending. Titles sort by code point, missing due dates last.",
        examples=["-due_at"],
    )


IfMatch = Annotated[
    str | None,
    Field(
        max_length=1000,
        description="Same as the header If-Match: proceed only if the version is one of these.",
        examples=['"3"'],
    ),
]


class BatchCreate(BaseModel):
    """Create a task."""

    model_config = ConfigDict(extra="forbid")

    op: Literal["create"]
    id: UUID | None = Field(default=None, description="Id chosen by the client; no task may have it yet.")
    task: TaskCreate


class BatchUpdate(BaseModel):
    """Update members of a task, as PATCH does."""

    model_config = ConfigDict(extra="forbid")

    op: Literal["update"]
    id: UUID
    changes: TaskUpdate
    if_match: IfMatch = None


class BatchDelete(BaseModel):
    """Move a task to the trash."""

    model_config = ConfigDict(extra="forbid")

    op: Literal["delete"]
    id: UUID
    if_match: IfMatch = None


Operation = Annotated[BatchCreate | BatchUpdate | BatchDelete, Field(discriminator="op")]


class Batch(BaseModel):
    """Operations that are applied in order, all or none."""

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
        min_length=1, max_length=100, description="The operations; each sees the results of the previous ones."
    )


class BatchResult(BaseModel):
    """The results of a batch."""

    items: list[TaskRead | None] = Field(description="Tasks in the order of the operations; null for deleted tasks.")


class ByStatus(BaseModel):
    """Number of tasks by status."""

    todo: int
    in_progress: int
    done: int


class TaskSummary(BaseModel):
    """Numbers of tasks, without those in the trash."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"by_status": {"todo": 4, "in_progress": 1, "done": 12}, "overdue": 2, "due_today": 1}]
        }
    )

    by_status: ByStatus = Field(description="All tasks, each counted once.")
    overdue: int = Field(description="Number of overdue tasks.")
    due_today: int = Field(description="Number of open tasks due today, in the user's time zone (default: UTC).")


class TagCreate(BaseModel):
    """Create a tag."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"name": "home"}]})

    name: Name = Field(description=TAG_NAME)


class TagUpdate(BaseModel):
    """A JSON merge patch (RFC 7396)."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"name": "at home"}]})

    name: Name = Field(default="", json_schema_extra=without_default, description=TAG_NAME)


class TagRead(BaseModel):
    """A tag."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"id": "019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f", "name": "home", "task_count": 3}]
        }
    )

    id: UUID
    name: str = Field(description="Name in the spelling first stored or last renamed to.")
    task_count: int = Field(description="Number of tasks with this tag, without those in the trash.")


class TagList(BaseModel):
    """All tags of the user."""

    items: list[TagRead] = Field(description="Tags, sorted by name.")
