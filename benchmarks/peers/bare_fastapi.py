"""The cost of FastAPI itself: a page of fixed objects through a response model, without token or database."""

from datetime import UTC, datetime
from typing import Literal
from uuid import UUID

from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.workloads import NEW_TASK


class Task(BaseModel):
    id: UUID
    title: str
    description: str | None
    status: Literal["todo", "in_progress", "done"]
    priority: Literal["low", "normal", "high", "urgent"]
    due_at: datetime | None
    tags: list[str]
    is_overdue: bool
    completed_at: datetime | None
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None
    version: int


class Page(BaseModel):
    items: list[Task]
    next_cursor: str | None


def task(number: int) -> Task:
    now = datetime.now(UTC)
    return Task(
        id=UUID(int=number),
        title=NEW_TASK["title"],
        description=NEW_TASK["description"],
        status="todo",
        priority="high",
        due_at=now,
        tags=[],
        is_overdue=False,
        completed_at=now if number % 3 == 0 else None,
        created_at=now,
        updated_at=now,
        deleted_at=None,
        version=1,
    )


def create_app() -> FastAPI:
    app = FastAPI()
    page = Page(items=[task(number) for number in range(20)], next_cursor="x" * 128)

    @app.get("/api/v1/tasks")
    async def list_tasks(limit: int = 20) -> Page:
        return page if limit == len(page.items) else Page(items=page.items[:limit], next_cursor=page.next_cursor)

    return app
