"""What happens between the word to stop and the end: the server itself would close first, and say so to nobody."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def when_told_to_stop(*calls: Callable[[], object], after: float = 0) -> Iterator[None]:
    """Call them in the running loop on SIGINT and SIGTERM. The server's own handler is left in charge of the rest.

    It hears of SIGINT at once, of SIGTERM `after` so many seconds: who sends requests here needs them to notice.
    Where the server handles no signals, or runs outside of the main thread, nobody is told.
    """
    loop = asyncio.get_running_loop()
    before: dict[int, Any] = {}
    told = False

    def begin(number: int) -> None:
        nonlocal told
        if told:
            return  # a supervisor may pass on what each process of its group has heard already
        told = True
        for call in calls:
            call()
        if number == signal.SIGTERM:
            loop.call_later(after, lambda: before[number](number, None))

    def hear(number: int, frame: FrameType | None) -> None:
        if loop.is_closed():
            before[number](number, frame)
            return
        loop.call_soon_threadsafe(begin, number)
        if number == signal.SIGINT:
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


def stop_with_parent() -> None:
    """Let a worker be told to stop when its supervisor has ended, however that came: it would keep the port."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    loop = asyncio.get_running_loop()

    def gone() -> None:
        loop.remove_reader(parent.sentinel)
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(parent.sentinel, gone)
