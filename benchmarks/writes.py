"""`python -m benchmarks.writes`: the cost of change numbers, which each write gets in commit order.

Two databases of one durable PostgreSQL take turns: one as migrated, one without the triggers and the index of
migration 0006. The writes use this API's own executor. A full run is written to benchmarks/results/writes.md.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from itertools import count
from statistics import median
from typing import LiteralString, NamedTuple
from uuid import UUID

import psycopg

from backend import migrations
from backend.database import Actor, Database, Pool
from backend.dev.postgres import EmbeddedPostgres
from backend.tasks.statements import INSERT_TASK, update_task
from benchmarks import cpu
from benchmarks.__main__ import say, write
from benchmarks.plans import table

ROUNDS = 7
SECONDS = 2.0
OWNERS = 16
TASKS_EACH = 100
NEW = {"title": "Buy milk", "description": "Two litres", "status": "todo", "priority": "normal", "due_at": None}

_WITHOUT: LiteralString = """
DROP TRIGGER await_turn ON tasks;
DROP TRIGGER number_change ON tasks;
DROP TRIGGER forget_changes ON tasks;
DROP INDEX tasks_by_number;
ALTER TABLE tasks ALTER n SET DEFAULT 0
"""
_PEOPLE: LiteralString = """
INSERT INTO users (issuer, subject) SELECT 'http://issuer.test', n::text FROM generate_series(1, %s) n RETURNING id
"""
_TASKS: LiteralString = """
INSERT INTO tasks (owner_id, title, status, priority)
SELECT id, 'task ' || n, 'todo', 'low' FROM users, generate_series(1, %s) n RETURNING owner_id, id
"""


class Case(NamedTuple):
    """`writers` concurrent writers for the first `owners` users create tasks, or change titles if not `new`."""

    name: str
    writers: int
    owners: int
    new: bool


CASES = [
    Case(f"{kind}, {who}", writers, owners, new)
    for kind, new in (("a new task", True), ("a changed title", False))
    for who, writers, owners in (
        ("one writer", 1, 1),
        (f"{OWNERS} writers of {OWNERS} people", OWNERS, OWNERS),
        (f"{OWNERS} writers of one person", OWNERS, 1),
    )
]


class Rate(NamedTuple):
    per_second: float
    postgres_us: float | None


class Side:
    """One of the two databases, with its users and their tasks."""

    def __init__(self, url: str, pool: Pool) -> None:
        self._pool = pool
        with psycopg.connect(url, autocommit=True) as connection:
            self._people: list[UUID] = [id for (id,) in connection.execute(_PEOPLE, [OWNERS])]
            rows = connection.execute(_TASKS, [TASKS_EACH]).fetchall()
            connection.execute("VACUUM ANALYZE")
        self._tasks = {owner: [id for mine, id in rows if mine == owner] for owner in self._people}

    async def measure(self, case: Case, seconds: float, postgres: int) -> Rate:
        """Write for so many seconds; the rate of writes."""
        done, numbers = 0, count()
        before, started = cpu.seconds(postgres), time.perf_counter()
        end = started + seconds

        async def writer(owner: UUID) -> None:
            nonlocal done
            database, title = Database(self._pool, Actor.user(owner)), update_task(frozenset({"title"}))
            while time.perf_counter() < end:
                number = next(numbers)
                if case.new:
                    rows = await database.rows(INSERT_TASK, **NEW)
                else:
                    task = self._tasks[owner][number % TASKS_EACH]
                    # A different title each time, because an equal one creates no version.
                    rows = await database.rows(title, title=f"{time.perf_counter_ns()}", task_id=task, if_match=None)
                assert len(rows) == 1
                done += 1

        await asyncio.gather(*(writer(self._people[number % case.owners]) for number in range(case.writers)))
        took = time.perf_counter() - started
        return Rate(done / took, cpu.per_request(before, cpu.seconds(postgres), done))


async def measure(sides: Sequence[Side], rounds: int, seconds: float, postgres: int) -> dict[Case, list[list[Rate]]]:
    """For each case the rates of each side, round by round; an extra first round is discarded."""
    found: dict[Case, list[list[Rate]]] = {}
    for case in CASES:
        say(case.name)
        by_round = [[await side.measure(case, seconds, postgres) for side in sides] for _ in range(rounds + 1)]
        found[case] = [list(rates) for rates in zip(*by_round[1:], strict=True)]
    return found


def machine() -> str:
    """The number of processors and the load average."""
    return f"{os.cpu_count()} processors, load average {os.getloadavg()[0]:.1f}"


def figures(values: Sequence[float], digits: int = 0) -> str:
    """Median, minimum and maximum."""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def report(found: dict[Case, list[list[Rate]]], rounds: int, seconds: float, version: str | None) -> str:
    rows = []
    for case, (numbered, plain) in found.items():
        ratios = [one.per_second / other.per_second for one, other in zip(numbered, plain, strict=True)]
        used = [[rate.postgres_us for rate in rates if rate.postgres_us is not None] for rates in (plain, numbered)]
        rates = [figures([rate.per_second for rate in rates]) for rates in (plain, numbered)]
        rows.append((case.name, *rates, figures(ratios, 2), *(figures(each) if each else "-" for each in used)))
    lines = [
        "# What the numbers cost",
        "",
        f"{rounds} rounds of {seconds:g} s in which both sides take turns, after one to warm up; PostgreSQL {version},"
        f" durable, {datetime.now(UTC):%Y-%m-%d}, made by `python -m benchmarks.writes`; {machine()}. Medians, least"
        " and most. The processor time is all of PostgreSQL's for one write.",
        "",
        *table("Written", "without, writes/s", "with, writes/s", "ratio", "without, us", "with, us", rows=rows),
    ]
    return "\n".join(lines) + "\n"


async def run(postgres: EmbeddedPostgres, rounds: int, seconds: float) -> str:
    async with AsyncExitStack() as stack:
        sides = []
        for name in "numbered", "plain":
            with psycopg.connect(postgres.url, autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}".encode())
                version = connection.info.parameter_status("server_version")
            url = postgres.url.replace("/postgres?", f"/{name}?", 1)
            migrations.upgrade(url)
            if name == "plain":
                with psycopg.connect(url, autocommit=True) as connection:
                    connection.execute(_WITHOUT)
            sides.append(Side(url, await stack.enter_async_context(Pool(url))))
        return report(await measure(sides, rounds, seconds, postgres.pid), rounds, seconds, version)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.writes", description="The cost of change numbers.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="seconds of each side in each round")
    options = parser.parse_args(arguments)
    with EmbeddedPostgres() as postgres:
        text = asyncio.run(run(postgres, options.rounds, options.seconds))
    sys.stdout.write(text)
    if (options.rounds, options.seconds) == (ROUNDS, SECONDS):
        write({"writes.md": text})
    return 0


if __name__ == "__main__":
    sys.exit(main())
