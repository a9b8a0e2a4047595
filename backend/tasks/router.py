"""Routes of tasks and tags."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from backend.database import Database, Transaction
from backend.resources import idempotency, pagination, responses
from backend.resources.responses import Answer
from backend.sync.changes import ChangesQuery
from backend.sync.event_stream import EVENTS, LastEventId, Stream
from backend.tasks.auth import TasksRead, TasksWrite
from backend.tasks.schemas import (
    Batch,
    BatchResult,
    TagCreate,
    TagList,
    TagRead,
    TagUpdate,
    TaskChanges,
    TaskCreate,
    TaskPage,
    TaskQuery,
    TaskRead,
    TaskSummary,
    TaskUpdate,
)
from backend.tasks.service import FEED, TaskService
from backend.tasks.tags import TagService
from backend.users.caller import REFUSALS, CallerRoute
from backend.web import openapi
from backend.web.request_state import public_path


class BatchRoute(CallerRoute):
    body_limit = 1024 * 1024  # bytes


router = APIRouter(prefix="/api/v1/tasks", tags=["tasks"], route_class=CallerRoute, responses=REFUSALS)
batch_router = APIRouter(prefix="/api/v1/tasks", tags=["tasks"], route_class=BatchRoute, responses=REFUSALS)
tags_router = APIRouter(prefix="/api/v1/tags", tags=["tasks"], route_class=CallerRoute, responses=REFUSALS)

task_response, tasks_response = Answer(TaskRead), Answer(TaskRead, many=True)
summary_response = Answer(TaskSummary)
tag_response, tags_response = Answer(TagRead), Answer(TagRead, many=True)


@router.get("", response_model=TaskPage, responses=openapi.responses(422, headers={200: pagination.LINK}))
async def list_tasks(request: Request, caller: TasksRead, query: Annotated[TaskQuery, Query()]) -> Response:
    """List tasks, newest first by default."""
    page = await TaskService(caller.database).list(query)
    return tasks_response(page, headers=pagination.link(request, page["next_cursor"]))


@router.post(
    "",
    response_model=TaskRead,
    status_code=201,
    responses=openapi.responses(
        409, 413, 415, 422, headers={201: responses.ETAG | responses.LOCATION | idempotency.REPLAYED}
    ),
)
async def create_task(request: Request, caller: TasksWrite, data: TaskCreate, key: idempotency.Key = None) -> Response:
    """Create a task. The server chooses its id. Retries are safe with an Idempotency-Key."""

    async def create(database: Database | Transaction) -> Response:
        return task_response.created(request, await TaskService(database).create(data))

    if key is None:
        return await create(caller.database)
    return await idempotency.once(caller.database, request, key, create)


@batch_router.post(
    "/batch",
    response_model=BatchResult,
    responses=openapi.responses(404, 409, 412, 413, 415, 422, headers={200: idempotency.REPLAYED}),
)
async def batch_tasks(request: Request, caller: TasksWrite, data: Batch, key: idempotency.Key = None) -> Response:
    """Create, update and delete up to 100 tasks, all or none. `errors` names the operation that failed."""

    async def batch(database: Database | Transaction) -> Response:
        rows = await TaskService(database).batch(data.operations)
        return tasks_response({"items": [row and task_response.members(row) for row in rows]})

    if key is None:
        return await batch(caller.database)
    return await idempotency.once(caller.database, request, key, batch)


@router.get("/summary", response_model=TaskSummary)
async def get_summary(caller: TasksRead) -> Response:
    """Count tasks: by status, overdue and due today."""
    return summary_response(await TaskService(caller.database).summary())


@router.get("/changes", response_model=TaskChanges, responses=openapi.responses(410, 422))
async def list_changes(caller: TasksRead, query: Annotated[ChangesQuery, Query()]) -> Response:
    """List tasks created, updated or deleted after the sync token `since`, in commit order.

    Without `since`, a new sync begins with all tasks. Pass each `next` as the following `since` to miss no change. A
    token that is older than deletions removed after 30 days gets 410: start a new sync.
    """
    return await FEED.answer(caller.database, query)


@router.get("/events", response_class=Response, responses=openapi.responses(410, 422) | EVENTS)
async def stream_changes(request: Request, caller: TasksRead, last_event_id: LastEventId = None) -> Response:
    """Stream changes of tasks as server-sent events, from now or after Last-Event-ID, within a second.

    An event `task` has an item of the list of changes as `data` and a sync token as `id`, valid for this stream and for
    the list. The last event is `end` with a `reason`: reconnect, with a new access token if it has expired.
    """
    return Stream(request, caller, FEED, last_event_id)


@router.get(
    "/{id:uuid}",
    response_model=TaskRead,
    responses=openapi.responses(404, headers={200: responses.ETAG}) | responses.NOT_MODIFIED,
    openapi_extra={"parameters": [responses.IF_NONE_MATCH]},
)
async def get_task(request: Request, caller: TasksRead, id: UUID) -> Response:
    """Get a task, or 304 if If-None-Match contains its current version."""
    return task_response.unless_known(request, await TaskService(caller.database).get(id))


@router.put(
    "/{id:uuid}",
    response_model=TaskRead,
    responses=openapi.responses(404, 412, 413, 415, 422, headers={200: responses.ETAG})
    | {
        201: {"description": "The task was created.", "model": TaskRead, "headers": responses.ETAG | responses.LOCATION}
    },
    openapi_extra={"parameters": [responses.IF_MATCH, responses.IF_NONE_MATCH_ON_PUT]},
)
async def put_task(request: Request, caller: TasksWrite, id: UUID, data: TaskCreate) -> Response:
    """Replace a task, or create it with an id chosen by the client. Omitted members get their defaults.

    With If-Match, only if the version matches; with `If-None-Match: *`, only if the task does not exist.
    """
    task, created = await TaskService(caller.database).put(
        id,
        data,
        if_match=responses.if_match(request),
        if_none_match=responses.if_none_match(request),
        must_exist="if-match" in request.headers,
    )
    return (
        task_response.versioned(task, 201, Location=public_path(request.scope))
        if created
        else task_response.versioned(task)
    )


@router.patch(
    "/{id:uuid}",
    response_model=TaskRead,
    responses=openapi.responses(404, 412, 413, 415, 422, headers={200: responses.ETAG}),
    openapi_extra={"parameters": [responses.IF_MATCH]},
)
async def update_task(request: Request, caller: TasksWrite, id: UUID, data: TaskUpdate) -> Response:
    """Update members of a task (JSON merge patch). With If-Match, only if the version matches."""
    task = await TaskService(caller.database).update(id, data, if_match=responses.if_match(request))
    return task_response.versioned(task)


@router.delete(
    "/{id:uuid}",
    status_code=204,
    response_class=Response,  # no content, so no media type
    responses=openapi.responses(404, 412),
    openapi_extra={"parameters": [responses.IF_MATCH]},
)
async def delete_task(request: Request, caller: TasksWrite, id: UUID) -> None:
    """Move a task to the trash for 30 days. Repeating the request is not an error."""
    await TaskService(caller.database).delete(id, if_match=responses.if_match(request))


@router.post(
    "/{id:uuid}/restore",
    response_model=TaskRead,
    responses=openapi.responses(404, 412, headers={200: responses.ETAG}),
    openapi_extra={"parameters": [responses.IF_MATCH]},
)
async def restore_task(request: Request, caller: TasksWrite, id: UUID) -> Response:
    """Restore a task from the trash, up to 30 days after it was deleted. Other tasks do not change."""
    task = await TaskService(caller.database).restore(id, if_match=responses.if_match(request))
    return task_response.versioned(task)


@tags_router.get("", response_model=TagList)
async def list_tags(caller: TasksRead) -> Response:
    """List all tags, sorted by name."""
    return tags_response({"items": await TagService(caller.database).list()})


@tags_router.post("", response_model=TagRead, status_code=201, responses=openapi.responses(409, 413, 415, 422))
async def create_tag(caller: TasksWrite, data: TagCreate) -> Response:
    """Create a tag. Giving a task a new tag creates it as well."""
    return tag_response(await TagService(caller.database).create(data), 201)


@tags_router.patch("/{id:uuid}", response_model=TagRead, responses=openapi.responses(404, 409, 413, 415, 422))
async def update_tag(caller: TasksWrite, id: UUID, data: TagUpdate) -> Response:
    """Rename a tag. Each task with this tag gets a new version."""
    return tag_response(await TagService(caller.database).update(id, data))


@tags_router.delete("/{id:uuid}", status_code=204, response_class=Response, responses=openapi.responses(404))
async def delete_tag(caller: TasksWrite, id: UUID) -> None:
    """Delete a tag. Each task with this tag gets a new version."""
    await TagService(caller.database).delete(id)
