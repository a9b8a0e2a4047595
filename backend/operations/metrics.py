"""What Prometheus is told: requests, tokens, keys, users, the pool and the limits, of all workers of one `serve`."""

import asyncio
import hmac
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import lru_cache
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

_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"  # the client library's own name
_SAMPLE_EVERY: Final = 5.0  # seconds
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_PREFIX: Final = "resource_server"

# What is looked at from time to time, and how the workers' values become one.
GAUGES: Final[dict[str, tuple[str, Literal["livesum", "livemin", "livemax"]]]] = {
    "database_connections": ("Connections to the database in use.", "livesum"),
    "database_connections_limit": ("Connections to the database that there can be.", "livesum"),
    "database_waiting": ("Requests that wait for a connection to the database.", "livesum"),
    "key_set_ready": ("1 where tokens can be judged; of several workers the least.", "livemin"),
    "key_set_skipped_keys": ("Keys of the issuer that cannot be used; of several workers the most.", "livemax"),
    "key_set_waiting": ("Requests that wait for the issuer's keys to be fetched.", "livesum"),
    "users_remembered": ("Users whose row is remembered.", "livesum"),
    "users_believed": ("1 where changes of users are heard, else each request looks; of several the least.", "livemin"),
    "streams": ("Streams of live events that are open.", "livesum"),
    "rate_limits_shared": ("1 where Redis counts, 0 where a worker counts alone; of several the least.", "livemin"),
}


class Metrics(Observer):
    """One for the process. Every label has few values: routes by their template, what has none as `unmatched`."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        if _FOLDER not in os.environ:
            ProcessCollector(registry=registry)
        self._requests = Counter(
            "http_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self._durations = Histogram(
            "http_request_duration_seconds",
            "Until the answer begins: neither a slow reader nor an open stream adds to it.",
            ["method", "route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_progress = 0
        self._in_progress = Gauge(
            "http_requests_in_progress",
            "Requests being answered, open streams among them.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._judged = Counter(
            "token_verifications",
            "Tokens judged: `hit` (remembered), `verified`, or why not.",
            ["outcome"],
            namespace=_PREFIX,
            registry=registry,
        )
        self._fetches = Counter(
            "key_set_fetches",
            "Attempts to fetch the issuer's keys.",
            ["reason", "outcome"],
            namespace=_PREFIX,
            registry=registry,
        )
        self._fetch_durations = Histogram(
            "key_set_fetch_duration_seconds",
            "Of attempts to fetch the issuer's keys.",
            namespace=_PREFIX,
            buckets=_SECONDS,
            registry=registry,
        )
        self._fetched = Gauge(
            "key_set_fetched_timestamp_seconds",
            "When the issuer's keys were last fetched, in unix time; of several workers the least recent.",
            namespace=_PREFIX,
            multiprocess_mode="livemin",
            registry=registry,
        )
        self._unknown_kids = Counter(
            "key_set_unknown_kids",
            "Tokens that name a key which was not there, and what a fetch showed.",
            ["answer"],
            namespace=_PREFIX,
            registry=registry,
        )
        self._limited = Counter(
            "rate_limited", "Requests refused with 429.", ["who"], namespace=_PREFIX, registry=registry
        )
        self._loads = Counter("user_loads", "Callers whose row had to be read.", namespace=_PREFIX, registry=registry)
        self._security_events = Counter(
            "security_events",
            "Security event tokens that were sent here: `taken`, `rate_limited`, or the `err` they were refused with.",
            ["outcome"],
            namespace=_PREFIX,
            registry=registry,
        )
        self._purged = Gauge(
            "purge_last_success_timestamp_seconds",
            "When the purge last removed all that had expired in a table, in unix time; before the first time, when the"
            " worker started. Of several workers the most recent.",
            ["table"],
            namespace=_PREFIX,
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._purge_failures = Counter(
            "purge_failures",
            "Purges of a table that ended in an error.",
            ["table"],
            namespace=_PREFIX,
            registry=registry,
        )
        # To look a child up by its labels costs more than to count.
        self._request = lru_cache(2048)(self._requests.labels)
        self._duration = lru_cache(512)(self._durations.labels)
        self._sources: dict[Gauge, Callable[[], float]] = {}
        self._hits = 0
        self._counts: dict[Counter, Callable[[], int]] = {self._judged.labels("hit"): lambda: self._hits}
        self._seen: dict[Counter, int] = {}

    def answered(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """A request was answered; its answer began after so many seconds."""
        method = method if method in _METHODS else "other"
        route = route or "unmatched"
        self._request(method, route, status).inc()
        self._duration(method, route).observe(seconds)

    def limited(self, who: str) -> None:
        """A request was refused with 429."""
        self._limited.labels(who).inc()

    def security_event(self, outcome: str) -> None:
        """A security event token was taken, or refused."""
        self._security_events.labels(outcome).inc()

    def purges(self, tables: Iterable[str]) -> None:
        """There is a purge of these tables, which `purged` will tell of."""
        for table in tables:
            self._purged.labels(table).set(time.time())
            # Prometheus sees an increase only of a counter that it has seen before.
            self._purge_failures.labels(table)

    def purged(self, table: str, *, done: bool) -> None:
        """A purge of the table has ended: it removed all that had expired, or failed."""
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
        if outcome == "hit":  # which each request is
            self._hits += 1
        else:
            self._judged.labels(outcome).inc()

    @asynccontextmanager
    async def sampling(self, user_loads: Callable[[], int], **sources: Callable[[], float]) -> AsyncIterator[None]:
        """Look at `sources`, named as in GAUGES, when metrics are asked for.

        A worker cannot ask another one, so among several each writes down its own every five seconds.
        """
        self._counts[self._loads] = user_loads
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
            self._sample()  # what came since the last time

    async def exposition(self) -> bytes:
        """In Prometheus' text format. Written in a thread: it takes a few milliseconds."""
        await asyncio.sleep(0)  # whatever has ended by now is counted first
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
        for counter, count in self._counts.items():
            now = count()
            counter.inc(now - self._seen.get(counter, 0))
            self._seen[counter] = now

    def _write(self) -> bytes:
        if _FOLDER not in os.environ:
            return generate_latest(self._registry)
        folder = os.environ[_FOLDER]
        for file in Path(folder).glob("gauge_live*_*.db"):
            pid = int(file.stem.rpartition("_")[2])
            if not _lives(pid):
                with suppress(FileNotFoundError):  # another worker has removed it
                    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]  # the library leaves it unannotated
        registry = CollectorRegistry()
        registry.register(_Workers(folder))
        return generate_latest(registry)


class _Workers(Collector):
    """The values of all workers, read from their files.

    The library's own collector fails on a file that has no content yet, which is so for a moment when a worker starts.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def collect(self) -> Iterable[Metric]:
        files = [str(file) for file in self._folder.glob("*.db") if _has_content(file)]
        metrics: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]  # likewise
        return metrics


def _has_content(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:  # another worker has removed that of a dead one
        return False


@router.get("/metrics")
async def get_metrics(request: Request) -> Response:
    """For Prometheus, which sends METRICS_TOKEN as a bearer where one is set."""
    metrics, token = request.state.metrics, request.state.settings.metrics_token.get_secret_value()
    if metrics is None:
        raise NotFound
    if token and not _is_bearer(request, token):
        raise Refusal(401, "unauthorized", "This needs the bearer METRICS_TOKEN.", {"WWW-Authenticate": "Bearer"})
    return Response(await metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@contextmanager
def shared_by_workers() -> Iterator[None]:
    """Give the processes that are started from here a place to count together, unless they have one."""
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


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
