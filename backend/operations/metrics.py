"""Prometheus metrics of requests, tokens, keys, users, pool and limits, summed over all workers of one `serve`."""

import asyncio
import hmac
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from backend.auth import FetchReason, Observer, Refusal
from backend.web.problems import NotFound

router = APIRouter(tags=["service"], include_in_schema=False)

_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"  # variable of the client library
_SAMPLE_EVERY: Final = 5.0  # seconds
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_PREFIX: Final = "resource_server"

# Sampled gauges: their help, and how the values of workers are combined.
GAUGES: Final[dict[str, tuple[str, Literal["livesum", "livemin", "livemax"]]]] = {
    "database_connections": ("Database connections in use.", "livesum"),
    "database_connections_limit": ("Maximum number of database connections.", "livesum"),
    "database_waiting": ("Requests waiting for a database connection.", "livesum"),
    "key_set_ready": ("1 if tokens can be verified; the minimum of all workers.", "livemin"),
    "key_set_skipped_keys": ("Unusable keys in the JWKS; the maximum of all workers.", "livemax"),
    "key_set_waiting": ("Requests waiting for a JWKS fetch.", "livesum"),
    "users_remembered": ("Cached users.", "livesum"),
    "users_believed": ("1 if cached users are used, 0 if each request reads the user; the minimum.", "livemin"),
    "streams": ("Open event streams.", "livesum"),
    "rate_limits_shared": ("1 if rate limits are shared through Redis; the minimum of all workers.", "livemin"),
}


class Metrics(Observer):
    """All metrics; one per process. Labels have few values: routes by template, or `unmatched`."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        if _FOLDER not in os.environ:
            ProcessCollector(registry=registry)
        self._requests = Counter("http_requests", "Responses sent.", ["method", "route", "status"], registry=registry)
        self._durations = Histogram(
            "http_request_duration_seconds",
            "Time until the response starts; excludes slow readers and open streams.",
            ["method", "route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_progress = 0
        self._in_progress = Gauge(
            "http_requests_in_progress",
            "Requests in progress, including open streams.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        counter = partial(Counter, namespace=_PREFIX, registry=registry)
        histogram = partial(Histogram, namespace=_PREFIX, registry=registry)
        gauge = partial(Gauge, namespace=_PREFIX, registry=registry)
        self._verifications = counter(
            "token_verifications",
            "Token verifications: `hit` (cached), `verified`, or the reason of the rejection.",
            ["outcome"],
        )
        self._fetches = counter("key_set_fetches", "JWKS fetches.", ["reason", "outcome"])
        self._fetch_durations = histogram(
            "key_set_fetch_duration_seconds", "Duration of JWKS fetches.", buckets=_SECONDS
        )
        self._fetched = gauge(
            "key_set_fetched_timestamp_seconds",
            "Unix time of the last JWKS fetch; the oldest of all workers.",
            multiprocess_mode="livemin",
        )
        self._unknown_kids = counter(
            "key_set_unknown_kids", "Tokens with an unknown key id, by the result of the fetch.", ["answer"]
        )
        self._limited = counter("rate_limited", "Requests rejected with 429.", ["who"])
        self._loads = counter("user_loads", "User rows read from the database.")
        self._security_events = counter(
            "security_events",
            "Security event tokens: `taken`, `rate_limited`, or the `err` of the rejection.",
            ["outcome"],
        )
        self._purged = gauge(
            "purge_last_success_timestamp_seconds",
            "Unix time of the last complete purge of a table, or of the worker's start; the latest of all workers.",
            ["table"],
            multiprocess_mode="livemax",
        )
        self._purge_failures = counter("purge_failures", "Failed purges of a table.", ["table"])
        # Looking up a child by its labels takes longer than counting.
        self._request = lru_cache(2048)(self._requests.labels)
        self._duration = lru_cache(512)(self._durations.labels)
        self._sources: dict[Gauge, Callable[[], float]] = {}
        self._cached_token = self._verifications.labels("hit")
        self._user_loads: Callable[[], int] = lambda: 0
        self._loads_seen = 0

    def answered(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Count a response, which started after `seconds`."""
        method = method if method in _METHODS else "other"
        route = route or "unmatched"
        self._request(method, route, status).inc()
        self._duration(method, route).observe(seconds)

    def limited(self, subject: str) -> None:
        """Count a request that was rejected with 429."""
        self._limited.labels(subject).inc()

    def security_event(self, outcome: str) -> None:
        """Count a security event token."""
        self._security_events.labels(outcome).inc()

    def purges(self, tables: Iterable[str]) -> None:
        """Create the metrics of the purge of these tables."""
        for table in tables:
            self._purged.labels(table).set(time.time())
            # Prometheus detects an increase only in a counter that existed before.
            self._purge_failures.labels(table)

    def purged(self, table: str, *, done: bool) -> None:
        """Record the end of a purge. `done`: all expired rows were removed, else it failed."""
        if done:
            self._purged.labels(table).set(time.time())
        else:
            self._purge_failures.labels(table).inc()

    def fetched(self, reason: FetchReason, seconds: float, error: str | None) -> None:
        self._fetches.labels(reason.value, "failed" if error else "fetched").inc()
        self._fetch_durations.observe(seconds)
        if error is None:
            self._fetched.set(time.time())

    def unknown_kid(self, answer: Literal["found", "absent", "unavailable"]) -> None:
        self._unknown_kids.labels(answer).inc()

    def judged(self, outcome: str) -> None:
        (self._cached_token if outcome == "hit" else self._verifications.labels(outcome)).inc()

    @asynccontextmanager
    async def sampling(self, user_loads: Callable[[], int], **sources: Callable[[], float]) -> AsyncIterator[None]:
        """Sample `sources`, named as in GAUGES, for each scrape.

        Workers cannot read each other's sources, so with several workers each samples its own every five seconds.
        """
        self._user_loads = user_loads
        for name, source in sources.items():
            help, mode = GAUGES[name]
            gauge = Gauge(name, help, namespace=_PREFIX, multiprocess_mode=mode, registry=self._registry)
            self._sources[gauge] = source
        self._sample()
        task = asyncio.create_task(self._sample_forever()) if _FOLDER in os.environ else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            self._sample()  # counts since the last sample

    async def exposition(self) -> bytes:
        """The metrics in Prometheus' text format, written in a thread, since it takes a few milliseconds."""
        await asyncio.sleep(0)  # let the access log count the requests that have ended
        self._sample()
        return await asyncio.to_thread(self._write)

    async def _sample_forever(self) -> None:
        while True:
            await asyncio.sleep(_SAMPLE_EVERY)
            self._sample()

    def _sample(self) -> None:
        for gauge, source in self._sources.items():
            gauge.set(source())
        self._in_progress.set(self.in_progress)
        loads = self._user_loads()
        self._loads.inc(loads - self._loads_seen)
        self._loads_seen = loads

    def _write(self) -> bytes:
        if _FOLDER not in os.environ:
            return generate_latest(self._registry)
        folder = os.environ[_FOLDER]
        for file in Path(folder).glob("gauge_live*_*.db"):
            pid = int(file.stem.rpartition("_")[2])
            if not _is_running(pid):
                with suppress(FileNotFoundError):  # another worker has removed it
                    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]  # the library leaves it unannotated
        registry = CollectorRegistry()
        registry.register(_Workers(folder))
        return generate_latest(registry)


class _Workers(Collector):
    """Reads the values of all workers from their files.

    The library's own collector fails on an empty file, which exists for a moment when a worker starts.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def collect(self) -> Iterable[Metric]:
        files = [str(file) for file in self._folder.glob("*.db") if _has_content(file)]
        metrics: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]  # as above
        return metrics


def _has_content(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:  # another worker has removed that of a dead one
        return False


@router.get("/metrics")
async def get_metrics(request: Request) -> Response:
    """Metrics for Prometheus. Requires METRICS_TOKEN as a bearer token if it is set."""
    metrics, token = request.state.metrics, request.state.settings.metrics_token.get_secret_value()
    if metrics is None:
        raise NotFound
    if token and not _is_bearer(request, token):
        raise Refusal(
            401, "unauthorized", "The bearer token METRICS_TOKEN is required.", {"WWW-Authenticate": "Bearer"}
        )
    return Response(await metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@contextmanager
def shared_by_workers() -> Iterator[None]:
    """Create a directory for the metrics of worker processes, unless the environment names one."""
    if _FOLDER in os.environ:
        yield
        return
    with TemporaryDirectory(prefix="resource-server-metrics-") as folder:
        os.environ[_FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[_FOLDER]


def _is_bearer(request: Request, token: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
