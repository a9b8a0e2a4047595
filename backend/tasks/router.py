"""/api/v1/tasks: HTTP in, HTTP out."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response

from backend.resources import idempotency, pagination, responses
from backend.resources.responses import Answer
from backend.sync.changes import ChangesQuery
from backend.sync.event_stream import EVENTS, LastEventId, Stream
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
from backend.users.caller import REFUSALS, CallerDatabase, route_for
from backend.web import openapi

Route = route_for(read="tasks:read", write="tasks:write")
BatchRoute = route_for(read="tasks:read", write="tasks:write", body_limit=1024 * 1024)
router = APIRouter(prefix="/api/v1/tasks", tags=["tasks"], route_class=Route, responses=REFUSALS)
batch_router = APIRouter(prefix="/api/v1/tasks", tags=["tasks"], route_class=BatchRoute, responses=REFUSALS)
tags_router = APIRouter(prefix="/api/v1/tags", tags=["tasks"], route_class=Route, responses=REFUSALS)


async def caller_tasks(database: CallerDatabase) -> TaskService:
    return TaskService(database)


async def caller_tags(database: CallerDatabase) -> TagService:
    return TagService(database)


Tasks = Annotated[TaskService, Depends(caller_tasks)]
Tags = Annotated[TagService, Depends(caller_tags)]

one, many = Answer(TaskRead), Answer(TaskRead, many=True)
summary = Answer(TaskSummary)
one_tag, all_tags = Answer(TagRead), Answer(TagRead, many=True)


@router.get(
    "",
    response_model=TaskPage,
    responses=openapi.responses(422, headers={200: pagination.LINK}),
)
async def list_tasks(request: Request, tasks: Tasks, query: Annotated[TaskQuery, Query()]) -> Response:
    """The caller's tasks, newest first unless sorted otherwise."""
    page = await tasks.list(query)
    return many(page, headers=pagination.link(request, page["next_cursor"]))


@router.post(
    "",
    response_model=TaskRead,
    status_code=201,
    responses=openapi.responses(
        409, 413, 415, 422, headers={201: responses.ETAG | responses.LOCATION | idempotency.REPLAYED}
    ),
)
async def create_task(
    request: Request, tasks: Tasks, database: CallerDatabase, data: TaskCreate, key: idempotency.Key = None
) -> Response:
    """Make a task. The server chooses its id. With an Idempotency-Key it is safe to ask again."""

    async def create(tasks: TaskService) -> Response:
        return one.created(request, await tasks.create(data))

    if key is None:
        return await create(tasks)
    return await idempotency.once(database, request, key, lambda transaction: create(TaskService(transaction)))


@batch_router.post(
    "/batch",
    response_model=BatchResult,
    responses=openapi.responses(404, 409, 412, 413, 415, 422, headers={200: idempotency.REPLAYED}),
)
async def batch_tasks(
    request: Request, tasks: Tasks, database: CallerDatabase, data: Batch, key: idempotency.Key = None
) -> Response:
    """Create, change and delete up to 100 tasks: all of it or nothing. `errors` names the operation that cannot be."""

    async def batch(tasks: TaskService) -> Response:
        return many({"items": [row and one.members(row) for row in await tasks.batch(data.operations)]})

    if key is None:
        return await batch(tasks)
    return await idempotency.once(database, request, key, lambda transaction: batch(TaskService(transaction)))


@router.get("/summary", response_model=TaskSummary)
async def get_summary(tasks: Tasks) -> Response:
    """How many tasks there are, by status, overdue and due today."""
    return summary(await tasks.summary())


@router.get("/changes", response_model=TaskChanges, responses=openapi.responses(410, 422))
async def list_changes(database: CallerDatabase, query: Annotated[ChangesQuery, Query()]) -> Response:
    """What was made, changed or deleted since `since`, in the order of commits: pass each `next` on, and miss nothing.

    Without `since` everything that there is, to begin a copy with. 410: what was deleted meanwhile is forgotten after
    30 days, so begin a new copy.
    """
    return await FEED.answer(database, query)


@router.get("/events", response_class=Response, responses=openapi.responses(410, 422) | EVENTS)
async def stream_changes(request: Request, database: CallerDatabase, last_event_id: LastEventId = None) -> Response:
    """What changes from now on, or since the event of the Last-Event-ID, within a second: server-sent events.

    Each has the `event` `task`, as `data` an item of the list of changes, and as `id` a token to go on from, here or
    there. The last one is `end`, with a `reason`, and says nothing of tasks: come back with a fresh token.
    """
    return Stream(request, database, FEED, last_event_id)


@router.get(
    "/{id:uuid}",
    response_model=TaskRead,
    responses=openapi.responses(404, headers={200: responses.ETAG}) | responses.NOT_MODIFIED,
    openapi_extra={"parameters": [responses.IF_NONE_MATCH]},
)
async def get_task(request: Request, tasks: Tasks, id: UUID) -> Response:
    """One task, or 304 if If-None-Match names the version that there is."""
    return one.unless_known(request, await tasks.get(id))


@router.put(
    "/{id:uuid}",
    response_model=TaskRead,
    responses=openapi.responses(404, 412, 413, 415, 422, headers={200: responses.ETAG})
    | {201: {"description": "It was made.", "model": TaskRead, "headers": responses.ETAG | responses.LOCATION}},
    openapi_extra={"parameters": [responses.IF_MATCH, responses.IF_NONE_MATCH_ON_PUT]},
)
async def put_task(request: Request, tasks: Tasks, id: UUID, data: TaskCreate) -> Response:
    """Replace a task, or make one under an id of the client's own choice: members left out get their defaults.

    With If-Match only if the version is still that one, with `If-None-Match: *` only if there is none.
    """
    task, created = await tasks.put(
        id,
        data,
        if_match=responses.if_match(request),
        if_none_match=responses.if_none_match(request),
        must_exist="if-match" in request.headers,
    )
    return one.versioned(task, 201, Location=request.scope["path"]) if created else one.versioned(task)


@router.patch(
    "/{id:uuid}",
    response_model=TaskRead,
    responses=openapi.responses(404, 412, 413, 415, 422, headers={200: responses.ETAG}),
    openapi_extra={"parameters": [responses.IF_MATCH]},
)
async def update_task(request: Request, tasks: Tasks, id: UUID, data: TaskUpdate) -> Response:
    """Change some members (JSON merge patch). With If-Match only if the version is still that one."""
    return one.versioned(await tasks.update(id, data, if_match=responses.if_match(request)))


@router.delete(
    "/{id:uuid}",
    status_code=204,
    response_class=Response,  # no content, so none of any type
    responses=openapi.responses(404, 412),
    openapi_extra={"parameters": [responses.IF_MATCH]},
)
async def delete_task(request: Request, tasks: Tasks, id: UUID) -> None:
    """Put a task into the bin, for 30 days. Doing it twice is no error."""
    await tasks.delete(id, if_match=responses.if_match(request))


@router.post(
    "/{id:uuid}/restore",
    response_model=TaskRead,
    responses=openapi.responses(404, 412, headers={200: responses.ETAG}),
    openapi_extra={"parameters": [responses.IF_MATCH]},
)
async def restore_task(request: Request, tasks: Tasks, id: UUID) -> Response:
    """Take a task out of the bin, up to 30 days after it was deleted. One that is not in it is left as it is."""
    return one.versioned(await tasks.restore(id, if_match=responses.if_match(request)))


@tags_router.get("", response_model=TagList)
async def list_tags(tags: Tags) -> Response:
    """All of the caller's tags, sorted by name."""
    return all_tags({"items": await tags.list()})


@tags_router.post("", response_model=TagRead, status_code=201, responses=openapi.responses(409, 413, 415, 422))
async def create_tag(tags: Tags, data: TagCreate) -> Response:
    """Make a tag. Giving a task a tag that is new does so, too."""
    return one_tag(await tags.create(data), 201)


@tags_router.patch("/{id:uuid}", response_model=TagRead, responses=openapi.responses(404, 409, 413, 415, 422))
async def update_tag(tags: Tags, id: UUID, data: TagUpdate) -> Response:
    """Rename a tag: a new version of each task that has it."""
    return one_tag(await tags.update(id, data))


@tags_router.delete("/{id:uuid}", status_code=204, response_class=Response, responses=openapi.responses(404))
async def delete_tag(tags: Tags, id: UUID) -> None:
    """Delete a tag: a new version of each task that had it."""
    await tags.delete(id)
