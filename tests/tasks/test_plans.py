"""No listing reads the whole table, whatever it is narrowed and sorted by, and a sort that is offered has its index."""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import combinations
from typing import Any, get_args
from uuid import UUID, uuid4

import psycopg
import pytest

from backend import migrations
from backend.tasks import statements
from backend.tasks.schemas import Sort
from tests.conftest import create_database

SEED = """
INSERT INTO users (issuer, subject) SELECT 'plans', n::text FROM generate_series(1, 100) n;
INSERT INTO tasks (owner_id, title, status, priority, due_at, created_at, updated_at, deleted_at)
SELECT u.id, md5(n::text), (ARRAY['todo', 'in_progress'])[1 + n % 2],
       (ARRAY['low', 'normal', 'high', 'urgent'])[1 + n % 4],
       CASE WHEN n % 3 > 0 THEN now() + (n - 100) * interval '1 day' END,
       now() - n * interval '1 hour', now() - n * interval '1 minute', CASE WHEN n % 10 = 0 THEN now() END
FROM users u, generate_series(1, 200) n;
INSERT INTO tags (owner_id, name) SELECT u.id, 'Tag ' || n FROM users u, generate_series(1, 10) n;
INSERT INTO task_tags (owner_id, task_id, tag_id)
SELECT t.owner_id, t.id, g.id FROM tasks t JOIN tags g ON g.owner_id = t.owner_id
WHERE hashtext(t.id::text || g.name) % 5 = 0;
ANALYZE;
"""
NOW = datetime.now(UTC)
VALUES: dict[str, Any] = {
    "status": "todo",
    "priority": "high",
    "due_before": NOW,
    "due_after": NOW,
    "overdue": True,
    "q": "cafe",
    "tag": ["tag 1", "TAG 2"],
}
KEYS = {"created_at": NOW, "updated_at": NOW, "due_at": NOW, "priority": "normal", "title": "7"}


@pytest.fixture(scope="module")
def owner(postgres: str) -> Iterator[tuple[psycopg.Connection, UUID]]:
    """One of a hundred owners, in a database of their own, as the role that requests run as."""
    url = create_database(postgres, f"plans_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    with psycopg.connect(url) as connection:
        connection.execute(SEED)
        (id,) = connection.execute("SELECT id FROM users LIMIT 1").fetchone() or (None,)
        connection.execute(
            "SELECT set_config('role', 'api_user', true), set_config('app.caller', %s, true)", (str(id),)
        )
        assert isinstance(id, UUID)
        yield connection, id


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def explain(owner: tuple[psycopg.Connection, UUID], statement: Any, **values: Any) -> list[dict[str, Any]]:
    connection, id = owner
    bound = {**statement._constants, **values, "caller": str(id)}
    ((plans,),) = connection.execute(f"EXPLAIN (FORMAT JSON) {statement.sql}".encode(), bound).fetchall()
    return list(nodes(plans[0]["Plan"]))


FILTER_SETS = [frozenset(chosen) for size in (0, 1, 2) for chosen in combinations(statements.FILTERS, size)]


@pytest.mark.parametrize("sort", get_args(Sort))
def test_no_listing_reads_the_whole_table(owner: tuple[psycopg.Connection, UUID], sort: str) -> None:
    for filters in FILTER_SETS:
        for continued in False, True:
            for deleted in False, True:
                statement = statements.listing(
                    filters, sort, continued=continued, deleted=deleted, counted=not continued
                )
                values = {name: VALUES[name] for name in filters} | {"limit": 21}
                if continued:
                    values |= {"after_key": KEYS[sort.removeprefix("-")], "after_id": UUID(int=0)}
                plan = explain(owner, statement, **values)
                assert not [node for node in plan if node["Node Type"] == "Seq Scan"], (filters, sort, deleted)


@pytest.mark.parametrize("sort", get_args(Sort))
def test_every_sort_is_read_from_its_index(owner: tuple[psycopg.Connection, UUID], sort: str) -> None:
    """Without sorting, so that page 2,000 costs what page 1 does: the index begins where the cursor points."""
    for continued in False, True:
        statement = statements.listing(frozenset(), sort, continued=continued, deleted=False, counted=False)
        after = {"after_key": KEYS[sort.removeprefix("-")], "after_id": UUID(int=0)} if continued else {}
        plan = explain(owner, statement, limit=21, **after)
        (scan,) = [node for node in plan if node.get("Relation Name") == "tasks"]
        assert not [node for node in plan if node["Node Type"] == "Sort" and "tasks" in str(node["Sort Key"])]
        assert ("ROW(" in scan["Index Cond"]) is continued
