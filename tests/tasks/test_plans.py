"""PostgreSQL's plans: no list reads a whole table or rows of other users, and each sort order has an index."""

from collections.abc import Iterator
from itertools import product
from typing import get_args
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlmodel import col, select

from backend import migrations
from backend.database import Actor, Cost, Database, Pool, Statement
from backend.database.query import Query
from backend.resources.retention import expiring_tables
from backend.tasks import listing, statements
from backend.tasks.listing import bound_listing
from backend.tasks.models import Priority, Task
from backend.tasks.schemas import Sort, TaskQuery
from backend.tasks.service import TaskService
from benchmarks import plans
from benchmarks.plans import Mode, Shape
from tests.conftest import create_database

# No filter, each filter alone, and all of them. `python -m benchmarks.plans` plans every combination.
SHAPES = [shape for shape in plans.shapes() if len(shape.filters) in (0, 1, len(listing.FILTERS))]


@pytest.fixture(scope="module")
def seeded(postgres: str) -> Iterator[psycopg.Connection]:
    url = create_database(postgres, f"plans_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    with psycopg.connect(url) as connection:
        plans.seed(connection, rows=20_000, owners=100, most=200)
        inconsistent = "SELECT FROM tasks WHERE tag_names <> names_of_tags(owner_id, id)"
        assert connection.execute(inconsistent).fetchall() == []
        yield connection


@pytest.fixture
def owner(seeded: psycopg.Connection) -> UUID:
    """One of a hundred users. Sets the connection's role to this user."""
    seeded.rollback()  # to the login role, which sees all rows
    id = plans.people(seeded)[1].id
    plans.become(seeded, id)
    return id


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("sort", get_args(Sort))
def test_no_list_reads_rows_of_other_users(seeded: psycopg.Connection, owner: UUID, sort: str, mode: Mode) -> None:
    for shape in SHAPES:
        if shape.sort == sort and shape.counted is not shape.continued:
            plan = plans.explain(seeded, shape.statement, shape.values, owner, mode)
            assert plans.reads(plan), shape
            assert not plans.strays(plan), shape


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("sort", get_args(Sort))
def test_every_sort_is_read_from_its_index(seeded: psycopg.Connection, owner: UUID, sort: str, mode: Mode) -> None:
    """From the position of the cursor and without sorting, so page 2,000 costs as much as page 1."""
    for continued in False, True:
        shape = Shape(frozenset(), sort, continued=continued, deleted=False, counted=False)
        plan = plans.explain(seeded, shape.statement, shape.values, owner, mode)
        (scan,) = [node for node in plan if node.get("Relation Name") == "tasks"]
        assert plans.way(plan) == "the index of the sort, in its order"
        assert ("ROW(" in scan["Index Cond"]) is continued


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("sort", get_args(Sort))
def test_a_search_reads_the_text_index_only(seeded: psycopg.Connection, owner: UUID, sort: str, mode: Mode) -> None:
    """Except for the first rows of the list, texts that are too long for an index, and the rows of the page."""
    for filters, continued in product(({"q"}, {"q", "status", "priority", "due_after", "overdue"}), (False, True)):
        shape = Shape(frozenset(filters), sort, continued=continued, deleted=False, counted=True)
        plan = plans.explain(seeded, shape.statement, shape.values, owner, mode)
        types = [node["Node Type"] for node in plan if node.get("Index Name") == "tasks_by_text"]
        assert types == ["Index Only Scan"] * 2  # the page and the count
        (start,) = [node for node in plan if node.get("Alias") == "start"]
        assert start["Plans"][0]["Node Type"] == "Limit"
        assert start["Plans"][0]["Plan Rows"] <= listing.SCANNED_FIRST
        first = [node for node in plans.nodes(start) if node.get("Relation Name") == "tasks"]
        scans = [node for node in plan if node.get("Relation Name") == "tasks"]
        # The page and the count read short texts, then long ones; the rows of the page are read at the end.
        assert len(scans) == 2 + 2 + 1 + len(first)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_changes_are_read_from_the_index_of_change_numbers(seeded: psycopg.Connection, owner: UUID, mode: Mode) -> None:
    """From the position of the sync token, at most `limit` rows: the number of older rows adds nothing to the cost."""
    for start in None, 5_000:
        values = {"after_n": 5_000, "after_id": UUID(int=0), "start": start, "limit": 11}
        plan = plans.explain(seeded, statements.CHANGES, values, owner, mode)
        assert set(plans.strays(plan)) <= {"Seq Scan on change_counters"}  # 100 rows fit one block
        (page,) = [node for node in plan if node.get("Index Name") == "tasks_by_number"]
        assert "ROW(" in page["Index Cond"]
        (limit,) = [node for node in plan if node["Node Type"] == "Limit" and page in plans.nodes(node)]
        assert "Sort" not in {node["Node Type"] for node in limit["Plans"]}


def test_only_a_page_without_filters_is_a_short_statement() -> None:
    shapes = [shape for shape in SHAPES if shape.sort == "title"]
    assert {shape.statement.cost for shape in shapes} == set(Cost)
    for shape in shapes:
        assert (shape.statement.cost is Cost.long) is bool(shape.filters or shape.deleted or shape.counted), shape


async def test_a_list_without_filters_is_planned_once_for_all_users(postgres: str) -> None:
    """By default, PostgreSQL plans it for each request of a user with more tasks than the average."""
    url = create_database(postgres, f"plans_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    with psycopg.connect(url) as connection:
        plans.seed(connection, rows=6_000, owners=100, most=3_000)
        owners = plans.people(connection)
    first, counted, rounds = TaskQuery(limit=5), TaskQuery(count="exact"), 10
    async with Pool(url, size=5) as pool:
        for _, owner in product(range(rounds), owners):
            tasks = TaskService(Database(pool, Actor.user(owner.id)))
            page = await tasks.list(first)
            next = TaskQuery(limit=5, cursor=page["next_cursor"])
            assert (await tasks.list(next))["items"]
            await tasks.list(counted)
            await tasks.list(TaskQuery(priority=Priority.high))
        counts = "SELECT statement, generic_plans, custom_plans FROM pg_prepared_statements"
        connections = (*pool.lanes.readers, *pool.lanes.searching.connections)
        rows = [row for shared in connections for row in await shared.run(Query("SELECT $1, $2", ("", ""), counts, ()))]
    planned = {row["statement"]: (row["generic_plans"], row["custom_plans"]) for row in rows}
    for query in first, next, counted:
        assert planned[bound_listing(query).statement.sql] == (rounds * len(owners), 0)
    # With a filter, the best plan depends on its value, so PostgreSQL may plan each request.
    filtered = bound_listing(TaskQuery(priority=Priority.high)).statement.sql
    assert planned[filtered][1] > 0


_EXPIRING_ROWS = """
INSERT INTO idempotency_keys (owner_id, key, fingerprint, status, headers, body, created_at)
SELECT users.id, n::text, '', 200, '{}', 'a response', now() - n * interval '1 minute'
FROM users, generate_series(1, 1500) n;
INSERT INTO security_events (issuer, jti, received_at)
SELECT 'i', n::text, now() - n * interval '1 minute' FROM generate_series(1, 100000) n;
INSERT INTO erasures (issuer, subject, roles, erased_at)
SELECT 'i', n::text, '{}', now() - n * interval '1 minute' FROM generate_series(1, 100000) n;
"""
INDEX_SCAN_NODES = {"Limit", "LockRows", "Index Scan", "Index Only Scan"}
INDEXES_BY_AGE = {
    "tasks": "tasks_to_purge",
    "idempotency_keys": "idempotency_keys_to_purge",
    "security_events": "security_events_by_age",
    "erasures": "erasures_by_age",
}


@pytest.mark.parametrize("mode", get_args(Mode))
def test_the_purge_finds_expired_rows_by_index(seeded: psycopg.Connection, mode: Mode) -> None:
    """Oldest first and without sorting, so the number of unexpired rows adds nothing to the cost."""
    seeded.rollback()
    seeded.execute(_EXPIRING_ROWS)
    seeded.execute("ANALYZE idempotency_keys, security_events, erasures")
    seeded.execute("SELECT set_config('role', 'api_system', true)")
    ids = [UUID(int=n) for n in range(100)]
    found = {}
    for table in expiring_tables():
        for statement in table.statements:
            plan = plans.explain(seeded, statement, {**table.start, "owners": ids, "ids": ids}, UUID(int=0), mode)
            for limit in (node for node in plan if node["Node Type"] == "Limit"):
                assert {node["Node Type"] for node in plans.nodes(limit)} <= INDEX_SCAN_NODES
                (found[table.name],) = (node["Index Name"] for node in plans.nodes(limit) if "Index Name" in node)
    assert found == INDEXES_BY_AGE
    seeded.rollback()


@pytest.mark.parametrize("seqscan", ["on", "off"])
def test_a_scan_of_rows_of_other_users_is_detected(seeded: psycopg.Connection, owner: UUID, seqscan: str) -> None:
    """In a role whose policies do not add the missing owner filter."""
    live = select(col(Task.id)).where(listing.FILTERS["status"], col(Task.deleted_at).is_(None))
    unfiltered = Statement(live.order_by(col(Task.owner_id), col(Task.created_at)))
    seeded.execute("SELECT set_config('role', 'api_system', true), set_config('enable_seqscan', %s, true)", (seqscan,))
    plan = plans.explain(seeded, unfiltered, {"status": "todo"}, owner, "custom")
    assert plans.strays(plan)
    assert ("Seq Scan" in {node["Node Type"] for node in plan}) is (seqscan == "on")
