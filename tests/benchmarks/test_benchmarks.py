"""The benchmark against other servers: equal work for each of them, and the computed figures."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4
from xml.etree import ElementTree as ET

import httpx
import psycopg
import pytest

from backend import __version__
from backend.auth.testing import LocalIssuer
from backend.resources.pagination import Page
from backend.settings import Settings
from backend.tasks.schemas import TaskRead
from benchmarks import chart, cpu, data, load, report
from benchmarks.__main__ import revision
from benchmarks.errors import BenchmarkError
from benchmarks.peers import ALL, OURS, PEERS, Peer
from benchmarks.rounds import Sample
from benchmarks.servers import environment, running
from benchmarks.workloads import CREATE, LIST, ONE, REFUSED, WORKLOADS, Person, Request, Workload
from tests.conftest import AUDIENCE, ISSUER, Api, create_database
from tests.conftest import running as in_process


@pytest.fixture(scope="module")
def seeded(postgres: str) -> str:
    """A database seeded like the benchmark's, with a hundredth of the tasks."""
    url = create_database(postgres, f"benchmark_{uuid4().hex[:8]}")
    data.seed(url, ISSUER, users=10, tasks=2_000)
    return url


@pytest.fixture(scope="module")
def people(seeded: str, issuer: LocalIssuer) -> list[Person]:
    return [Person(issuer.token(sub=name), data.newest(seeded, name, 2)) for name in ("user0", "user7")]


@pytest.fixture(scope="module")
async def ours(seeded: str, settings: Settings, issuer: LocalIssuer) -> AsyncIterator[Api]:
    async with in_process(settings.model_copy(update={"database_url": seeded}), issuer) as api:
        yield api


@pytest.fixture(scope="module", params=PEERS, ids=lambda peer: peer.name)
async def peer(
    request: pytest.FixtureRequest, seeded: str, jwks_url: str
) -> AsyncIterator[tuple[Peer, httpx.AsyncClient]]:
    """Each peer as the benchmark runs it."""
    with running(request.param, environment(seeded, ISSUER, jwks_url, AUDIENCE)) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
            yield request.param, http


async def send(http: httpx.AsyncClient, request: Request) -> httpx.Response:
    return await http.request(request.method, request.path, headers=request.headers, content=request.body)


def shape(body: Any) -> Any:
    """The names of all members with their types; None for null and [], which can be of any type."""
    if isinstance(body, dict):
        return {name: shape(value) for name, value in sorted(body.items())}
    if isinstance(body, list) and body:
        return [merged(list(map(shape, body)))]
    return None if body in (None, []) else type(body).__name__


def merged(shapes: Sequence[Any]) -> Any:
    """The common shape of a list's objects, with the types that any of them shows."""
    names = {frozenset(each) for each in shapes}
    assert len(names) == 1, "objects of one list with different members"
    return {name: next((each[name] for each in shapes if each[name]), None) for name in sorted(shapes[0])}


def tasks_in(body: Any) -> Any:
    """The tasks in a response, independent of the format of times and cursors."""
    return Page[TaskRead].model_validate(body).items if "items" in body else TaskRead.model_validate(body)


@pytest.mark.full
async def test_every_peer_responds_like_this_api(
    ours: Api, peer: tuple[Peer, httpx.AsyncClient], people: list[Person], seeded: str
) -> None:
    which, http = peer
    assert which.workloads <= ALL == {workload.name for workload in WORKLOADS}
    for workload in (workload for workload in WORKLOADS if workload.name in which.workloads):
        for request in workload.requests(people):
            expected, response = await send(ours.http, request), await send(http, request)
            assert response.status_code == expected.status_code == workload.status, response.text
            if workload is LIST:
                for each in expected, response:
                    assert len(each.content) == pytest.approx(7_000, rel=0.05), "the documented size of a page"
            mine, its = expected.json(), response.json()
            assert workload.fits(its)
            assert workload.fits(mine)
            if workload.status < 400:
                assert shape(its) == shape(mine)
                assert tasks_in(its)
            if which.workloads == ALL and request.method == "GET" and workload.status == 200:
                assert tasks_in(its) == tasks_in(mine)
    data.restore(seeded)


@pytest.mark.full
@pytest.mark.parametrize(
    "peer", [each for each in PEERS if each.workloads == ALL], ids=lambda peer: peer.name, indirect=True
)
async def test_a_peer_verifies_isolates_and_paginates(
    peer: tuple[Peer, httpx.AsyncClient], people: list[Person], issuer: LocalIssuer
) -> None:
    _, http = peer
    one, other = people
    mine, theirs = ({"Authorization": f"Bearer {person.token}"} for person in (one, other))
    path = f"/api/v1/tasks/{one.tasks[0]}"
    assert (await http.get(path, headers=mine)).status_code == 200
    assert (await http.get(path, headers=theirs)).status_code == 404, "another user's task"

    forged = LocalIssuer(ISSUER, audience=AUDIENCE).token(sub="user0", header={"kid": issuer.key.kid})
    assert (await http.get(path, headers={"Authorization": f"Bearer {forged}"})).status_code == 401

    page = (await http.get("/api/v1/tasks?limit=100", headers=mine)).json()
    rest = await http.get("/api/v1/tasks", params={"limit": 100, "cursor": page["next_cursor"]}, headers=mine)
    seen = [task["id"] for task in (*page["items"], *rest.json()["items"])]
    assert len(set(seen)) == len(seen) == 200
    assert rest.json()["next_cursor"] is None


@pytest.mark.full
async def test_restoring_the_data_deletes_the_created_tasks(ours: Api, people: list[Person], seeded: str) -> None:
    def stored() -> list[tuple[Any, ...]]:
        with psycopg.connect(seeded) as connection:
            return connection.execute("SELECT owner_id, id, title FROM tasks ORDER BY 1, 2").fetchall()

    before = stored()
    for request in CREATE.requests(people):
        await send(ours.http, request)
    assert len(stored()) == len(before) + len(people)
    data.restore(seeded)
    assert stored() == before


@pytest.mark.full
def test_an_unexpected_response_of_a_server_is_an_error(seeded: str, jwks_url: str, people: list[Person]) -> None:
    request, _ = LIST.requests(people)
    variables = environment(seeded, ISSUER, jwks_url, AUDIENCE) | {"DRAIN_SECONDS": "0"}
    with running(OURS, variables) as server:
        assert server.check(LIST, request) > 0
        if cpu.PROC.exists():
            assert (cpu.seconds(server.pid) or 0) > 0.1
        wrong = Workload("wrong", "", 200, lambda _: [], lambda body: len(body["items"]) == 3)
        with pytest.raises(BenchmarkError, match="ours"):
            server.check(wrong, request)
        with pytest.raises(BenchmarkError, match="401"):
            server.check(LIST, REFUSED.requests(people)[0])


def test_a_server_that_exits_is_an_error() -> None:
    exiting = Peer("exiting", "", lambda _: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(BenchmarkError, match="exiting did not start"), running(exiting, {}):
        pass


CALLERS = [Person(f"token{number}", [uuid4(), uuid4()]) for number in range(2)]


@pytest.mark.parametrize("workload", [LIST, ONE, CREATE], ids=lambda workload: workload.name)
def test_consecutive_requests_belong_to_different_users(workload: Workload) -> None:
    tokens = [request.headers["Authorization"] for request in workload.requests(CALLERS)]
    assert all(one != next for one, next in pairwise(tokens))
    assert len(set(tokens)) == len(CALLERS)


def test_each_generator_gets_the_same_requests(tmp_path: Path) -> None:
    requests = [*CREATE.requests(CALLERS), *ONE.requests(CALLERS)]
    lua = load.Wrk(sys.executable).prepare(requests, tmp_path / "x").read_text()
    strings = re.findall(r'^(".*"),?$', lua, re.MULTILINE)
    assert [json.loads(each) for each in strings] == [request.text for request in requests]
    parsed = json.loads(load.Autocannon("node").prepare(requests, tmp_path / "x").read_text())
    assert [Request(**each) for each in parsed] == requests


class Scripted:
    """A load generator that prints the given figures and exits with the given code."""

    name = "scripted"

    def __init__(self, code: int = 0, **figures: float) -> None:
        known = {"requests": 10, "seconds": 1.0, "p50": 1.0, "p99": 2.0, "refused": 0, "errors": 0}
        self._code = f"print('noise'); print({json.dumps(known | figures)!r}); raise SystemExit({code})"

    def prepare(self, _: Sequence[Request], file: Path) -> Path:
        return file

    def command(self, *_: object) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", self._code]


def run(generator: load.Generator, *, refused: bool = False) -> load.Load:
    return load.run(generator, "http://127.0.0.1", Path(), connections=1, seconds=1, refused=refused)


def test_expected_responses_are_counted() -> None:
    assert run(Scripted()).requests == 10
    assert run(Scripted(refused=10), refused=True).refused == 10


@pytest.mark.parametrize(
    ("generator", "refused"),
    [
        pytest.param(Scripted(refused=1), False, id="a refusal"),
        pytest.param(Scripted(refused=9), True, id="no refusal"),
        pytest.param(Scripted(errors=1), False, id="a lost connection"),
        pytest.param(Scripted(requests=0), False, id="no response"),
        pytest.param(Scripted(code=1), False, id="a crash"),
    ],
)
def test_an_unexpected_response_ends_the_benchmark(generator: load.Generator, refused: bool) -> None:
    with pytest.raises(BenchmarkError):
        run(generator, refused=refused)


def test_processor_time_is_that_of_the_whole_process_tree() -> None:
    line = "42 (a) R 1 (b) S 7 42 42 0 -1 4194560 9 8 7 6 100 20 3 4 20 0 1 0 99 0 0"
    assert cpu.parse(line) == cpu.Usage(parent=7, ticks=127), "the process is named `a) R 1 (b`"
    processes = {number: cpu.Usage(parent, ticks) for number, parent, ticks in [(2, 1, 5), (3, 2, 10), (4, 3, 20)]}
    processes |= {1: cpu.Usage(0, 1000), 9: cpu.Usage(1, 500)}
    assert cpu.total(2, processes) == 35


def sample(rate: float, cpu: float | None = 100.0) -> Sample:
    return Sample(rate, 1.0, 2.0, 0.5, 0.7, cpu, None, 6_800)


def test_figures_are_medians_and_ratios_are_computed_per_round() -> None:
    found = report.figure([sample(300), sample(100), sample(120)], "requests_per_second")
    assert found == report.Figure(120, 100, 300)
    assert found.text(",.0f") == "120 (100-300)"
    servers = {
        "ours": [sample(400, 50.0), sample(40, 80.0), sample(420, 50.0)],  # both are slow in the second round
        "it": [sample(200), sample(20), sample(105)],
    }
    ratios = report.ratios(servers, "it")
    assert ratios["requests_per_second"] == report.Figure(2, 2, 4)
    assert ratios["server_cpu"] == report.Figure(2, 1.25, 2)


def test_the_chart_shows_medians_and_ranges() -> None:
    samples = {
        "list": {
            "ours": [sample(300), sample(100), sample(200)],
            "bare_fastapi": [sample(400), sample(300), sample(500)],
        },
        "one": {"ours": [sample(8)] * 3},
    }
    drawing = ET.fromstring(chart.svg(samples, [LIST, ONE], "0.1.0 <1234>"))  # noqa: S314 - made by the chart
    namespace = {"": "http://www.w3.org/2000/svg"}
    texts = [each.text for each in drawing.findall("text", namespace)]
    assert "0.1.0 <1234>" in (texts[0] or "")
    assert texts[2:6] == ["bare_fastapi", "400 (300-500)", "ours", "200 (100-300)"], "the fastest first"
    widths = [float(each.attrib["width"]) for each in drawing.findall("rect", namespace)]
    assert widths == [0.8 * chart.LONGEST, 0.4 * chart.LONGEST, chart.LONGEST], "each workload on its own scale"


def test_the_report_contains_figures_and_ratios() -> None:
    samples = {"list": {"ours": [sample(200), sample(220)], "bare_fastapi": [sample(100), sample(100)]}}
    text = report.table(samples, [LIST], [OURS, *PEERS], {"load": "by hand"})
    assert "| `ours` | 210 (200-220) |" in text
    assert "| 2.10 (2.00-2.20) | 1.00 |" in text
    assert "not measured" in text, "PostgreSQL's time"
    assert "as a share of their median: 10% for requests/s, 0% for processor time" in text
    found = json.loads(json.dumps(report.document(samples, {})))["workloads"]["list"]["bare_fastapi"]
    assert found["times_ours"]["requests_per_second"]["median"] == pytest.approx(2.1)
    assert found["figures"]["postgres_cpu"] is None
    assert len(found["rounds"]) == 2


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_changed_code_makes_the_revision_dirty_and_changed_results_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.__main__.ROOT", tmp_path)
    result, code = tmp_path / "benchmarks" / "results" / "latest.md", tmp_path / "code.py"
    result.parent.mkdir(parents=True)
    code.touch()
    result.touch()
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    for words in ["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "x"]:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)  # noqa: S607  # the git of the PATH
    clean = revision()
    assert re.fullmatch(rf"{re.escape(__version__)} [0-9a-f]{{7,}}", clean)
    result.write_text("measured")
    assert revision() == clean
    code.write_text("changed")
    assert revision() == f"{clean}-dirty"
