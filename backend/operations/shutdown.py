"""Graceful shutdown: keep serving for DRAIN_SECONDS after SIGTERM, report 503 on /readyz, then close."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def on_shutdown(*calls: Callable[[], object], after: float = 0) -> Iterator[None]:
    """Run `calls` in the event loop on SIGINT and SIGTERM, then the server's own signal handler.

    The server's handler runs at once on SIGINT, and `after` so many seconds on SIGTERM, so that load balancers notice.
    Does nothing if the server handles no signals or runs outside the main thread.
    """
    loop = asyncio.get_running_loop()
    handlers: dict[int, Any] = {}
    has_begun = False

    def begin(number: int) -> None:
        nonlocal has_begun
        if has_begun:
            return  # a supervisor may forward a signal that its process group has already received
        has_begun = True
        for call in calls:
            call()
        if number == signal.SIGTERM:
            loop.call_later(after, lambda: handlers[number](number, None))

    def handle(number: int, frame: FrameType | None) -> None:
        if loop.is_closed():
            handlers[number](number, frame)
            return
        loop.call_soon_threadsafe(begin, number)
        if number == signal.SIGINT:
            handlers[number](number, frame)

    for number in signal.SIGINT, signal.SIGTERM:
        handler = signal.getsignal(number)
        if callable(handler):
            try:
                signal.signal(number, handle)
            except ValueError:  # not the main thread
                break
            handlers[number] = handler
    try:
        yield
    finally:
        for handled, handler in handlers.items():
            signal.signal(handled, handler)


def stop_with_parent() -> None:
    """Stop this worker when its supervisor has ended for any reason; an orphaned worker would keep the port."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_reader(parent.sentinel)
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(parent.sentinel, stop)
