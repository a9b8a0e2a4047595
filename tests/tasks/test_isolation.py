"""Nobody reaches anybody else's rows: by any route, with ids guessed rightly, even where the filter is forgotten."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import bindparam, update
from sqlmodel import col, select

from backend.database import SYSTEM, Actor, Database, Statement
from backend.tasks import service as task_service
from backend.tasks.models import Task
from backend.users import service as user_service
from tests.conftest import Api, Person

TASKS = "/api/v1/tasks"
OWNER_FILTER = re.compile(r"(tasks\.owner_id|users\.id) = %\(caller\)s::UUID")


def without_owner(sql: str) -> str:
    return OWNER_FILTER.sub("%(caller)s::UUID IS NOT NULL", sql)


def statements() -> dict[str, Statement]:
    """Every statement of the services that run as the caller, one of each shape."""
    fixed = {
        f"{module.__name__}.{name}": value
        for module in (task_service, user_service)
        for name, value in vars(module).items()
        if isinstance(value, Statement)
    }
    shaped = {
        "listing": task_service.listing(
            frozenset(task_service.FILTERS), "created_at", continued=True, deleted=False, counted=True
        ),
        "listing of the bin": task_service.listing(frozenset(), "due_at", continued=False, deleted=True, counted=False),
        "change": task_service.change(frozenset({"title"})),
        "users.change": user_service.change(frozenset({"locale"})),
    }
    return fixed | shaped


@contextmanager
def forgotten_filter() -> Iterator[None]:
    """The services as a careless colleague would have left them: no statement asks who the owner is."""
    shapes = (task_service.listing, task_service.change, user_service.change)
    original = Statement.__init__

    def careless(self: Statement, clause: Any) -> None:
        original(self, clause)
        self.sql = without_owner(self.sql)

    with pytest.MonkeyPatch.context() as patch:
        for statement in statements().values():
            patch.setattr(statement, "sql", without_owner(statement.sql))
        for shape in shapes:
            shape.cache_clear()
        patch.setattr(Statement, "__init__", careless)
        yield
    for shape in shapes:
        shape.cache_clear()


def test_every_statement_of_a_service_names_the_caller() -> None:
    for name, statement in statements().items():
        if statement.sql.startswith("INSERT"):
            assert re.match(r"INSERT INTO tasks \(owner_id, .*\) VALUES \(%\(caller\)s::UUID, ", statement.sql), name
        else:
            assert OWNER_FILTER.search(statement.sql), name


OPERATIONS = {
    ("GET", TASKS),
    ("POST", TASKS),
    ("GET", f"{TASKS}/{{id}}"),
    ("PATCH", f"{TASKS}/{{id}}"),
    ("DELETE", f"{TASKS}/{{id}}"),
    ("GET", "/api/v1/users/me"),
    ("PATCH", "/api/v1/users/me"),
}


async def test_every_operation_of_the_api_takes_part(api: Api) -> None:
    offered = {
        (method.upper(), path)
        for path, methods in api.app.openapi()["paths"].items()
        for method in methods
        if path.startswith("/api/")
    }
    assert offered == OPERATIONS


async def act(person: Person, own: dict[str, str], method: str, path: str, target: str) -> None:
    """One call, and what it must answer to somebody who owns `own` (id -> title)."""
    if path.startswith("/api/v1/users"):
        response = await person.request(method, path, json={"locale": "de"} if method == "PATCH" else None)
        assert response.json()["subject"] == person.subject
        return
    body = {"title": uuid4().hex} if method in ("POST", "PATCH") else None
    response = await person.request(method, path.replace("{id}", target), json=body)
    if path == TASKS:
        if method == "POST":
            own[response.json()["id"]] = response.json()["title"]
        else:
            assert {task["id"]: task["title"] for task in response.json()["items"]} == own
    elif target in own:
        assert response.status_code in (200, 204)
        if method == "PATCH":
            own[target] = response.json()["title"]
        elif method == "DELETE":
            del own[target]
        else:
            assert response.json()["title"] == own[target]
    else:
        assert response.status_code in (404, 204)
        assert response.status_code == 404 or method == "DELETE"


@pytest.mark.parametrize("filter", ["present", "forgotten"])
@given(
    calls=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(sorted(OPERATIONS)), st.integers(0, 8)), min_size=1, max_size=25
    )
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_three_people_who_guess_each_others_ids(
    api: Api, filter: str, calls: list[tuple[int, tuple[str, str], int]]
) -> None:
    people = [api.person() for _ in range(3)]
    owned: list[dict[str, str]] = [{}, {}, {}]
    for person, own in zip(people, owned, strict=True):
        task = await person.task(uuid4().hex)
        own[task["id"]] = task["title"]
    deleted: list[set[str]] = [set(), set(), set()]
    with forgotten_filter() if filter == "forgotten" else nullcontext():
        for who, (method, path), which in calls:
            ids = sorted({id for own in owned for id in own} | set().union(*deleted))
            target = ids[which % len(ids)] if ids else str(uuid4())
            before = set(owned[who])
            if method == "DELETE" and target not in owned[who] and target not in deleted[who]:
                response = await people[who].delete(path.replace("{id}", target))
                assert response.status_code == 404
            else:
                await act(people[who], owned[who], method, path, target)
            deleted[who] |= before - set(owned[who])
    for person, own in zip(people, owned, strict=True):
        await act(person, own, "GET", TASKS, "")


async def test_the_database_shows_each_caller_only_their_rows(api: Api) -> None:
    careless = Statement(select(col(Task.owner_id)))
    people = [api.person() for _ in range(3)]
    ids = {}
    for person in people:
        await person.task()
        ids[person.subject] = (await person.get("/api/v1/users/me")).json()["id"]
    pool = api.state["pool"]
    for person in people:
        user = api.state["users"]._known[person.subject]
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
    known = api.state["users"]._known
    steal = Statement(update(Task).values(owner_id=bindparam("thief")).returning(col(Task.id)))
    with pytest.raises(Exception, match="row-level security"):
        await Database(api.state["pool"], Actor.user(known[ada.subject].id)).rows(steal, thief=known[eve.subject].id)
    assert (await ada.get(f"{TASKS}/{task['id']}")).json() == task
