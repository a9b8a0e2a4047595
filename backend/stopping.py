"""What has to happen as soon as the process is told to stop: the server itself waits for open connections first."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def when_told_to_stop(call: Callable[[], None]) -> Iterator[None]:
    """Call it in the running loop on SIGINT and SIGTERM, before the server's own handler, which is left in charge.

    Where the server handles no signals, or runs outside of the main thread, nobody is told.
    """
    loop = asyncio.get_running_loop()
    before: dict[int, Any] = {}

    def hear(number: int, frame: FrameType | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(call)
        before[number](number, frame)

    for number in signal.SIGINT, signal.SIGTERM:
        handler = signal.getsignal(number)
        if callable(handler):
            try:
                signal.signal(number, hear)
            except ValueError:  # not the main thread
                break
            before[number] = handler
    try:
        yield
    finally:
        for heard, handler in before.items():
            signal.signal(heard, handler)
