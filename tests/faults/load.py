"""Clients that go on asking while something breaks, and keep account: what was sent, answered, refused, and lost."""

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
PACE = 0.05  # seconds between an answer and the next question
MOST = 1000  # questions of one client, so that no test is endless
PATIENCE = 30.0  # seconds until an answer that does not come is a failure


@dataclass
class Account:
    """What all clients of one load saw."""

    people: list[str]
    sent: int = 0
    failed: int = 0  # no answer: the connection was refused, or broke
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    written: set[str] = field(default_factory=set)  # titles that a 201 said are there
    asked_for: set[str] = field(default_factory=set)  # titles that may be there
    owed: set[str] = field(default_factory=set)  # of those, what was to be asked for until it is there

    def __str__(self) -> str:
        return f"sent {self.sent}, failed {self.failed} {dict(self.errors)}, {dict(self.statuses)} {dict(self.codes)}"

    def stored(self, url: str) -> Counter[str]:
        """The titles that these people have in the database."""
        query = "SELECT title FROM tasks JOIN users ON users.id = owner_id WHERE subject = ANY(%s)"
        with psycopg.connect(url) as connection:
            return Counter(title for (title,) in connection.execute(query, (self.people,)))

    def check(self, url: str) -> None:
        """What was acknowledged is there, nothing is there twice, and nothing that nobody asked for."""
        logger.info("%s", self)
        stored = self.stored(url)
        assert self.owed <= self.written
        assert self.written - stored.keys() == set(), "lost"
        assert set(stored.values()) <= {1}, "done twice"
        assert stored.keys() <= self.asked_for


class Load:
    """`CLIENTS` people who each write a task, read their list, and so on, with connections that they keep."""

    def __init__(
        self,
        issuer: LocalIssuer,
        address: Callable[[], str] = lambda: "http://localhost:8000",
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        again: bool = False,
    ) -> None:
        """`address`: where to send the next request. Every other write has an Idempotency-Key; `again`: whether it is
        sent until it has been answered with 201."""
        self._issuer = issuer
        self._transport = transport
        self._address = address
        self._again = again
        self._stop = asyncio.Event()
        self._moved = asyncio.Event()
        self.account = Account([f"load-{uuid4().hex}" for _ in range(CLIENTS)])

    async def answered(self, more: int, *statuses: int) -> None:
        """Until so many more requests have been answered, with one of these statuses if there are any."""

        def total() -> int:
            found = self.account.statuses
            return sum(found[status] for status in statuses) if statuses else found.total()

        goal = total() + more
        async with asyncio.timeout(PATIENCE):
            while total() < goal:
                self._moved.clear()
                await self._moved.wait()

    async def healed(self) -> None:
        """Until ten answers for everybody came in a row that are no refusals."""
        goal = self.account.statuses.total() + 10 * CLIENTS
        refused = self._refused()
        async with asyncio.timeout(PATIENCE):
            while self.account.statuses.total() < goal:
                await self.answered(1)
                if self._refused() > refused:
                    goal, refused = self.account.statuses.total() + 10 * CLIENTS, self._refused()

    def _refused(self) -> int:
        return self.account.failed + self.account.statuses[503]

    async def _go_on(self, person: str) -> None:
        account = self.account
        bearer = {"Authorization": f"Bearer {self._issuer.token(sub=person)}"}
        async with httpx.AsyncClient(
            transport=self._transport, trust_env=False, timeout=PATIENCE, headers=bearer
        ) as http:
            for number in count():
                if self._stop.is_set():
                    return
                assert number < MOST, f"nobody stopped it: {account}"
                title, key = f"{person} {number}", {"Idempotency-Key": uuid4().hex} if number % 2 else {}
                account.asked_for.add(title)
                if key and self._again:
                    account.owed.add(title)
                while True:
                    status = await self._ask(http, "POST", title, key)
                    await asyncio.sleep(PACE)
                    if status == 201 or title not in account.owed:
                        break
                await self._ask(http, "GET", None, {})
                await asyncio.sleep(PACE)

    async def _ask(self, http: httpx.AsyncClient, method: str, title: str | None, headers: dict[str, str]) -> int:
        account = self.account
        account.sent += 1
        try:
            response = await http.request(
                method, self._address() + TASKS, json={"title": title} if title else None, headers=headers
            )
        except httpx.TransportError as error:
            account.failed += 1
            account.errors[type(error).__name__] += 1
            return 0
        finally:
            self._moved.set()
        account.statuses[response.status_code] += 1
        account.answers[method, response.status_code] += 1
        if response.is_success and title:
            account.written.add(title)
        elif not response.is_success:
            account.codes[response.json()["code"]] += 1
            assert response.status_code != 503 or int(response.headers["retry-after"]) >= 1
        return response.status_code

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        """Everybody goes on until the end, and has had answers before the beginning."""
        async with asyncio.TaskGroup() as group:
            for person in self.account.people:
                group.create_task(self._go_on(person))
            try:
                await self.answered(4 * CLIENTS)
                yield self
            finally:
                self._stop.set()
