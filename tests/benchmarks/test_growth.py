"""The growth benchmark: its measurements on a real server, its figures and its goals."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from backend.auth.testing import LocalIssuer
from benchmarks import cpu, growth, load, ration, turns, worker
from benchmarks.errors import BenchmarkError
from benchmarks.growth import MEASUREMENTS
from benchmarks.report import Figure
from benchmarks.rounds import Pace
from benchmarks.turns import Amounts, Goal, Stage, Turn
from benchmarks.workloads import ONE, Request

TINY = Amounts(
    Pace(rounds=1, warm_up=0, loaded=0, alone=0),
    usual=(4, 160),
    owners=(2, 3),
    most=800,
    page=9,
    users=(2, 3),
    requests=(2, 40),
    tokens=20,
    starts=1,
    checks=5,
)


class OneByOne:
    """A load generator in Python that sends each request once, over one connection."""

    name = "one by one"
    code = """
import http.client, json, sys, time
url, file = sys.argv[1:]
requests, statuses, started = json.load(open(file, encoding="utf-8")), [], time.monotonic()
connection = http.client.HTTPConnection(url.removeprefix("http://"))
for each in requests:
    connection.request(each["method"], each["path"], headers=each["headers"])
    response = connection.getresponse()
    response.read()
    statuses.append(response.status)
took = time.monotonic() - started
refused = sum(status >= 400 for status in statuses)
print(json.dumps(dict(requests=len(statuses), seconds=took, p50=1, p99=1, refused=refused, errors=0)))
"""

    def prepare(self, requests: Sequence[Request], file: Path) -> Path:
        return load.Autocannon("node").prepare(requests[:40], file)

    def command(self, url: str, requests: Path, *_: int) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", self.code, url, str(requests)]


@pytest.fixture(scope="module")
def stage(postgres: str, issuer: LocalIssuer, jwks_url: str, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    # PostgreSQL may run on another machine, so this process's time stands in for PostgreSQL's.
    return Stage(TINY, postgres, os.getpid(), issuer, jwks_url, OneByOne(), tmp_path_factory.mktemp("growth"))


# One measurement tests in the gate that servers, load and report fit together.
NAMES = [pytest.param(name, marks=() if name == "start" else pytest.mark.full) for name in MEASUREMENTS]


@pytest.mark.parametrize("name", NAMES)
def test_a_measurement_reports_figures_and_goals(stage: Stage, name: str) -> None:
    if name == "memory" and not cpu.PROC.exists():
        pytest.skip("memory is read from /proc")
    finding = MEASUREMENTS[name](stage)
    figures = [goal.found for goal in finding.goals if goal.found]
    assert figures
    assert all(figure.least == figure.greatest for figure in figures), "there was only one round"
    text = turns.report(finding, {"revision": "some"})
    assert "- revision: some" in text
    for first, *_ in [*finding.rows, *(goal.row for goal in finding.goals)]:
        assert f"| {first} |" in text


@pytest.mark.full
def test_a_wrong_late_page_is_an_error(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = growth.walk
    monkeypatch.setattr(growth, "walk", lambda server, person, skipped: walk(server, person, skipped - 20))
    with pytest.raises(BenchmarkError, match="page 9"):
        growth.pages(stage)


@pytest.mark.full
def test_a_used_connection_is_counted(stage: Stage) -> None:
    url = stage.plain(*TINY.usual)
    request, *_ = ONE.requests(stage.people(url, 1))
    with stage.server(url) as server:
        before = worker.now(url)
        assert worker.connections_used(url, before) == 0
        server.check(ONE, request)
        assert worker.connections_used(url, before) > 0
        assert worker.connections_used(url, worker.now(url)) == 0


def turn(rate: float, server: float | None, postgres: float | None = None) -> Turn:
    return Turn(rate, 1.0, 2.0, None, None, server, postgres, 100, None)


def test_the_cost_of_a_side_is_computed_per_round() -> None:
    one, other = [turn(100, 10, 5), turn(200, 20, 5)], [turn(50, 30, 5), turn(100, 60, 10)]
    rate, server, postgres = turns.beside("more", one, other, most=1.9)
    assert (rate.found, server.found, postgres.found) == (Figure.of([2.0]), Figure.of([3.0]), Figure.of([1.0, 2.0]))
    assert (rate.reached, server.reached) == (False, None)
    assert turns.beside("more", one, [turn(50, None)] * 2)[1].row == (
        "more: server's processor time",
        "not measured",
        "",
        "",
    )


@pytest.mark.parametrize(
    ("goal", "row"),
    [
        (Goal("it", Figure(1.2, 1, 9), most=1.2), ("1.20 (1.00-9.00) times", "at most 1.2 times", "yes")),
        (Goal("it", Figure(1.21, 1, 1.21), most=1.2), ("1.21 (1.00-1.21) times", "at most 1.2 times", "**no**")),
        (Goal("it", Figure(1.7, 1.7, 1.7), least=1.7), ("1.70 times", "at least 1.7 times", "yes")),
        (Goal("it", Figure(1.6, 1, 2), least=1.7), ("1.60 (1.00-2.00) times", "at least 1.7 times", "**no**")),
        (Goal("it", Figure(1, 1, 1), "", most=0), ("1.00", "at most 0", "**no**")),
        (Goal("it", Figure(3, 3, 3), "us"), ("3.00 us", "", "")),
        (Goal("it", None, most=2), ("not measured", "at most 2 times", "")),
    ],
)
def test_a_goal_is_reached_by_the_median(goal: Goal, row: tuple[str, ...]) -> None:
    assert goal.row == ("it", *row)


def test_only_full_runs_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[object, ...]] = []
    written: list[object] = []

    def run(amounts: Amounts, name: str, **_: bool) -> str:
        runs.append((amounts, name))
        return f"of {name}\n"

    monkeypatch.setattr(growth, "run", run)
    monkeypatch.setattr(growth, "write", written.append)
    assert growth.main(["--quick"]) == 0
    assert runs == [(growth.QUICK, name) for name in MEASUREMENTS]
    assert not written
    assert growth.main(["--only", "start", "--only", "pages"]) == 0
    assert runs[len(MEASUREMENTS) :] == [(growth.FULL, name) for name in ("start", "pages")]
    assert written == [{f"growth-{name}.md": f"of {name}\n"} for name in ("start", "pages")]


@pytest.mark.skipif(not cpu.PROC.exists(), reason="workers are found in /proc")
def test_a_worker_over_its_share_is_stopped_and_continues_at_the_end() -> None:
    """Only workers are stopped, not their parent process."""
    code = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
print(child.pid, flush=True)
sys.stdin.read()
child.kill()
"""

    def state(pid: int) -> str:
        return (cpu.PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]

    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout
        worker_pid = int(server.stdout.readline())
        seen: set[tuple[bool, str]] = set()
        with ration.rationed(server.pid, 0.2):
            while not {(True, "R"), (True, "T")} <= seen:
                seen |= {(pid == worker_pid, state(pid)) for pid in (server.pid, worker_pid)}
        assert (False, "T") not in seen
        while state(worker_pid) == "T":
            pass
        server.communicate()
