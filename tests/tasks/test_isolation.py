"""Nobody reaches anybody else's rows: by any route, with ids guessed rightly, even where the filter is forgotten."""

import json
from contextlib import nullcontext
from uuid import uuid4

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
    """Every statement of the services that run as the caller, one of each shape."""
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


def test_every_statement_of_a_service_names_the_caller() -> None:
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

# They end when their reader goes; tests/sync/test_events.py looks at what they tell.
STREAMS = {("GET", f"{TASKS}/events")}

# What tests/resources/test_owned_resources.py tries of each resource that it knows.
USUAL = (
    ("GET", ""),
    ("POST", ""),
    ("GET", "/changes"),
    ("GET", "/events"),
    ("GET", "/{id}"),
    ("PATCH", "/{id}"),
    ("DELETE", "/{id}"),
)


async def test_every_operation_of_the_api_takes_part(api: Api) -> None:
    offered = {
        (method.upper(), path)
        for path, methods in api.app.openapi()["paths"].items()
        for method, operation in methods.items()
        if "security" in operation
    }
    others = [resource.path for resource in RESOURCES if resource.path != TASKS]
    assert offered == OPERATIONS | {(method, path + end) for path in others for method, end in USUAL}


class Belongings:
    """What one person must find: the titles of their tasks, by id, those of the bin, and the names of their tags."""

    def __init__(self) -> None:
        self.live: dict[str, str] = {}
        self.bin: dict[str, str] = {}
        self.tags: dict[str, str] = {}

    def clear(self) -> None:
        for kind in self.live, self.bin, self.tags:
            kind.clear()


async def act_on_tags(person: Person, own: Belongings, method: str, path: str, target: str) -> None:
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


async def act_on_oneself(person: Person, own: Belongings, method: str, path: str) -> None:
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
        assert {row["id"]: row["title"] for row in rows["tasks"]} == own.live | own.bin
        assert {row["id"]: row["name"] for row in rows["tags"]} == own.tags
        assert lines[-1] == {"kind": "end", "rows": len(lines) - 2}


async def act(person: Person, own: Belongings, method: str, path: str, target: str) -> None:
    """One call, and what it must answer to somebody who has these belongings."""
    if path.startswith(ME):
        await act_on_oneself(person, own, method, path)
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
    with_body = method in ("PUT", "PATCH") or (method, path) == ("POST", TASKS)
    response = await person.request(method, path.replace("{id}", target), json={"title": title} if with_body else None)
    match method, path.removeprefix(TASKS):
        case "GET", "":
            assert {task["id"]: task["title"] for task in response.json()["items"]} == own.live
            binned = (await person.get(TASKS, params={"deleted": "true"})).json()["items"]
            assert {task["id"]: task["title"] for task in binned} == own.bin
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
            own.bin[target] = own.live.pop(target)
        case "DELETE", _:
            assert response.status_code == (204 if target in own.bin else 404)
        case "POST", "/{id}/restore" if target in own.bin:
            assert response.status_code == 200
            own.live[target] = own.bin.pop(target)
            assert response.json()["title"] == own.live[target]
        case "PUT", _ if target not in own.live | own.bin:
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
async def test_three_people_who_guess_each_others_ids(
    api: Api, filter: str, calls: list[tuple[int, tuple[str, str], int]]
) -> None:
    people = [(api.person(), Belongings()) for _ in range(3)]
    for person, own in people:
        await act(person, own, "POST", TASKS, "")
    with forgotten_filter(*MODULES) if filter == "forgotten" else nullcontext():
        for who, (method, path), which in calls:
            ids = sorted({id for _, own in people for id in own.live | own.bin}) or [str(uuid4())]
            tag_ids = sorted({id for _, own in people for id in own.tags}) or [str(uuid4())]
            if path.startswith(TAGS):
                await act_on_tags(*people[who], method, path, tag_ids[which % len(tag_ids)])
            else:
                await act(*people[who], method, path, ids[which % len(ids)])
        for person, own in people:
            await act(person, own, "GET", TASKS, "")
            await act_on_tags(person, own, "GET", TAGS, "")


async def test_the_database_shows_each_caller_only_their_rows(api: Api) -> None:
    careless = Statement(select(col(Task.owner_id)))
    people = [api.person() for _ in range(3)]
    ids = {}
    for person in people:
        await person.task()
        ids[person.subject] = (await person.get("/api/v1/users/me")).json()["id"]
    pool = api.state["pool"]
    for person in people:
        user = api.state["users"]._cached[person.subject].user
        rows = await Database(pool, Actor.user(user.id)).rows(careless)
        assert {str(row["owner_id"]) for row in rows} == {ids[person.subject]}
    assert await Database(pool, Actor("api_user")).rows(careless) == []
    everyone = await Database(pool, SYSTEM).rows(careless)
    assert {str(row["owner_id"]) for row in everyone} >= set(ids.values())


async def test_nobody_writes_into_anothers_name(api: Api) -> None:
    """The policy holds for what is written as well: no careless statement makes a row that is somebody else's."""
    ada, eve = api.person(), api.person()
    task = await ada.task()
    await eve.task()
    known = api.state["users"]._cached
    steal = Statement(update(Task).values(owner_id=bindparam("thief")).returning(col(Task.id)))
    with pytest.raises(Exception, match="row-level security"):
        await Database(api.state["pool"], known[ada.subject].user.actor).rows(steal, thief=known[eve.subject].user.id)
    assert (await ada.get(f"{TASKS}/{task['id']}")).json() == task
