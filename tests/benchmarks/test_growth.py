"""The growth benchmark measures what it says, of the API as it is served, and knows what was to be reached."""

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
from benchmarks.turns import Amounts, Finding, Goal, Stage, Turn
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


class Single:
    """A generator of load in Python: each request once, over one connection, however long that takes."""

    name = "single"
    code = """
import http.client, json, sys, time
url, file = sys.argv[1:]
requests, statuses, started = json.load(open(file, encoding="utf-8")), [], time.monotonic()
connection = http.client.HTTPConnection(url.removeprefix("http://"))
for each in requests:
    connection.request(each["method"], each["path"], headers=each["headers"])
    answer = connection.getresponse()
    answer.read()
    statuses.append(answer.status)
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
    # A server of others may be the PostgreSQL, so its processor time is not looked at here.
    return Stage(TINY, postgres, os.getpid(), issuer, jwks_url, Single(), tmp_path_factory.mktemp("growth"))


@pytest.mark.parametrize("name", [name for name in MEASUREMENTS if name != "memory" or cpu.PROC.exists()])
def test_a_measurement_is_taken_of_the_api_as_it_is_served(stage: Stage, name: str) -> None:
    finding = MEASUREMENTS[name](stage)
    figures = [goal.found for goal in finding.goals if goal.found]
    assert figures
    assert all(figure.least == figure.greatest for figure in figures), "only one round counts"
    assert name == "users" or any(goal.most is not None or goal.least is not None for goal in finding.goals)
    text = turns.report(finding, {"revision": "some"})
    assert "- revision: some" in text
    assert text.startswith(f"# This API compared with itself: {finding.title}\n")
    for first, *_ in [*finding.rows, *(goal.row for goal in finding.goals)]:
        assert f"| {first} |" in text
    held_of_its_own = {"forged": no_connection_is_taken, "memory": requests_are_counted, "workers": two_are_more}
    held_of_its_own.get(name, lambda _: None)(finding)


def no_connection_is_taken(finding: Finding) -> None:
    assert next(goal.reached for goal in finding.goals if "connections" in goal.what)


def requests_are_counted(finding: Finding) -> None:
    counts = [int(count.replace(",", "")) for count, _ in finding.rows[1:]]
    assert counts[:1] == [0]
    assert counts == sorted(set(counts))
    assert TINY.requests[0] <= counts[1] < TINY.requests[1] <= counts[-1]


def two_are_more(finding: Finding) -> None:
    if cpu.PROC.exists():
        one, two = (float(row[-1].partition(" ")[0]) for row in finding.rows[1:3])
        assert any(goal.least for goal in finding.goals), "on slow cores"
        assert two > 1.5 * one, "megabytes of one worker, and of two"


def test_a_page_that_is_not_the_late_one_is_an_error(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = growth.walk
    monkeypatch.setattr(growth, "walk", lambda server, person, skipped: walk(server, person, skipped - 20))
    with pytest.raises(BenchmarkError, match="page 9"):
        growth.pages(stage)


def test_a_connection_that_is_taken_is_seen(stage: Stage) -> None:
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


def test_what_a_side_costs_is_told_round_by_round() -> None:
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
    ("goal", "told"),
    [
        (Goal("it", Figure(1.2, 1, 9), most=1.2), ("1.20 (1.00-9.00) times", "at most 1.2 times", "yes")),
        (Goal("it", Figure(1.21, 1, 1.21), most=1.2), ("1.21 (1.00-1.21) times", "at most 1.2 times", "**no**")),
        (Goal("it", Figure(1.7, 1.7, 1.7), least=1.7), ("1.70 times", "at least 1.7 times", "yes")),
        (Goal("it", Figure(1.6, 1, 2), least=1.7), ("1.60 (1.00-2.00) times", "at least 1.7 times", "**no**")),
        (Goal("it", Figure(0, 0, 0), "", most=0), ("0.00", "at most 0", "yes")),
        (Goal("it", Figure(1, 1, 1), "", most=0), ("1.00", "at most 0", "**no**")),
        (Goal("it", Figure(3, 3, 3), "us"), ("3.00 us", "", "")),
        (Goal("it", None, most=2), ("not measured", "at most 2 times", "")),
    ],
)
def test_a_goal_says_whether_the_median_reaches_it(goal: Goal, told: tuple[str, ...]) -> None:
    assert goal.row == ("it", *told)


def test_only_full_amounts_are_written_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[object, ...]] = []
    written: list[object] = []

    def run(amounts: Amounts, name: str, **_: bool) -> str:
        asked.append((amounts, name))
        return f"of {name}\n"

    monkeypatch.setattr(growth, "run", run)
    monkeypatch.setattr(growth, "write", written.append)
    assert growth.main(["--quick"]) == 0
    assert not written
    assert growth.main(["--only", "start", "--only", "pages"]) == growth.main([]) == 0
    names = ["start", "pages", *MEASUREMENTS]
    assert written == [{f"growth-{name}.md": f"of {name}\n"} for name in names]
    assert asked == [(growth.QUICK, name) for name in MEASUREMENTS] + [(growth.FULL, name) for name in names]
    assert capsys.readouterr().out == "".join(f"of {name}\n" for name in [*MEASUREMENTS, *names])


@pytest.mark.skipif(not cpu.PROC.exists(), reason="who serves is found in /proc")
def test_who_has_had_a_share_is_stopped_and_goes_on_at_the_end() -> None:
    """Of a server those that serve; what is above them goes on."""
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
        busy = int(server.stdout.readline())
        seen: set[tuple[bool, str]] = set()
        with ration.rationed(server.pid, 0.2):
            while not {(True, "R"), (True, "T")} <= seen:
                seen |= {(pid == busy, state(pid)) for pid in (server.pid, busy)}
        assert (False, "T") not in seen
        while state(busy) == "T":
            pass
        server.communicate()
