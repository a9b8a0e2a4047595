"""A clock and a key set endpoint under the control of a test."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from backend.auth import InvalidToken, KeysUnavailable, RemoteKeys
from backend.auth.testing import LocalIssuer

Respond = Callable[[], httpx.Response]
Jwks = dict[str, dict[str, Any]]


class Time:
    """A wall clock, a monotonic clock and a sleep that advance together; tests may also set the wall clock alone."""

    def __init__(self) -> None:
        self.wall = 1_800_000_000.0
        self.elapsed = 5_000.0
        self.sleeps: list[float] = []
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def clock(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.elapsed

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        woken = asyncio.Event()
        self._sleepers.append((self.elapsed + seconds, woken))
        await woken.wait()

    async def advance(self, seconds: float) -> None:
        """Advance the clocks; each sleeper is woken at its time and runs until it waits again."""
        end = self.elapsed + seconds
        while (due := self._next(end)) is not None:
            self._move(max(due, self.elapsed))
            for sleeper in [sleeper for sleeper in self._sleepers if sleeper[0] <= self.elapsed]:
                self._sleepers.remove(sleeper)
                sleeper[1].set()
            await settle()
        self._move(end)
        await settle()

    def _next(self, end: float) -> float | None:
        return min((at for at, _ in self._sleepers if at <= end), default=None)

    def _move(self, to: float) -> None:
        self.wall += to - self.elapsed
        self.elapsed = to


async def settle() -> None:
    """Run all tasks until they wait for the test."""
    for _ in range(50):
        await asyncio.sleep(0)


class Endpoint:
    """A key set endpoint that counts requests. It returns `respond()` and waits while `open` is not set."""

    def __init__(self, issuer: LocalIssuer) -> None:
        self.issuer = issuer
        self.respond: Respond = self.jwks
        self.count = 0
        self.open = asyncio.Event()
        self.open.set()

    def jwks(self, **headers: str) -> httpx.Response:
        return httpx.Response(200, json=self.issuer.jwks, headers=headers)

    def fails(self) -> None:
        def refuse() -> httpx.Response:
            raise httpx.ConnectError("Connection refused")

        self.respond = refuse

    def recovers(self) -> None:
        self.respond = self.jwks

    async def __call__(self, _: httpx.Request) -> httpx.Response:
        self.count += 1
        await self.open.wait()
        return self.respond()


@asynccontextmanager
async def remote_keys(endpoint: Endpoint, time: Time, **options: Any) -> AsyncIterator[RemoteKeys]:
    """RemoteKeys with a scripted endpoint and clock, after its first fetch. Jitter is off by default."""
    settings: dict[str, Any] = {"random": lambda: 0.5}
    async with (
        httpx.AsyncClient(transport=httpx.MockTransport(endpoint)) as client,
        RemoteKeys(
            endpoint.issuer.jwks_url,
            client=client,
            clock=time.clock,
            monotonic=time.monotonic,
            sleep=time.sleep,
            **(settings | options),
        ) as keys,
    ):
        await settle()
        yield keys


async def outcome(keys: RemoteKeys, kid: str) -> str:
    """Look up a kid as a request does; returns `ok`, `401` or `503`."""
    try:
        await keys.get(kid)
    except InvalidToken:
        return "401"
    except KeysUnavailable:
        return "503"
    return "ok"
