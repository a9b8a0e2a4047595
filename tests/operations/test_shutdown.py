"""The way from a signal to the end of the process, where it can be seen without one."""

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from backend.operations.shutdown import on_shutdown


@pytest.fixture
def heard() -> Iterator[asyncio.Queue[int]]:
    """What the server's own handler hears; it is there before ours, and after."""
    numbers: asyncio.Queue[int] = asyncio.Queue()

    def handler(number: int, _: object) -> None:
        asyncio.get_running_loop().call_soon_threadsafe(numbers.put_nowait, number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield numbers
    assert signal.getsignal(signal.SIGTERM) is handler
    for number, own in before.items():
        signal.signal(number, own)


async def test_the_server_hears_of_sigterm_later_and_once(heard: asyncio.Queue[int]) -> None:
    told: asyncio.Queue[float] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    with on_shutdown(lambda: told.put_nowait(loop.time()), after=0.2):
        os.kill(os.getpid(), signal.SIGTERM)
        at = await told.get()
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.empty()
        assert await heard.get() == signal.SIGTERM
        assert loop.time() - at >= 0.19
        await asyncio.sleep(0.3)
        assert heard.empty()
        assert told.empty()


async def test_who_sits_before_it_waits_for_nothing(heard: asyncio.Queue[int]) -> None:
    told = asyncio.Event()
    with on_shutdown(told.set, after=3600):
        os.kill(os.getpid(), signal.SIGTERM)
        await told.wait()
        for _ in range(2):  # the second is the server's word to hurry
            os.kill(os.getpid(), signal.SIGINT)
            assert await heard.get() == signal.SIGINT
