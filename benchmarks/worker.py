"""Measures one worker: time to its first response, cost of a forged token, memory after many requests."""

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import psycopg

from backend.auth import InvalidToken, TokenVerifier
from backend.auth.jwk import KeySet
from backend.auth.jws import parse_jws
from backend.auth.testing import LocalIssuer
from benchmarks import load
from benchmarks.__main__ import PEOPLE, say
from benchmarks.errors import BenchmarkError
from benchmarks.report import Figure
from benchmarks.rounds import CONNECTIONS
from benchmarks.servers import Server
from benchmarks.turns import Finding, Goal, Stage, Turn, figures_table, resident
from benchmarks.workloads import ONE, REFUSED, Person, Request, Workload, bearer

PARTS = 10  # the tokens are used in so many parts, one after the other
LONGEST = 60  # seconds


def memory(stage: Stage) -> Finding:
    """Compare a worker's memory after few and after many requests, with more tokens than it caches."""
    tokens, (first, last) = stage.amounts.tokens, stage.amounts.requests
    url = stage.plain(tokens, tokens)
    say(f"making {tokens:,} tokens")
    requests = ONE.requests(stage.people(url, tokens))
    files = [stage.prepare(requests[number::PARTS]) for number in range(PARTS)]
    with stage.server(url) as server:
        looks = [(0, _memory(server))]

        def ask(file: Path, count: int) -> None:
            done, _ = looks[-1]
            looks.append((done + _ask(stage, server, file, count), _memory(server)))
            say("{:,} requests: {:,.1f} MB".format(*looks[-1]))

        ask(files[0], first)
        ask(files[0], last // PARTS - first)
        for file in files[1:]:
            ask(file, last // PARTS)
    (few, before), (many, after) = looks[1], looks[-1]
    return Finding(
        "one worker, after many requests",
        f"`{ONE.title}` with {tokens:,} tokens of as many people: one {PARTS}th of them by turns, then the next."
        " Memory is what is resident, with what is shared, in megabytes of 1,000,000 bytes.",
        [
            Goal(f"after {many:,} requests, against that after {few:,}", Figure.of([after / before]), most=1.2),
            Goal(f"after {many:,} requests", Figure.of([after]), "MB", most=150),
        ],
        [("Requests so far", "memory MB"), *((f"{count:,}", f"{found:,.1f}") for count, found in looks)],
    )


def _ask(stage: Stage, server: Server, file: Path, count: int) -> int:
    """Send at least `count` requests; return the number sent."""
    done, seconds = 0, 1
    while done < count:
        found = load.run(stage.generator, server.url, file, connections=CONNECTIONS, seconds=seconds, refused=False)
        done += found.requests
        seconds = min(LONGEST, max(1, int((count - done) / found.requests * found.seconds)))
    return done


def _memory(server: Server) -> float:
    found = resident(server.pid)
    if found is None:
        raise BenchmarkError("memory cannot be measured: there is no /proc")
    return found


def forged(stage: Stage) -> Finding:
    """Compare a forged token with a known key id to a request without a token, and to one signature check."""
    url = stage.plain(*stage.amounts.usual)
    forger = LocalIssuer(stage.issuer.url, audience=stage.issuer.audience)
    people = [
        Person(forger.token(sub=f"user{number}", header={"kid": stage.issuer.key.kid}), []) for number in range(PEOPLE)
    ]
    requests = [Request("GET", "/api/v1/tasks?limit=20", bearer(person)) for person in people]
    workload = Workload("forged", "GET /api/v1/tasks with a forged token", 401, lambda _: requests, REFUSED.fits)
    found: list[tuple[Turn, Turn]] = []
    checks, refusals, connections = [], [], []
    with stage.server(url) as server:
        sides = [
            stage.side("a forged token", server, workload, requests),
            stage.side("no token", server, REFUSED, REFUSED.requests([])),
        ]
        for _ in range(stage.amounts.pace.rounds + 1):
            moment = now(url)
            bad = stage.turn(sides[0])
            connections.append(connections_used(url, moment))
            found.append((bad, stage.turn(sides[1])))
            checks.append(_signature(stage.issuer, stage.amounts.checks))
            refusals.append(_refusal(stage.issuer.verifier(), people, stage.amounts.checks))
            say(f"one check {checks[-1]:.0f} us, one refusal {refusals[-1]:.0f} us")
    pairs = [
        (bad.server_cpu - without.server_cpu, check)
        for (bad, without), check in zip(found[1:], checks[1:], strict=True)
        if bad.server_cpu is not None and without.server_cpu is not None
    ]
    return Finding(
        "a forged token of a known key",
        f"{sides[0].workload.title}, of {PEOPLE} forged ones, and without. One check of a signature (Ed25519) and one"
        " refusal by the verifier alone are timed in turn with them, in a process without requests. A connection is"
        " used when its state at PostgreSQL has changed since the forged tokens began to come.",
        [
            Goal(
                "processor time beyond that without a token, against one check",
                Figure.of([beyond / check for beyond, check in pairs]) if pairs else None,
                most=2,
            ),
            Goal("the same", Figure.of([beyond for beyond, _ in pairs]) if pairs else None, "us"),
            Goal("one check of a signature", Figure.of(checks[1:]), "us"),
            Goal("one refusal by the verifier alone", Figure.of(refusals[1:]), "us"),
            Goal("connections to the database used meanwhile", Figure.of(connections[1:]), "", most=0),
        ],
        figures_table(sides, list(zip(*found[1:], strict=True))),
    )


def _signature(issuer: LocalIssuer, times: int) -> float:
    """The processor time in microseconds of one check of a valid signature."""
    jws = parse_jws(issuer.token())
    key = KeySet.from_jwks(issuer.jwks).keys[jws.kid]

    def check() -> None:
        for _ in range(times):
            assert jws.is_signed_by(key)

    return _processor_us(check) / times


def _refusal(verifier: TokenVerifier, people: list[Person], times: int) -> float:
    """The processor time in microseconds of one refusal of a forged token."""

    async def refuse() -> None:
        for number in range(times):
            try:
                await verifier.verify(people[number % len(people)].token)
            except InvalidToken:
                continue
            raise BenchmarkError("the verifier accepted a forged token")

    return _processor_us(lambda: asyncio.run(refuse())) / times


def _processor_us(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return (time.process_time() - started) * 1e6


def now(url: str) -> datetime:
    """The time of PostgreSQL's clock."""
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT clock_timestamp()").fetchone()
    assert row
    moment: datetime = row[0]
    return moment


def connections_used(url: str, since: datetime) -> int:
    """How many of the pool's connections have been active since a time of PostgreSQL's clock."""
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'resource-server' AND greatest(state_change, backend_start) >= %s",
            (since,),
        ).fetchone()
    assert row
    return int(row[0])


def start(stage: Stage) -> Finding:
    """Measure the time from the start of `serve` to its first authenticated response."""
    url = stage.plain(*stage.amounts.usual)
    request, *_ = ONE.requests(stage.people(url, 1))
    took = []
    for _ in range(stage.amounts.starts):
        started = time.perf_counter()
        with stage.server(url) as server:
            server.check(ONE, request)
            took.append(time.perf_counter() - started)
        say(f"{took[-1]:.2f} s")
    return Finding(
        "the first answer after the start",
        f"From starting the process until `{ONE.title}` is answered with 200, of a server with empty caches;"
        f" {stage.amounts.starts} starts.",
        [Goal("until the first answer", Figure.of(took), "s", most=2)],
    )
