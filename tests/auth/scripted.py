"""Time that passes when a test says so, and a key set endpoint that answers what a test says."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from backend.auth import RemoteKeys
from backend.auth.testing import LocalIssuer

Answer = Callable[[], httpx.Response]


class Time:
    """A wall clock, a monotonic clock and a sleep that move together, unless the wall clock is set."""

    def __init__(self) -> None:
        self.wall = 1_800_000_000.0
        self.elapsed = 5_000.0
        self.naps: list[float] = []
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def clock(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.elapsed

    async def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        woken = asyncio.Event()
        self._sleepers.append((self.elapsed + seconds, woken))
        await woken.wait()

    async def advance(self, seconds: float) -> None:
        """Let time pass, waking each sleeper at its own moment and letting it do its work before going on."""
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
    """Let every task run until it waits for something that only the test can give."""
    for _ in range(50):
        await asyncio.sleep(0)


class Endpoint:
    """Answers with an issuer's key set of the moment, or with whatever `answer` makes; counts; holds when told."""

    def __init__(self, issuer: LocalIssuer) -> None:
        self.issuer = issuer
        self.answer: Answer = self.jwks
        self.count = 0
        self.open = asyncio.Event()
        self.open.set()

    def jwks(self, **headers: str) -> httpx.Response:
        return httpx.Response(200, json=self.issuer.jwks, headers=headers)

    def fails(self) -> None:
        def refuse() -> httpx.Response:
            raise httpx.ConnectError("Connection refused")

        self.answer = refuse

    def recovers(self) -> None:
        self.answer = self.jwks

    async def __call__(self, _: httpx.Request) -> httpx.Response:
        self.count += 1
        await self.open.wait()
        return self.answer()


@asynccontextmanager
async def remote_keys(endpoint: Endpoint, time: Time, **options: Any) -> AsyncIterator[RemoteKeys]:
    """RemoteKeys over a scripted endpoint and clock, after its first attempt. Jitter is off unless asked for."""
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
