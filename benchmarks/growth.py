"""`python -m benchmarks.growth [--quick] [--only NAME]`: the cost of more tasks, pages, users, workers and requests.

Each measurement compares this API with itself, in turns on one durable PostgreSQL, and shows its goals. A full run is
written to benchmarks/results/growth-NAME.md.
"""

import argparse
import os
import random
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psycopg

from backend.auth.testing import LocalIssuer
from backend.auth.verifier import CACHE_ENTRIES
from backend.dev.postgres import EmbeddedPostgres, EmbeddedPostgresError
from benchmarks import cpu, data, load, plans
from benchmarks.__main__ import ISSUER, PEOPLE, circumstances, say, write
from benchmarks.errors import BenchmarkError
from benchmarks.issuer import AUDIENCE, serve_keys
from benchmarks.report import ratio
from benchmarks.rounds import CONNECTIONS, Pace
from benchmarks.servers import Server
from benchmarks.turns import Amounts, Finding, Goal, Stage, beside, figures_table, report
from benchmarks.worker import forged, memory, start
from benchmarks.workloads import LIST, ONE, Person, Request, Workload, bearer

EACH = 200  # tasks of one user
MANY = 256  # connections; with few, one worker might accept all of them
SHARE = 0.25  # of a processor, for a worker on a slow core
CALLS = 20_000  # random requests before the generator repeats them

FULL = Amounts(
    Pace(rounds=5, warm_up=1, loaded=5, alone=0),
    usual=(data.USERS, data.TASKS),
    owners=(1_000, 25_000),
    most=48_000,
    page=2_000,
    users=(10, 4_000, 10_000),
    requests=(10_000, 1_000_000),
    tokens=100_000,
    starts=5,
    checks=15_000,
)
QUICK = Amounts(
    Pace(rounds=2, warm_up=1, loaded=1, alone=0),
    usual=(PEOPLE, 4_000),
    owners=(100, 500),
    most=4_800,
    page=200,
    users=(10, 1_000),
    requests=(1_000, 20_000),
    tokens=2_000,
    starts=2,
    checks=200,
)


def tasks(stage: Stage) -> Finding:
    """Compare the same listing in a small and in a large table; each user has equally many tasks in both."""
    urls = {owners: stage.tagged(owners, owners * EACH, EACH) for owners in stage.amounts.owners}
    with ExitStack() as stack:
        sides = []
        for owners, url in urls.items():
            server, people = stack.enter_context(stage.server(url)), stage.people(url, PEOPLE)
            sides.append(
                stage.side(f"{owners * EACH:,} tasks of {owners:,} people", server, LIST, LIST.requests(people))
            )
        few, many = stage.turns(*sides)
    rows = [f"{owners * EACH:,}" for owners in stage.amounts.owners]
    return Finding(
        "few tasks and many",
        f"`{LIST.title}` by {PEOPLE} people with {EACH} tasks each, far apart in the heap, a tenth of them in the bin.",
        beside(f"{rows[1]} tasks against {rows[0]}", few, many, most=1.3),
        figures_table(sides, [few, many]),
    )


def pages(stage: Stage) -> Finding:
    """Compare one user's first page with a late page, and with the first page of a user with few tasks."""
    page, most, (owners, _) = stage.amounts.page, stage.amounts.most, stage.amounts.usual
    url = stage.tagged(owners, 5 * most, most)  # every fifth task is the owner's
    skipped = 20 * (page - 1)
    with psycopg.connect(url) as connection:
        owner, other = plans.people(connection)
        there = connection.execute(
            "SELECT id FROM tasks WHERE owner_id = %s AND deleted_at IS NULL ORDER BY created_at DESC, id DESC"
            " LIMIT 20 OFFSET %s",
            (owner.id, skipped),
        ).fetchall()
    theirs, others = (Person(stage.token(plans.subject(each.id)), []) for each in (owner, other))

    def is_far(body: Any) -> bool:
        return [(item["id"],) for item in body["items"]] == [(str(id),) for (id,) in there]

    with stage.server(url) as server:
        path = f"/api/v1/tasks?limit=20&cursor={walk(server, theirs, skipped)}"
        far = Workload("far", f"page {page:,}", 200, lambda _: [Request("GET", path, bearer(theirs))], is_far)
        sides = [
            stage.side(f"page 1 of {other.name}", server, LIST, LIST.requests([others])),
            stage.side(f"page 1 of {owner.name}", server, LIST, LIST.requests([theirs])),
            stage.side(f"page {page:,} of {owner.name}", server, far, far.requests([])),
        ]
        found = stage.turns(*sides)
    of_few, of_many, late = found
    return Finding(
        "the first page and a late one",
        f"`{LIST.title}` by one person, and the same with a cursor, which was walked to; that its page is the one, an"
        " OFFSET in PostgreSQL says in each turn.",
        [
            *beside(f"page {page:,} against page 1", of_many, late, most=1.2),
            *beside(f"page 1 of {owner.name} against that of {other.name}", of_few, of_many),
        ],
        figures_table(sides, found),
    )


def walk(server: Server, person: Person, skipped: int) -> str:
    """The cursor after a user's first `skipped` tasks."""
    cursor: dict[str, str] = {}
    with httpx.Client(base_url=server.url, headers=bearer(person), trust_env=False) as http:
        while skipped:
            limit = min(100, skipped)
            page = http.get("/api/v1/tasks", params={"limit": limit, **cursor}).raise_for_status().json()
            if page["next_cursor"] is None:
                raise BenchmarkError(f"{skipped:,} tasks are missing before the late page")
            cursor, skipped = {"cursor": page["next_cursor"]}, skipped - limit
    return cursor["cursor"]


def workers(stage: Stage) -> Finding:
    """Compare one worker with two, for a list and for one task, on slow cores of their own and on shared cores."""
    url = stage.plain(*stage.amounts.usual)
    people = stage.people(url, PEOPLE)
    cores = {"shared cores": None} if cpu.running() is None else {"slow cores": SHARE, "shared cores": None}
    with stage.server(url) as one, stage.server(url, workers=2) as two:
        sides = {
            (workload, name, count): replace(
                stage.side(f"`{workload.title}`, {count}, {name}", server, workload, workload.requests(people)),
                connections=MANY,
                share=share,
            )
            for workload in (LIST, ONE)
            for name, share in cores.items()
            for count, server in (("1 worker", one), ("2 workers", two))
        }
        found = dict(zip(sides, stage.turns(*sides.values()), strict=True))
    goals = []
    for workload, name in product((LIST, ONE), cores):
        alone, together = found[workload, name, "1 worker"], found[workload, name, "2 workers"]
        what = f"{workload.title}, two workers on {name}"
        least = 1.7 if cores[name] else None
        goals += [
            Goal(f"{what}: requests/s", ratio(together, alone, "requests_per_second"), least=least),
            Goal(f"{what}: server's processor time", ratio(together, alone, "server_cpu")),
            Goal(f"{what}: PostgreSQL's processor time", ratio(together, alone, "postgres_cpu")),
        ]
    return Finding(
        "one worker and two",
        f"`serve --workers`, {PEOPLE} people, {MANY} connections. The goal is one for two free cores, and there"
        f" are none where PostgreSQL and the load need some of {os.cpu_count()}. So a worker is stopped for a while"
        f" when it has had {SHARE:.0%} of a processor (SIGSTOP, SIGCONT), as if it had a slow core of its own, and the"
        " rest is left to PostgreSQL and the load. Beside it the same with all sharing what there is.",
        goals,
        figures_table(list(sides.values()), list(found.values())),
    )


def users(stage: Stage) -> Finding:
    """Compare a few calling users with more than a worker caches."""
    most = max(stage.amounts.users)
    url = stage.plain(most, 20 * most)
    with ExitStack() as stack:
        sides = []
        for count in stage.amounts.users:
            requests = ONE.requests(stage.people(url, count))
            server = stack.enter_context(stage.server(url))
            anyone = random.Random(count).choices(requests, k=CALLS)  # noqa: S311  # not a secret
            sides.append(stage.side(f"{count:,} people", server, ONE, anyone))
        found = stage.turns(*sides)
    return Finding(
        "a few people and many",
        f"`{ONE.title}` by one of them at random each time; each side has a server of its own, whose memory is there."
        f" A worker remembers {CACHE_ENTRIES:,} verified tokens: any other is verified anew.",
        [
            goal
            for side, turns in zip(sides[1:], found[1:], strict=True)
            for goal in beside(f"{side.title} against {sides[0].title}", found[0], turns)
        ],
        figures_table(sides, found),
    )


MEASUREMENTS: Mapping[str, Callable[[Stage], Finding]] = {
    measure.__name__: measure for measure in (tasks, pages, workers, users, forged, start, memory)
}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write the result, and return the exit code; a missed goal is not a failure."""
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description="What more of everything costs this API.")
    parser.add_argument("--quick", action="store_true", help="small amounts, in short rounds")
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="only this measurement; can be repeated")
    parser.add_argument("--verbose", action="store_true", help="print the servers' logs")
    options = parser.parse_args(arguments)
    try:
        for name in options.only or MEASUREMENTS:
            text = run(QUICK if options.quick else FULL, name, verbose=options.verbose)
            sys.stdout.write(text)
            if not options.quick:
                write({f"growth-{name}.md": text})
    except (BenchmarkError, EmbeddedPostgresError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(amounts: Amounts, name: str, *, verbose: bool = False) -> str:
    """Run one measurement; its report in Markdown."""
    generator = load.choose()
    busy_before = os.getloadavg()[0]
    issuer = LocalIssuer(ISSUER, audience=AUDIENCE)
    with (
        EmbeddedPostgres(settings=plans.ROOMY) as postgres,
        serve_keys(issuer) as jwks_url,
        TemporaryDirectory() as folder,
    ):
        stage = Stage(amounts, postgres.url, postgres.pid, issuer, jwks_url, generator, Path(folder), verbose)
        say(name)
        finding = MEASUREMENTS[name](stage)
        pace = amounts.pace
        about = circumstances(
            f"{pace.rounds} after one that does not count, in which each side has {pace.warm_up} s of warm-up and "
            f"{pace.loaded} s with {CONNECTIONS} connections, if nothing else is said",
            generator=generator,
            database_url=postgres.url,
            busy_before=busy_before,
        )
    return report(finding, about)


if __name__ == "__main__":
    sys.exit(main())
