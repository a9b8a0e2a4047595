"""This API beside itself: sides that are asked in turns, A B A B ..., and what is told of them."""

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
    """As a peer's, and the megabytes that the server has in memory at its end (None: there is no /proc)."""

    memory: float | None


@dataclass(frozen=True)
class Side:
    """One server, and what it is asked."""

    title: str
    server: Server
    scene: Scene
    workload: Workload
    connections: int = CONNECTIONS
    share: float | None = None
    """So much of a processor has each of its workers; None: as much as there is."""


@dataclass(frozen=True)
class Amounts:
    """How much of everything that is measured.

    usual: people and tasks, where their number is not what is measured.
    owners: people of the small table and the large one.
    most: about so many tasks has the one who has the most, of whose pages `page` is the late one.
    users: people who call, on each side.
    requests, tokens: how many of them a worker has seen when its memory is looked at, first and last, and of how many
        people in all.
    starts: how often the server is started.
    checks: how often a signature is verified in a round.
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
    """What all measurements share. Databases are filled when they are asked for, and then kept."""

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
        """The URL of a database with so many tasks, as many for each."""
        fill = partial(data.seed, issuer=self.issuer.url, users=people, tasks=tasks)
        return self._database(f"plain_{people}_{tasks}", fill)

    def tagged(self, owners: int, tasks: int, most: int) -> str:
        """The URL of a database as plans are tried in: with tags, a bin, and about `most` tasks of the one who has the
        most."""

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
        """This API as in production, on one of the databases; only, it does not wait before it stops."""
        peer = replace(OURS, command=partial(serve, workers=workers))
        variables = environment(url, self.issuer.url, self.jwks_url, AUDIENCE) | {"DRAIN_SECONDS": "0"}
        return running(peer, variables, show_log=self.verbose)

    def token(self, subject: str) -> str:
        return self.issuer.token(sub=subject, expires_in=LIFETIME)

    def people(self, url: str, count: int) -> list[Person]:
        """The first so many of a database, each with the newest of their tasks."""
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
        """Warm up, and load. Raises BenchmarkError at a wrong answer."""
        with ration.rationed(side.server.pid, side.share) if side.share else nullcontext():
            pace = replace(self.amounts.pace, connections=side.connections)
            sample = take(side.scene, side.server, side.workload, pace)
        return Turn(**vars(sample), memory=resident(side.server.pid))

    def turns(self, *sides: Side) -> list[list[Turn]]:
        """Of each side its turns, one in each round. The first round of all warms up, and is thrown away."""
        by_round = []
        for number in range(self.amounts.pace.rounds + 1):
            by_round.append([self.turn(side) for side in sides])
            rates = ", ".join(f"{turn.requests_per_second:,.0f}/s" for turn in by_round[-1])
            say(f"round {number} of {self.amounts.pace.rounds}: {rates}")
        return [list(turns) for turns in zip(*by_round[1:], strict=True)]


@dataclass(frozen=True)
class Goal:
    """What was found (None: it could not be measured), and what was to be reached, if anything."""

    what: str
    found: Figure | None
    unit: str = "times"
    most: float | None = None
    least: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the median is. None: there is no goal, or no figure."""
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
    """One measurement: how it was made, what came of it, and the rows of a table, of which the first is its head."""

    title: str
    method: str
    goals: Sequence[Goal]
    rows: Sequence[tuple[str, ...]] = ()


def beside(what: str, one: Sequence[Turn], other: Sequence[Turn], most: float | None = None) -> list[Goal]:
    """What the other side costs in comparison with the one, round by round."""
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


def told(sides: Sequence[Side], found: Sequence[Sequence[Turn]]) -> list[tuple[str, ...]]:
    """A row for each side, below the head; processor time is that of one request."""

    def cell(found: Figure | None) -> str:
        return "not measured" if found is None else found.text(",.0f")

    rows = [
        (side.title, *(cell(figure(turns, name)) for name in COLUMNS.values()))
        for side, turns in zip(sides, found, strict=True)
    ]
    return [("Asked", *COLUMNS), *rows]


def resident(pid: int) -> float | None:
    """The megabytes in memory of all that a leash holds, as `VmRSS` counts them (proc_pid_status(5))."""
    if not cpu.PROC.exists():
        return None
    children = (cpu.PROC / str(pid) / "task" / str(pid) / "children").read_text().split()
    return sum(_kilobytes(int(child)) * 1024 / 1e6 + (resident(int(child)) or 0) for child in children)


def _kilobytes(pid: int) -> int:
    status = (cpu.PROC / str(pid) / "status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


def report(finding: Finding, about: Mapping[str, str]) -> str:
    """A finding in Markdown: how it was found, and what came of it."""
    lines = [f"# This API compared with itself: {finding.title}", "", finding.method, ""]
    lines += ["Medians of all rounds, least and greatest; ratios are taken round by round.", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    goals = [goal.row for goal in finding.goals]
    lines += ["", *plans.table("What", "Found", "Goal", "Reached", rows=goals)]
    if finding.rows:
        head, *rows = finding.rows
        lines += ["", *plans.table(*head, rows=rows)]
    return "\n".join([*lines, ""])
