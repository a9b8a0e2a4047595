"""`python -m benchmarks.plans [--rows N]`: PostgreSQL's plans for each listing of the API, with N tasks.

Plans every combination of filters, sort, direction, page and trash as a request would run it, under row-level
security, as a custom and as a generic plan. Exits with 1 if a plan reads a whole table or rows of other users.
A full run is written to benchmarks/results/plans.md.
"""

import argparse
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import combinations, product
from statistics import median
from typing import Any, Literal, LiteralString, NamedTuple, get_args
from uuid import UUID

import httpx
import psycopg
from psycopg.sql import SQL, Identifier
from psycopg.sql import Literal as Value
from sqlmodel import SQLModel

from backend import migrations
from backend.auth.testing import LocalIssuer
from backend.database import Actor, Statement
from backend.dev.postgres import EmbeddedPostgres
from backend.tasks import listing, statements
from backend.tasks.schemas import Sort
from benchmarks.__main__ import ISSUER, say, write
from benchmarks.data import numbered
from benchmarks.issuer import AUDIENCE, serve_keys
from benchmarks.peers import OURS
from benchmarks.servers import environment, running

ROWS = 5_000_000
OWNERS = 5_000
MOST = 10_000  # tasks of the largest owner
CHUNK = 250_000
REPEATS = 50

Mode = Literal["custom", "generic"]

NOW = datetime.now(UTC)
VALUES: dict[str, Any] = {
    "status": "todo",
    "priority": "high",
    "due_before": NOW,
    "due_after": NOW,
    "overdue": True,
    "q": "milk",
    "tag": ["tag 1", "TAG 2"],
}
# Cursor values from among the seeded ones. Tasks are created one second apart, up to the time of seeding.
AFTER = {"created_at": NOW - timedelta(hours=2), "updated_at": NOW, "due_at": NOW, "priority": "normal", "title": "7"}

_USERS: LiteralString = """
INSERT INTO users (id, issuer, subject)
SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'http://issuer.test', n::text
FROM generate_series(0, %s - 1) n
"""
_TAGS: LiteralString = "INSERT INTO tags (owner_id, name) SELECT id, 'Tag ' || n FROM users, generate_series(1, 10) n"

# Each owner's rows are scattered over the heap, as when many users write at once; the columns are independent of each
# other; about a tenth is in the trash.
_TASKS: LiteralString = """
INSERT INTO tasks (owner_id, n, title, description, status, priority, due_at, created_at, updated_at, deleted_at,
                   tag_names)
SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(owner), 12, '0'))::uuid, n + 1, md5(n::text),
       CASE WHEN random() < 0.002 THEN 'Buy milk on the way home, two litres'
            WHEN random() < 0.5 THEN 'Call back before noon, they close'
            ELSE 'Wash the windows, both sides of them' END,
       (ARRAY['todo', 'in_progress'])[random(1, 2)], (ARRAY['low', 'normal', 'high', 'urgent'])[random(1, 4)],
       CASE WHEN random() < 0.6 THEN now() + (random() * 60 - 30) * interval '1 day' END,
       now() - n * interval '1 second', now() - random() * interval '60 days',
       CASE WHEN random() < 0.1 THEN now() - random() * interval '40 days' END,
       array(SELECT name FROM (SELECT 'Tag ' || k AS name FROM generate_series(1, 10) k)
             WHERE hashtext(n + 1 || name) %% 20 = 0 ORDER BY name COLLATE "C")
FROM (
  SELECT n, CASE WHEN n %% %(every)s = 0 THEN 0 ELSE n %% %(owners)s END AS owner
  FROM generate_series(%(first)s::bigint, %(last)s::bigint) n
)
"""
_TAGGED: LiteralString = """
INSERT INTO task_tags (owner_id, task_id, tag_id)
SELECT t.owner_id, t.id, g.id FROM tasks t JOIN tags g ON g.owner_id = t.owner_id
WHERE hashtext(t.n || g.name) %% 20 = 0
"""


class Shape(NamedTuple):
    """One combination of a listing's parameters."""

    filters: frozenset[str]
    sort: str
    continued: bool
    deleted: bool
    counted: bool

    @property
    def statement(self) -> Statement:
        return listing.listing(
            self.filters, self.sort, continued=self.continued, deleted=self.deleted, counted=self.counted
        )

    @property
    def values(self) -> dict[str, Any]:
        after = {"after_key": AFTER[self.sort.removeprefix("-")], "after_id": UUID(int=0)} if self.continued else {}
        return {"limit": 21} | {name: VALUES[name] for name in self.filters} | after


def shapes(most_filters: int = len(listing.FILTERS)) -> Iterator[Shape]:
    """Every combination that the API supports, with at most `most_filters` filters."""
    sizes = range(most_filters + 1)
    sets = [frozenset(chosen) for size in sizes for chosen in combinations(listing.FILTERS, size)]
    flags = False, True
    return (Shape(*each) for each in product(sets, get_args(Sort), flags, flags, flags))


def seed(connection: psycopg.Connection, *, rows: int, owners: int, most: int) -> None:
    """Fill a migrated database with tasks of `owners` users; the first has about `most` more than the others."""
    connection.autocommit = True
    # VACUUM marks a page as all-visible only once the commits of its rows are flushed; test servers flush them later.
    connection.execute("SET synchronous_commit = on")
    indexes = connection.execute(
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'tasks' AND indexname <> 'tasks_pkey'"
    ).fetchall()
    for name, _ in indexes:
        connection.execute(SQL("DROP INDEX {}").format(Identifier(name)))
    connection.execute("SELECT setseed(0.5)")
    connection.execute(_USERS, (owners,))
    connection.execute(_TAGS)
    with numbered(connection):
        for first in range(0, rows, CHUNK):
            last = min(first + CHUNK, rows) - 1
            connection.execute(_TASKS, {"owners": owners, "every": rows // most, "first": first, "last": last})
        connection.execute(_TAGGED, {})
    for _, definition in indexes:
        connection.execute(definition)
    connection.execute("VACUUM (ANALYZE)")
    connection.autocommit = False


def subject(person: UUID) -> str:
    """The subject of a user created by `seed`."""
    return str(person.int % 16**12)


def become(connection: psycopg.Connection, owner: UUID) -> None:
    """Run the rest of this transaction as a request of this user."""
    connection.execute("SELECT set_config('role', 'api_user', true), set_config('app.caller', %s, true)", (str(owner),))


def explain(
    connection: psycopg.Connection, statement: Statement, values: Mapping[str, object], owner: UUID, mode: Mode
) -> list[dict[str, Any]]:
    """The plan nodes of a prepared statement: a custom plan for these values, or a generic one."""
    bound = statement.bind(Actor.user(owner), values)
    connection.execute("SELECT set_config('plan_cache_mode', %s, true)", (f"force_{mode}_plan",))
    connection.execute(f"PREPARE listing AS {statement.sql}".encode())
    arguments = SQL(", ").join(Value(value) for value in bound)
    cursor = connection.execute(SQL("EXPLAIN (FORMAT JSON) EXECUTE listing ({})").format(arguments))
    ((plans,),) = cursor.fetchall()
    connection.execute("DEALLOCATE listing")
    return list(nodes(plans[0]["Plan"]))


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


OWNED = {name: "owner_id" for name, table in SQLModel.metadata.tables.items() if "owner_id" in table.c} | {
    "users": "id"
}
_INDEX_SCANS = "Index Scan", "Index Only Scan", "Bitmap Index Scan"


def reads(plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The nodes that read an owned table or an index."""
    return [node for node in plan if node["Node Type"] in _INDEX_SCANS or node.get("Relation Name") in OWNED]


def strays(plan: list[dict[str, Any]]) -> list[str]:
    """Descriptions of the nodes that read, or may read, rows of other users."""
    found = []
    for node in reads(plan):
        kind, place = node["Node Type"], node.get("Index Name") or node["Relation Name"]
        if kind == "Bitmap Heap Scan":  # its bitmap's index is another node
            continue
        column = OWNED.get(node.get("Relation Name", ""), "owner_id")
        if kind not in _INDEX_SCANS or not re.search(rf"\b{column} = ", node.get("Index Cond", "")):
            found.append(f"{kind} on {place}")
    return found


def way(plan: list[dict[str, Any]]) -> str:
    """How a plan finds the tasks of a listing, in a few words."""
    if any(node.get("Index Name") == "tasks_by_text" for node in plan):
        return "the first 200, and then the index of all texts"
    # Tags of one task are always sorted; only a sort of the tasks themselves costs more with every task.
    if not any(node["Node Type"].endswith("Sort") and re.search(r"\bid\b", str(node["Sort Key"])) for node in plan):
        return "the index of the sort, in its order"
    if any(node.get("Index Name") == "task_tags_by_tag" for node in plan):
        return "the tags, then sorted"
    return "an index of the owner's, then sorted"


class Owner(NamedTuple):
    name: str
    id: UUID


# (kind of listing, access path) -> how often, by owner and plan mode.
Ways = dict[tuple[str, str], Counter[str]]


def check(connection: psycopg.Connection, owners: list[Owner]) -> tuple[Ways, list[str]]:
    """Plan every listing; return the access paths and the plans that read rows of other users."""
    ways: Ways = defaultdict(Counter)
    found = []
    for shape, owner, mode in product(shapes(), owners, get_args(Mode)):
        plan = explain(connection, shape.statement, shape.values, owner.id, mode)
        ways["the bin" if shape.deleted else "what is live", way(plan)][f"{owner.name}, {mode}"] += 1
        found += [f"- {shape} of {owner.name}, {mode}: {stray}" for stray in strays(plan)]
    return ways, found


def medians(work: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The median time of each in milliseconds. Each round has another order, so that other load and the state of the
    processor's caches affect all alike.
    """
    times: list[list[float]] = [[] for _ in work]
    turn = list(zip(times, work, strict=True))
    for _ in range(repeats + 1):
        for each, do in turn:
            started = time.perf_counter()
            do()
            each.append((time.perf_counter() - started) * 1000)
        random.Random(len(times[0])).shuffle(turn)  # noqa: S311  # reproducible
    return [median(each[1:]) for each in times]  # without the first round, which warms up


def beside(took: Sequence[float]) -> list[str]:
    """Times with their ratio to the first."""
    return [f"{each:.2f} ms ({each / took[0]:.1f}x)" for each in took]


def timed(connection: psycopg.Connection, owners: list[Owner]) -> list[tuple[str, ...]]:
    """Rows of a table: the listing, and for each owner its time and the ratio to the plain listing's."""

    def ask(
        *filters: str, sort: str = "-created_at", continued: bool = False, counted: bool = False, **values: object
    ) -> Any:
        shape = Shape(frozenset(filters), sort, continued=continued, deleted=False, counted=counted)
        return shape.statement, shape.values | values

    asked = {
        "the newest 20": ask(),
        "20 from the middle": ask(continued=True),
        "of a status": ask("status"),
        "overdue": ask("overdue"),
        "with two tags": ask("tag"),
        "`q` that every second task has": ask("q", q="noon"),
        "`q` that one task in 500 has": ask("q"),
        "`q` that no task has": ask("q", q="nowhere to be found"),
        "`q` that no task has, by title": ask("q", sort="title", q="nowhere to be found"),
        "the newest 20, and how many there are": ask(counted=True),
        "`q` that every second task has, and how many": ask("q", counted=True, q="noon"),
        "the summary": (statements.SUMMARY, {"today": NOW, "tomorrow": NOW}),
    }

    def run(owner: Owner, statement: Statement, values: Mapping[str, object]) -> None:
        cursor = psycopg.RawCursor(connection)
        bound = statement.bind(Actor.user(owner.id), values)
        cursor.execute(statement.sql.encode(), bound, prepare=True, binary=True).fetchall()

    columns = []
    for owner in owners:
        become(connection, owner.id)
        connection.execute("SELECT set_config('plan_cache_mode', 'auto', true)")
        columns.append(beside(medians([partial(run, owner, *each) for each in asked.values()], REPEATS)))
    return [*zip(asked, *columns, strict=True)]


SEARCHES: dict[str, dict[str, str]] = {
    "the newest 20": {},
    "`q` that every second task has": {"q": "noon"},
    "`q` that one task in 500 has": {"q": "milk"},
    "`q` that no task has": {"q": "nowhere to be found"},
    "`q` that no task has, by title": {"q": "nowhere to be found", "sort": "title"},
    "`q` that one task in 500 has, and how many": {"q": "milk", "count": "exact"},
}


def served(url: str, owners: list[Owner]) -> list[tuple[str, ...]]:
    """The same as `timed` for the whole API over HTTP, one request at a time."""
    issuer = LocalIssuer(ISSUER, audience=AUDIENCE)
    columns = []

    def ask(http: httpx.Client, params: dict[str, str]) -> None:
        http.get("/api/v1/tasks", params=params).raise_for_status()

    with serve_keys(issuer) as keys, running(OURS, environment(url, ISSUER, keys, AUDIENCE)) as server:
        for owner in owners:
            bearer = {"Authorization": f"Bearer {issuer.token(sub=subject(owner.id))}"}
            with httpx.Client(base_url=server.url, headers=bearer, trust_env=False) as http:
                columns.append(beside(medians([partial(ask, http, each) for each in SEARCHES.values()], REPEATS)))
    return [*zip(SEARCHES, *columns, strict=True)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.plans", description="How each listing is read at scale.")
    parser.add_argument("--rows", type=int, default=ROWS, help="tasks in the table")
    options = parser.parse_args(arguments)
    say(f"seeding {options.rows:,} tasks of {OWNERS:,} people")
    with EmbeddedPostgres(durable=False, settings=ROOMY) as postgres:
        migrations.upgrade(postgres.url)
        with psycopg.connect(postgres.url) as connection:
            seed(connection, rows=options.rows, owners=OWNERS, most=MOST)
            say("planning every listing, and timing some")
            owners = people(connection)
            become(connection, owners[0].id)
            ways, found = check(connection, owners)
            times = timed(connection, owners)
            connection.rollback()
            text = report(connection, options.rows, owners, ways, times, served(postgres.url, owners), found)
    sys.stdout.write(text)
    if options.rows >= ROWS and not found:
        write({"plans.md": text})
    return 1 if found else 0


# Memory for building indexes over millions of rows, and for caching the usual part of them.
ROOMY = {"shared_buffers": "1GB", "maintenance_work_mem": "1GB", "max_wal_size": "8GB"}


def people(connection: psycopg.Connection) -> list[Owner]:
    """The largest owner, and one of the usual size."""
    found = connection.execute("SELECT owner_id, count(*) FROM tasks GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 2").fetchall()
    return [Owner(f"{count:,} tasks", id) for id, count in found]


def report(
    connection: psycopg.Connection,
    rows: int,
    owners: list[Owner],
    ways: Ways,
    times: list[tuple[str, ...]],
    over_http: list[tuple[str, ...]],
    found: list[str],
) -> str:
    version = connection.info.parameter_status("server_version")
    columns = [f"{owner.name}, {mode}" for owner, mode in product(owners, get_args(Mode))]
    counts = [(*names, *(f"{counted[column]:,}" for column in columns)) for names, counted in sorted(ways.items())]
    lines = [
        "# How listings are read",
        "",
        f"{rows:,} tasks of {OWNERS:,} people, PostgreSQL {version}, {datetime.now(UTC):%Y-%m-%d}, made by"
        " `python -m benchmarks.plans`. Every combination of filters, sort, direction, page and bin, under row-level"
        " security, of one person with many tasks and one with as many as all others, as a custom and a generic plan.",
        "",
        f"Plans that read a whole table, or others' rows: {len(found)} of {sum(map(Counter.total, ways.values())):,}.",
        "",
        *found[:50],
        *table("Listed", "Found by", *columns, rows=counts),
        "",
        "Medians as a client on the same machine sees them, and their ratio to the first. The kinds take turns. Load"
        f" average {os.getloadavg()[0]:.1f}, on {os.cpu_count()} processors.",
        "",
        *table("Asked for", *(owner.name for owner in owners), rows=times),
        "",
        "The same over HTTP, from the whole API with one worker.",
        "",
        *table("Asked for", *(owner.name for owner in owners), rows=over_http),
    ]
    return "\n".join(lines) + "\n"


def table(*heads: str, rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [heads, ("---",) * len(heads), *rows]]


if __name__ == "__main__":
    sys.exit(main())
