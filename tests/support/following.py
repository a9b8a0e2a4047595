"""Test clients that follow changes: a copy that uses delta sync, and a reader of live events."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from tests.conftest import Api, Person

TASKS = "/api/v1/tasks"
PATIENCE = 20.0  # seconds


class Copy:
    """A client's copy of a resource: the rows by id, and the sync token from which it continues."""

    def __init__(self, person: Person, limit: int = 100, *, path: str = TASKS, token: str | None = None) -> None:
        self.person = person
        self.limit = limit
        self._path = f"{path}/changes"
        self.rows: dict[str, dict[str, Any]] = {}
        self.received: list[tuple[str, int, bool]] = []  # id, version, and whether it is not a tombstone
        self.token = token

    def restart(self) -> None:
        """Discard everything; the next page is the first one."""
        self.rows, self.received, self.token = {}, [], None

    def apply(self, row: dict[str, Any]) -> None:
        self.received.append((row["id"], row["version"], row["deleted_at"] is None))
        self.rows.pop(row["id"], None)
        if row["deleted_at"] is None:
            self.rows[row["id"]] = row

    async def page(self) -> tuple[list[dict[str, Any]], bool]:
        """Fetch and apply one page: its items, and whether there are more."""
        since = {"since": self.token} if self.token else {}
        answer = await self.person.get(self._path, params={"limit": self.limit, **since})
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert len(page["items"]) <= self.limit
        self.token = page["next"]
        for row in page["items"]:
            self.apply(row)
        return page["items"], page["more"]

    async def sync(self) -> list[dict[str, Any]]:
        """Fetch and apply all pages that are new, and return their items."""
        found, more = await self.page()
        while more:
            items, more = await self.page()
            assert items or not more
            found += items
        return found

    async def refusal(self) -> tuple[int, str]:
        """The status and the error code with which the token is refused."""
        answer = await self.person.get(self._path, params={"since": self.token or ""})
        return answer.status_code, answer.json()["code"]


class Event(NamedTuple):
    type: str
    id: str
    data: Any


class Reader:
    """A client of an event stream that calls the application directly. The application waits for each `take`."""

    def __init__(self, api: Api, person: Person, last: str | None = None, *, path: str = TASKS, **headers: str) -> None:
        self.person = person
        self.last = last
        self._path = f"{path}/events"
        self._app = api.http._transport.app  # type: ignore[attr-defined]  # with the state of the lifespan
        given = {**person.bearer, **headers} | ({"Last-Event-ID": last} if last is not None else {})
        self._headers = [(name.lower().encode(), value.encode()) for name, value in given.items()]
        self._sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue(1)
        self._sending = False
        self._disconnected = asyncio.Event()
        self._text = ""

    async def open(self, method: str = "GET") -> "Reader":
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": self._headers,
            "server": ("localhost", 8000),
            "client": ("127.0.0.1", 5),
        }
        self.task = asyncio.create_task(self._app(scope, self._receive, self._send))
        start = await self.take()
        self.status = start["status"]
        self.headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return self

    async def _receive(self) -> dict[str, Any]:
        await self._disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        assert not self._sending, "the application sends more before the client has accepted the last message"
        self._sending = True
        await self._sent.put(message)
        self._sending = False

    async def take(self) -> dict[str, Any]:
        """The next ASGI message."""
        async with asyncio.timeout(PATIENCE):
            return await self._sent.get()

    async def problem(self) -> tuple[int, str]:
        """The status and the error code with which the stream was refused."""
        body = json.loads((await self.take())["body"])
        await self.close()
        return self.status, body["code"]

    async def block(self) -> list[str]:
        """The lines up to the next empty one."""
        while "\n\n" not in self._text:
            self._text += (await self.take())["body"].decode()
        block, _, self._text = self._text.partition("\n\n")
        return block.split("\n")

    async def next(self) -> Event:
        """The next event with data (HTML, section 9.2.6). Comments do not extend the time limit."""
        async with asyncio.timeout(PATIENCE):
            while True:
                fields = dict(line.partition(":")[::2] for line in await self.block())
                fields = {name: value.removeprefix(" ") for name, value in fields.items()}
                self.last = fields.get("id", self.last)
                if "data" in fields:
                    return Event(fields["event"], self.last or "", json.loads(fields["data"]))

    async def close(self) -> None:
        self._disconnected.set()
        while not self.task.done():
            if not self._sent.empty():
                self._sent.get_nowait()
            await asyncio.sleep(0)
        await self.task


@asynccontextmanager
async def reading(
    api: Api, person: Person, last: str | None = None, *, path: str = TASKS, **headers: str
) -> AsyncIterator[Reader]:
    reader = await Reader(api, person, last, path=path, **headers).open()
    assert reader.status == 200
    try:
        yield reader
    finally:
        await reader.close()
