"""Clients that send requests during a fault, and compare the responses with the database afterwards."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from uuid import uuid4

import httpx
import psycopg

from backend.auth.testing import LocalIssuer

logger = logging.getLogger(__name__)

TASKS = "/api/v1/tasks"
CLIENTS = 6
PAUSE = 0.05  # seconds between a response and the next request of a client
MAX_WRITES = 1000  # of one client, so that every test ends
PATIENCE = 30.0  # seconds until a missing response fails the test


@dataclass
class Results:
    """The requests and responses of all clients of a load."""

    users: list[str]
    sent: int = 0
    failed: int = 0  # requests without a response
    errors: Counter[str] = field(default_factory=Counter)  # why they failed
    statuses: Counter[int] = field(default_factory=Counter)
    by_method: Counter[tuple[str, int]] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    requested: set[str] = field(default_factory=set)  # titles of all writes
    acknowledged: set[str] = field(default_factory=set)  # titles of writes with a 2xx response
    retried: set[str] = field(default_factory=set)  # titles of writes that are sent until they are acknowledged

    def __str__(self) -> str:
        return f"sent {self.sent}, failed {self.failed} {dict(self.errors)}, {dict(self.statuses)} {dict(self.codes)}"

    def stored(self, url: str) -> Counter[str]:
        """The titles of the users' tasks in the database."""
        query = "SELECT title FROM tasks JOIN users ON users.id = owner_id WHERE subject = ANY(%s)"
        with psycopg.connect(url) as connection:
            return Counter(title for (title,) in connection.execute(query, (self.users,)))

    def check(self, url: str) -> None:
        """The database contains each acknowledged write once, and nothing that was not requested."""
        logger.info("%s", self)
        stored = self.stored(url)
        assert self.retried <= self.acknowledged
        assert self.acknowledged - stored.keys() == set(), "lost"
        assert set(stored.values()) <= {1}, "stored twice"
        assert stored.keys() <= self.requested


class Load:
    """`CLIENTS` users who each alternate between creating a task and listing their tasks, on kept connections."""

    def __init__(
        self,
        issuer: LocalIssuer,
        address: Callable[[], str] = lambda: "http://localhost:8000",
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        retry: bool = False,
    ) -> None:
        """`address` returns the origin for the next request.

        Every second write has an Idempotency-Key. With `retry`, such a write is sent until the response is a 201.
        """
        self._issuer = issuer
        self._transport = transport
        self._address = address
        self._retry = retry
        self._stop = asyncio.Event()
        self._progress = asyncio.Event()
        self.results = Results([f"load-{uuid4().hex}" for _ in range(CLIENTS)])

    async def wait_for_responses(self, number: int, *statuses: int) -> None:
        """Wait for this number of further responses; with `statuses`, only responses with one of them count."""

        def total() -> int:
            found = self.results.statuses
            return sum(found[status] for status in statuses) if statuses else found.total()

        goal = total() + number
        async with asyncio.timeout(PATIENCE):
            while total() < goal:
                self._progress.clear()
                await self._progress.wait()

    async def wait_until_healthy(self) -> None:
        """Wait for ten responses per client in a row without a failed request or a 503."""
        goal = self.results.statuses.total() + 10 * CLIENTS
        refused = self._refused()
        async with asyncio.timeout(PATIENCE):
            while self.results.statuses.total() < goal:
                await self.wait_for_responses(1)
                if self._refused() > refused:
                    goal, refused = self.results.statuses.total() + 10 * CLIENTS, self._refused()

    def _refused(self) -> int:
        return self.results.failed + self.results.statuses[503]

    async def _run_client(self, user: str) -> None:
        results = self.results
        bearer = {"Authorization": f"Bearer {self._issuer.token(sub=user)}"}
        async with httpx.AsyncClient(
            transport=self._transport, trust_env=False, timeout=PATIENCE, headers=bearer
        ) as http:
            for number in count():
                if self._stop.is_set():
                    return
                assert number < MAX_WRITES, f"the load was not stopped: {results}"
                title, key = f"{user} {number}", {"Idempotency-Key": uuid4().hex} if number % 2 else {}
                results.requested.add(title)
                if key and self._retry:
                    results.retried.add(title)
                while True:
                    status = await self._send(http, "POST", title, key)
                    await asyncio.sleep(PAUSE)
                    if status == 201 or title not in results.retried:
                        break
                await self._send(http, "GET", None, {})
                await asyncio.sleep(PAUSE)

    async def _send(self, http: httpx.AsyncClient, method: str, title: str | None, headers: dict[str, str]) -> int:
        """Send a request; the status of the response, or 0 without a response."""
        results = self.results
        results.sent += 1
        try:
            response = await http.request(
                method, self._address() + TASKS, json={"title": title} if title else None, headers=headers
            )
        except httpx.TransportError as error:
            results.failed += 1
            results.errors[type(error).__name__] += 1
            return 0
        finally:
            self._progress.set()
        results.statuses[response.status_code] += 1
        results.by_method[method, response.status_code] += 1
        if response.is_success and title:
            results.acknowledged.add(title)
        elif not response.is_success:
            results.codes[response.json()["code"]] += 1
            assert response.status_code != 503 or int(response.headers["retry-after"]) >= 1
        return response.status_code

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        """Run the clients. The body starts after four responses per client."""
        async with asyncio.TaskGroup() as group:
            for user in self.results.users:
                group.create_task(self._run_client(user))
            try:
                await self.wait_for_responses(4 * CLIENTS)
                yield self
            finally:
                self._stop.set()
