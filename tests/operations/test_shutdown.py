"""Handling of SIGTERM and SIGINT during shutdown."""

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from backend.operations.shutdown import on_shutdown


@pytest.fixture
def server_signals() -> Iterator[asyncio.Queue[int]]:
    """The signals that reach the server's own handler, which is restored afterwards."""
    numbers: asyncio.Queue[int] = asyncio.Queue()

    def handler(number: int, _: object) -> None:
        asyncio.get_running_loop().call_soon_threadsafe(numbers.put_nowait, number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield numbers
    assert signal.getsignal(signal.SIGTERM) is handler
    for number, own in before.items():
        signal.signal(number, own)


async def test_sigterm_reaches_the_server_once_after_the_drain_period(server_signals: asyncio.Queue[int]) -> None:
    notified: asyncio.Queue[float] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    with on_shutdown(lambda: notified.put_nowait(loop.time()), after=0.2):
        os.kill(os.getpid(), signal.SIGTERM)
        at = await notified.get()
        os.kill(os.getpid(), signal.SIGTERM)
        assert server_signals.empty()
        assert await server_signals.get() == signal.SIGTERM
        assert loop.time() - at >= 0.19
        await asyncio.sleep(0.3)
        assert server_signals.empty()
        assert notified.empty()


async def test_sigint_reaches_the_server_at_once(server_signals: asyncio.Queue[int]) -> None:
    notified = asyncio.Event()
    with on_shutdown(notified.set, after=3600):
        os.kill(os.getpid(), signal.SIGTERM)
        await notified.wait()
        for _ in range(2):  # the server stops at once on the second
            os.kill(os.getpid(), signal.SIGINT)
            assert await server_signals.get() == signal.SIGINT
