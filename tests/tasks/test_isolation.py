"""Isolation: no route reaches rows of another user, even with known ids or a statement that lacks its owner filter."""

import json
from contextlib import nullcontext
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import bindparam, update
from sqlmodel import col, select

from backend.database import SYSTEM, Actor, Database, Statement
from backend.resources import idempotency
from backend.tasks import listing as task_listing
from backend.tasks import statements as task_statements
from backend.tasks import tags as tag_service
from backend.tasks.models import Task
from backend.users import export
from backend.users import statements as user_statements
from tests.conftest import Api, Person
from tests.resources.test_owned_resources import RESOURCES
from tests.support.isolation import forgotten_filter, owned_insert, owner_filter

TASKS = "/api/v1/tasks"
TAGS = "/api/v1/tags"
ME = "/api/v1/users/me"
ADMIN = "/api/v1/admin"
MODULES = task_listing, task_statements, tag_service, idempotency, user_statements, export


def statements() -> dict[str, Statement]:
    """The statements that run as the caller, one of each shape."""
    fixed = {
        f"{module.__name__}.{name}": value
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, Statement) and name not in ("LOCK_CHANGES", "LOCK")
    }
    shaped = {
        "listing": task_listing.listing(
            frozenset(task_listing.FILTERS), "created_at", continued=True, deleted=False, counted=True
        ),
        "listing of the trash": task_listing.listing(
            frozenset(), "due_at", continued=False, deleted=True, counted=False
        ),
        "change": task_statements.update_task(frozenset({"title"}), excluding=True),
        "change of tags": task_statements.update_task(frozenset({"tags"})),
        "users.change": user_statements.update_me(frozenset({"locale"})),
        **{f"export of {name}": found.first for name, found in export.listings().items()},
        **{f"further export of {name}": found.next for name, found in export.listings().items()},
    }
    return fixed | shaped


def test_every_statement_names_the_caller() -> None:
    for name, statement in statements().items():
        if statement.sql.startswith("INSERT"):
            assert owned_insert(statement).match(statement.sql), name
        else:
            assert owner_filter(statement).search(statement.sql), name


OPERATIONS = {
    ("GET", TASKS),
    ("POST", TASKS),
    ("GET", f"{TASKS}/events"),
    ("GET", f"{TASKS}/summary"),
    ("GET", f"{TASKS}/changes"),
    ("POST", f"{TASKS}/batch"),
    ("GET", f"{TASKS}/{{id}}"),
    ("PUT", f"{TASKS}/{{id}}"),
    ("PATCH", f"{TASKS}/{{id}}"),
    ("DELETE", f"{TASKS}/{{id}}"),
    ("POST", f"{TASKS}/{{id}}/restore"),
    ("GET", TAGS),
    ("POST", TAGS),
    ("PATCH", f"{TAGS}/{{id}}"),
    ("DELETE", f"{TAGS}/{{id}}"),
    ("GET", ME),
    ("PATCH", ME),
    ("DELETE", ME),
    ("GET", f"{ME}/export"),
    ("GET", f"{ADMIN}/users"),
    ("GET", f"{ADMIN}/users/{{id}}"),
    ("POST", f"{ADMIN}/users/{{id}}/suspend"),
    ("POST", f"{ADMIN}/users/{{id}}/reinstate"),
    ("GET", f"{ADMIN}/audit"),
}

# Never end; tests/sync/test_events.py tests them.
STREAMS = {("GET", f"{TASKS}/events")}

# The operations that tests/resources/test_owned_resources.py tests for each of its resources.
RESOURCE_OPERATIONS = (
    ("GET", ""),
    ("POST", ""),
    ("GET", "/changes"),
    ("GET", "/events"),
    ("GET", "/{id}"),
    ("PATCH", "/{id}"),
    ("DELETE", "/{id}"),
)


async def test_every_operation_of_the_api_takes_part(api: Api) -> None:
    documented = {
        (method.upper(), path)
        for path, methods in api.app.openapi()["paths"].items()
        for method, operation in methods.items()
        if "security" in operation
    }
    others = [resource.path for resource in RESOURCES if resource.path != TASKS]
    assert documented == OPERATIONS | {(method, path + end) for path in others for method, end in RESOURCE_OPERATIONS}


class Expected:
    """The data of one user, by id: titles of live tasks, titles of tasks in the trash, names of tags."""

    def __init__(self) -> None:
        self.live: dict[str, str] = {}
        self.trash: dict[str, str] = {}
        self.tags: dict[str, str] = {}

    def clear(self) -> None:
        for data in self.live, self.trash, self.tags:
            data.clear()


async def act_on_tags(person: Person, own: Expected, method: str, path: str, target: str) -> None:
    name = uuid4().hex
    json = {"name": name} if method in ("POST", "PATCH") else None
    response = await person.request(method, path.replace("{id}", target), json=json)
    if path == TAGS and method == "GET":
        assert {tag["id"]: tag["name"] for tag in response.json()["items"]} == own.tags
    elif path == TAGS:
        own.tags[response.json()["id"]] = name
    elif target not in own.tags:
        assert response.status_code == 404
    elif method == "PATCH":
        assert response.status_code == 200
        own.tags[target] = name
    else:
        assert response.status_code == 204
        del own.tags[target]


async def act_on_account(person: Person, own: Expected, method: str, path: str) -> None:
    response = await person.request(method, path, json={"locale": "de"} if method == "PATCH" else None)
    if method == "DELETE":
        assert response.status_code == 204
        own.clear()
    elif path == ME:
        assert response.json()["subject"] == person.subject
    else:
        lines = [json.loads(line) for line in response.text.splitlines()]
        rows = {name: [line["row"] for line in lines if line["kind"] == name] for name in ("users", "tasks", "tags")}
        assert [row["subject"] for row in rows["users"]] == [person.subject]
        assert {row["id"]: row["title"] for row in rows["tasks"]} == own.live | own.trash
        assert {row["id"]: row["name"] for row in rows["tags"]} == own.tags
        assert lines[-1] == {"kind": "end", "rows": len(lines) - 2}


async def act(person: Person, own: Expected, method: str, path: str, target: str) -> None:
    """Send a request and check the response against the user's own data."""
    if path.startswith(ME):
        await act_on_account(person, own, method, path)
        return
    if path.startswith(ADMIN):
        response = await person.request(method, path.replace("{id}", target))
        assert (response.status_code, response.json()["code"]) == (403, "forbidden")
        return
    title = uuid4().hex
    if path == f"{TASKS}/batch":
        operations = [
            {"op": "create", "task": {"title": title}},
            {"op": "update", "id": target, "changes": {"title": title}},
        ]
        response = await person.post(path, {"operations": operations})
        assert response.status_code == (200 if target in own.live else 404)
        if target in own.live:
            own.live |= {response.json()["items"][0]["id"]: title, target: title}
        return
    has_body = method in ("PUT", "PATCH") or (method, path) == ("POST", TASKS)
    response = await person.request(method, path.replace("{id}", target), json={"title": title} if has_body else None)
    match method, path.removeprefix(TASKS):
        case "GET", "":
            assert {task["id"]: task["title"] for task in response.json()["items"]} == own.live
            trashed = (await person.get(TASKS, params={"deleted": "true"})).json()["items"]
            assert {task["id"]: task["title"] for task in trashed} == own.trash
        case "GET", "/changes":
            assert {task["id"]: task["title"] for task in response.json()["items"]} == own.live
        case "GET", "/summary":
            assert response.json() == {
                "by_status": {"todo": len(own.live), "in_progress": 0, "done": 0},
                "overdue": 0,
                "due_today": 0,
            }
        case "POST", "":
            own.live[response.json()["id"]] = title
        case "DELETE", _ if target in own.live:
            assert response.status_code == 204
            own.trash[target] = own.live.pop(target)
        case "DELETE", _:
            assert response.status_code == (204 if target in own.trash else 404)
        case "POST", "/{id}/restore" if target in own.trash:
            assert response.status_code == 200
            own.live[target] = own.trash.pop(target)
            assert response.json()["title"] == own.live[target]
        case "PUT", _ if target not in own.live | own.trash:
            assert response.status_code == 201
            own.live[target] = title
        case _ if target in own.live:
            assert response.status_code == 200
            if method in ("PUT", "PATCH"):
                own.live[target] = title
            assert response.json()["title"] == own.live[target]
        case _:
            assert response.status_code == 404


@pytest.mark.parametrize("filter", ["present", "forgotten"])
@given(
    calls=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(sorted(OPERATIONS - STREAMS)), st.integers(0, 8)),
        min_size=1,
        max_size=25,
    )
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_users_who_guess_ids_reach_only_their_own_rows(
    api: Api, filter: str, calls: list[tuple[int, tuple[str, str], int]]
) -> None:
    users = [(api.person(), Expected()) for _ in range(3)]
    for person, own in users:
        await act(person, own, "POST", TASKS, "")
    with forgotten_filter(*MODULES) if filter == "forgotten" else nullcontext():
        for user, (method, path), number in calls:
            ids = sorted({id for _, own in users for id in own.live | own.trash}) or [str(uuid4())]
            tag_ids = sorted({id for _, own in users for id in own.tags}) or [str(uuid4())]
            if path.startswith(TAGS):
                await act_on_tags(*users[user], method, path, tag_ids[number % len(tag_ids)])
            else:
                await act(*users[user], method, path, ids[number % len(ids)])
        for person, own in users:
            await act(person, own, "GET", TASKS, "")
            await act_on_tags(person, own, "GET", TAGS, "")


async def test_the_database_shows_each_caller_only_their_rows(api: Api) -> None:
    unfiltered = Statement(select(col(Task.owner_id)))
    pool, ids = api.state["pool"], set()
    for person in [api.person() for _ in range(3)]:
        await person.task()
        ids.add(UUID((await person.get(ME)).json()["id"]))
    for id in ids:
        rows = await Database(pool, Actor.user(id)).rows(unfiltered)
        assert {row["owner_id"] for row in rows} == {id}
    assert await Database(pool, Actor("api_user")).rows(unfiltered) == []
    everyone = await Database(pool, SYSTEM).rows(unfiltered)
    assert {row["owner_id"] for row in everyone} >= ids


async def test_a_user_cannot_assign_rows_to_another_user(api: Api) -> None:
    """The policies of row-level security apply to the rows written, too."""
    ada, eve = api.person(), api.person()
    task = await ada.task()
    await eve.task()
    owner, other = [api.state["users"]._cached[person.subject].user for person in (ada, eve)]
    reassign = Statement(update(Task).values(owner_id=bindparam("new_owner")).returning(col(Task.id)))
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
        await Database(api.state["pool"], owner.actor).rows(reassign, new_owner=other.id)
    assert (await ada.get(f"{TASKS}/{task['id']}")).json() == task
