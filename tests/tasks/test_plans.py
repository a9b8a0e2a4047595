"""No listing reads the whole table, or rows of others, and a sort that is offered has its index."""

from collections.abc import Iterator
from itertools import product
from typing import get_args
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlmodel import col, select

from backend import migrations
from backend.database import Actor, Cost, Database, Pool, Statement
from backend.database.job import Job
from backend.resources.retention import expiring_tables
from backend.tasks import listing, statements
from backend.tasks.listing import bound_listing
from backend.tasks.models import Priority, Task
from backend.tasks.schemas import Sort, TaskQuery
from backend.tasks.service import TaskService
from benchmarks import plans
from benchmarks.plans import Mode, Shape
from tests.conftest import create_database

# Each filter alone, and all of them; `python -m benchmarks.plans` tries every combination.
SHAPES = [shape for shape in plans.shapes() if len(shape.filters) in (0, 1, len(listing.FILTERS))]


@pytest.fixture(scope="module")
def seeded(postgres: str) -> Iterator[psycopg.Connection]:
    url = create_database(postgres, f"plans_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    with psycopg.connect(url) as connection:
        plans.seed(connection, rows=20_000, owners=100, most=200)
        wrong = "SELECT FROM tasks WHERE tag_names <> names_of_tags(owner_id, id)"
        assert connection.execute(wrong).fetchall() == []
        yield connection


@pytest.fixture
def owner(seeded: psycopg.Connection) -> UUID:
    """One of a hundred, as whom the connection then speaks."""
    seeded.rollback()  # to the login, who sees everybody
    found = plans.people(seeded)[1].id
    plans.become(seeded, found)
    return found


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("sort", get_args(Sort))
def test_no_listing_reads_rows_of_others(seeded: psycopg.Connection, owner: UUID, sort: str, mode: Mode) -> None:
    for shape in SHAPES:
        if shape.sort == sort and shape.counted is not shape.continued:
            plan = plans.explain(seeded, shape.statement, shape.values, owner, mode)
            assert plans.reads(plan), shape
            assert not plans.strays(plan), shape


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("sort", get_args(Sort))
def test_every_sort_is_read_from_its_index(seeded: psycopg.Connection, owner: UUID, sort: str, mode: Mode) -> None:
    """Without sorting, so that page 2,000 costs what page 1 does: the index begins where the cursor points."""
    for continued in False, True:
        shape = Shape(frozenset(), sort, continued=continued, deleted=False, counted=False)
        plan = plans.explain(seeded, shape.statement, shape.values, owner, mode)
        (scan,) = [node for node in plan if node.get("Relation Name") == "tasks"]
        assert plans.way(plan) == "the index of the sort, in its order"
        assert ("ROW(" in scan["Index Cond"]) is continued


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("sort", get_args(Sort))
def test_a_search_visits_no_table(seeded: psycopg.Connection, owner: UUID, sort: str, mode: Mode) -> None:
    """But for the first rows of the listing, for texts that are too long for an index, and for the page itself."""
    for filters, continued in product(({"q"}, {"q", "status", "priority", "due_after", "overdue"}), (False, True)):
        shape = Shape(frozenset(filters), sort, continued=continued, deleted=False, counted=True)
        plan = plans.explain(seeded, shape.statement, shape.values, owner, mode)
        kinds = [node["Node Type"] for node in plan if node.get("Index Name") == "tasks_by_text"]
        assert kinds == ["Index Only Scan"] * 2  # the page, and the count
        (start,) = [node for node in plan if node.get("Alias") == "start"]
        assert start["Plans"][0]["Node Type"] == "Limit"
        assert start["Plans"][0]["Plan Rows"] <= listing.SCANNED_FIRST
        walked = [node for node in plans.nodes(start) if node.get("Relation Name") == "tasks"]
        assert len([node for node in plan if node.get("Relation Name") == "tasks"]) == 2 + 2 + 1 + len(walked)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_changes_are_read_in_their_order(seeded: psycopg.Connection, owner: UUID, mode: Mode) -> None:
    """From where the token points, as many as were asked for: a quiet copy costs the same, however much it holds."""
    for start in None, 5_000:
        values = {"after_n": 5_000, "after_id": UUID(int=0), "start": start, "limit": 11}
        plan = plans.explain(seeded, statements.CHANGES, values, owner, mode)
        assert set(plans.strays(plan)) <= {"Seq Scan on change_counters"}  # a hundred are one page
        (page,) = [node for node in plan if node.get("Index Name") == "tasks_by_number"]
        assert "ROW(" in page["Index Cond"]
        (limit,) = [node for node in plan if node["Node Type"] == "Limit" and page in plans.nodes(node)]
        assert "Sort" not in {node["Node Type"] for node in limit["Plans"]}


def test_what_is_not_one_page_of_an_index_runs_apart() -> None:
    costs = {shape: shape.statement.cost for shape in SHAPES}
    assert set(costs.values()) == set(Cost)
    for shape, cost in costs.items():
        assert (cost is Cost.long) is bool(shape.filters or shape.deleted or shape.counted), shape


async def test_a_listing_is_planned_once_for_everybody(postgres: str) -> None:
    """Left alone, PostgreSQL plans it anew at each request of somebody who has more tasks than others."""
    url = create_database(postgres, f"plans_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    with psycopg.connect(url) as connection:
        plans.seed(connection, rows=6_000, owners=100, most=3_000)
        owners = plans.people(connection)
    first, with_count, asked = TaskQuery(limit=5), TaskQuery(count="exact"), 10
    async with Pool(url, size=5) as pool:
        for _, owner in product(range(asked), owners):
            tasks = TaskService(Database(pool, Actor.user(owner.id)))
            page = await tasks.list(first)
            next = TaskQuery(limit=5, cursor=page["next_cursor"])
            assert (await tasks.list(next))["items"]
            await tasks.list(with_count)
            await tasks.list(TaskQuery(priority=Priority.high))
        counts = "SELECT statement, generic_plans, custom_plans FROM pg_prepared_statements"
        connections = (*pool.lanes.readers, *pool.lanes.searching.connections)
        rows = [row for shared in connections for row in await shared.run(Job("SELECT $1, $2", ("", ""), counts, ()))]
    planned = {row["statement"]: (row["generic_plans"], row["custom_plans"]) for row in rows}
    for query in first, next, with_count:
        assert planned[bound_listing(query).statement.sql] == (asked * len(owners), 0)
    narrowed = bound_listing(TaskQuery(priority=Priority.high)).statement.sql
    assert planned[narrowed][1] > 0, "where a filter decides what is best, that is left to PostgreSQL"


_KEPT = """
INSERT INTO idempotency_keys (owner_id, key, fingerprint, status, headers, body, created_at)
SELECT users.id, n::text, '', 200, '{}', 'an answer', now() - n * interval '1 minute'
FROM users, generate_series(1, 1500) n;
INSERT INTO security_events (issuer, jti, received_at)
SELECT 'i', n::text, now() - n * interval '1 minute' FROM generate_series(1, 100000) n;
INSERT INTO erasures (issuer, subject, roles, erased_at)
SELECT 'i', n::text, '{}', now() - n * interval '1 minute' FROM generate_series(1, 100000) n;
"""
FROM_AN_INDEX = {"Limit", "LockRows", "Index Scan", "Index Only Scan"}
READ_BY_AGE = {
    "tasks": "tasks_to_purge",
    "idempotency_keys": "idempotency_keys_to_purge",
    "security_events": "security_events_by_age",
    "erasures": "erasures_by_age",
}


@pytest.mark.parametrize("mode", get_args(Mode))
def test_the_purge_finds_what_has_expired_in_an_index(seeded: psycopg.Connection, mode: Mode) -> None:
    """The oldest rows first, without sorting: the number of rows that have not expired adds nothing to the cost."""
    seeded.rollback()
    seeded.execute(_KEPT)
    seeded.execute("ANALYZE idempotency_keys, security_events, erasures")
    seeded.execute("SELECT set_config('role', 'api_system', true)")
    some = [UUID(int=n) for n in range(100)]
    found = {}
    for table in expiring_tables():
        for statement in table.statements:
            plan = plans.explain(seeded, statement, {**table.start, "owners": some, "ids": some}, UUID(int=0), mode)
            for limit in (node for node in plan if node["Node Type"] == "Limit"):
                assert {node["Node Type"] for node in plans.nodes(limit)} <= FROM_AN_INDEX
                (found[table.name],) = (node["Index Name"] for node in plans.nodes(limit) if "Index Name" in node)
    assert found == READ_BY_AGE
    seeded.rollback()


@pytest.mark.parametrize("seqscan", ["on", "off"])
def test_a_stray_is_found(seeded: psycopg.Connection, owner: UUID, seqscan: str) -> None:
    """As somebody for whom no policy adds what the statement forgot."""
    live = select(col(Task.id)).where(listing.FILTERS["status"], col(Task.deleted_at).is_(None))
    forgetful = Statement(live.order_by(col(Task.owner_id), col(Task.created_at)))
    seeded.execute("SELECT set_config('role', 'api_system', true), set_config('enable_seqscan', %s, true)", (seqscan,))
    plan = plans.explain(seeded, forgetful, {"status": "todo"}, owner, "custom")
    assert plans.strays(plan)
    assert ("Seq Scan" in {node["Node Type"] for node in plan}) is (seqscan == "on")
