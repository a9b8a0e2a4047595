"""Compares this API with itself: loads several sides in turns, A B A B ..., and reports their ratios."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import LiteralString
from uuid import uuid4

import psycopg
from psycopg.sql import SQL, Identifier

from backend import migrations
from backend.auth.testing import LocalIssuer
from benchmarks import cpu, data, plans, ration
from benchmarks.__main__ import say
from benchmarks.issuer import AUDIENCE, LIFETIME
from benchmarks.load import Generator
from benchmarks.peers import OURS, serve
from benchmarks.report import Figure, figure, ratio
from benchmarks.rounds import CONNECTIONS, Pace, Sample, Scene, take
from benchmarks.servers import Server, environment, running
from benchmarks.workloads import Person, Request, Workload

_PEOPLE: LiteralString = """
SELECT u.subject, (
  SELECT t.id FROM tasks t WHERE t.owner_id = u.id AND t.deleted_at IS NULL ORDER BY t.created_at DESC LIMIT 1
) FROM users u ORDER BY u.id LIMIT %s
"""


@dataclass(frozen=True)
class Turn(Sample):
    """A sample with the server's memory at its end, in megabytes (None: no /proc)."""

    memory: float | None


@dataclass(frozen=True)
class Side:
    """One server with its workload."""

    title: str
    server: Server
    scene: Scene
    workload: Workload
    connections: int = CONNECTIONS
    share: float | None = None
    """The share of a processor for each of its workers; None: unlimited."""


@dataclass(frozen=True)
class Amounts:
    """The amounts of everything that is measured.

    usual: users and tasks in measurements of something else.
    owners: users in the small and in the large table.
    most: about how many tasks the largest owner has; `page` is the number of that owner's late page.
    users: the number of calling users, for each side.
    requests: after how many requests a worker's memory is measured, first and last.
    tokens: the number of users in that measurement.
    starts: the number of server starts.
    checks: the number of signature verifications in a round.
    """

    pace: Pace
    usual: tuple[int, int]
    owners: tuple[int, int]
    most: int
    page: int
    users: tuple[int, ...]
    requests: tuple[int, int]
    tokens: int
    starts: int
    checks: int


@dataclass(frozen=True)
class Stage:
    """The parts that all measurements share. Databases are seeded at their first use and kept."""

    amounts: Amounts
    postgres_url: str
    postgres_pid: int
    issuer: LocalIssuer
    jwks_url: str
    generator: Generator
    folder: Path
    verbose: bool = False
    _filled: dict[str, str] = field(default_factory=dict)

    def plain(self, people: int, tasks: int) -> str:
        """The URL of a database with `tasks` tasks, distributed evenly over `people` users."""
        fill = partial(data.seed, issuer=self.issuer.url, users=people, tasks=tasks)
        return self._database(f"plain_{people}_{tasks}", fill)

    def tagged(self, owners: int, tasks: int, most: int) -> str:
        """The URL of a database like that of `benchmarks.plans`: with tags, trash, and one owner of `most` tasks."""

        def fill(url: str) -> None:
            migrations.upgrade(url)
            with psycopg.connect(url) as connection:
                plans.seed(connection, rows=tasks, owners=owners, most=most)

        return self._database(f"tagged_{owners}_{tasks}_{most}", fill)

    def _database(self, name: str, fill: Callable[[str], None]) -> str:
        if name not in self._filled:
            say(f"seeding {name}")
            started, unused = time.perf_counter(), f"{name}_{uuid4().hex[:8]}"
            with psycopg.connect(self.postgres_url, autocommit=True) as connection:
                connection.execute(SQL("CREATE DATABASE {}").format(Identifier(unused)))
            url = self.postgres_url.replace("/postgres?", f"/{unused}?", 1)
            fill(url)
            self._filled[name] = url
            say(f"seeded in {time.perf_counter() - started:.0f} s")
        return self._filled[name]

    def server(self, url: str, *, workers: int = 1) -> AbstractContextManager[Server]:
        """Run this API with production settings, except DRAIN_SECONDS=0, on one of the databases."""
        peer = replace(OURS, command=partial(serve, workers=workers))
        variables = environment(url, self.issuer.url, self.jwks_url, AUDIENCE) | {"DRAIN_SECONDS": "0"}
        return running(peer, variables, show_log=self.verbose)

    def token(self, subject: str) -> str:
        return self.issuer.token(sub=subject, expires_in=LIFETIME)

    def people(self, url: str, count: int) -> list[Person]:
        """The first `count` users of a database, each with the newest task."""
        with psycopg.connect(url) as connection:
            return [Person(self.token(name), [task]) for name, task in connection.execute(_PEOPLE, (count,))]

    def prepare(self, requests: Sequence[Request]) -> Path:
        return self.generator.prepare(requests, self.folder / uuid4().hex)

    def side(self, title: str, server: Server, workload: Workload, requests: list[Request]) -> Side:
        scene = Scene(
            database_url=self.postgres_url,
            postgres=self.postgres_pid,
            variables={},  # the server is running
            generator=self.generator,
            requests={workload.name: requests},
            files={workload.name: self.prepare(requests)},
        )
        return Side(title, server, scene, workload)

    def turn(self, side: Side) -> Turn:
        """Warm up and load. Raises BenchmarkError for a wrong response."""
        with ration.rationed(side.server.pid, side.share) if side.share else nullcontext():
            pace = replace(self.amounts.pace, connections=side.connections)
            sample = take(side.scene, side.server, side.workload, pace)
        return Turn(**vars(sample), memory=resident(side.server.pid))

    def turns(self, *sides: Side) -> list[list[Turn]]:
        """The turns of each side, one per round. An extra first round warms up and is discarded."""
        by_round = []
        for number in range(self.amounts.pace.rounds + 1):
            by_round.append([self.turn(side) for side in sides])
            rates = ", ".join(f"{turn.requests_per_second:,.0f}/s" for turn in by_round[-1])
            say(f"round {number} of {self.amounts.pace.rounds}: {rates}")
        return [list(turns) for turns in zip(*by_round[1:], strict=True)]


@dataclass(frozen=True)
class Goal:
    """A measured figure (None: not measured) with its goal, if there is one."""

    what: str
    found: Figure | None
    unit: str = "times"
    most: float | None = None
    least: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the median meets the goal. None: no goal or no figure."""
        if self.found is None or (self.most is None and self.least is None):
            return None
        middle = self.found.median
        return (self.least is None or middle >= self.least) and (self.most is None or middle <= self.most)

    @property
    def row(self) -> tuple[str, ...]:
        wanted = [
            f"at {word} {bound:g} {self.unit}".strip()
            for word, bound in (("most", self.most), ("least", self.least))
            if bound is not None
        ]
        verdict = {None: "", True: "yes", False: "**no**"}[self.reached]
        found = "not measured" if self.found is None else f"{self.found.text(',.2f')} {self.unit}".strip()
        return self.what, found, " and ".join(wanted), verdict


@dataclass(frozen=True)
class Finding:
    """One measurement: its method, its goals, and the rows of a table, beginning with the head."""

    title: str
    method: str
    goals: Sequence[Goal]
    rows: Sequence[tuple[str, ...]] = ()


def beside(what: str, one: Sequence[Turn], other: Sequence[Turn], most: float | None = None) -> list[Goal]:
    """The cost of the other side relative to the first, round by round."""
    return [
        Goal(f"{what}: fewer requests/s", ratio(one, other, "requests_per_second"), most=most),
        Goal(f"{what}: server's processor time", ratio(other, one, "server_cpu")),
        Goal(f"{what}: PostgreSQL's processor time", ratio(other, one, "postgres_cpu")),
    ]


COLUMNS = {
    "requests/s": "requests_per_second",
    "server CPU us": "server_cpu",
    "PostgreSQL CPU us": "postgres_cpu",
    "memory MB": "memory",
}


def figures_table(sides: Sequence[Side], found: Sequence[Sequence[Turn]]) -> list[tuple[str, ...]]:
    """The head and a row for each side; processor time is per request."""

    def cell(found: Figure | None) -> str:
        return "not measured" if found is None else found.text(",.0f")

    rows = [
        (side.title, *(cell(figure(turns, name)) for name in COLUMNS.values()))
        for side, turns in zip(sides, found, strict=True)
    ]
    return [("Asked", *COLUMNS), *rows]


def resident(pid: int) -> float | None:
    """Resident memory of all descendants of a watchdog in megabytes: the sum of `VmRSS` (proc_pid_status(5))."""
    if not cpu.PROC.exists():
        return None
    children = (cpu.PROC / str(pid) / "task" / str(pid) / "children").read_text().split()
    return sum(_kilobytes(int(child)) * 1024 / 1e6 + (resident(int(child)) or 0) for child in children)


def _kilobytes(pid: int) -> int:
    status = (cpu.PROC / str(pid) / "status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


def report(finding: Finding, about: Mapping[str, str]) -> str:
    """A finding in Markdown."""
    lines = [f"# This API compared with itself: {finding.title}", "", finding.method, ""]
    lines += ["Medians of all rounds, least and greatest; ratios are taken round by round.", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    goals = [goal.row for goal in finding.goals]
    lines += ["", *plans.table("What", "Found", "Goal", "Reached", rows=goals)]
    if finding.rows:
        head, *rows = finding.rows
        lines += ["", *plans.table(*head, rows=rows)]
    return "\n".join([*lines, ""])
