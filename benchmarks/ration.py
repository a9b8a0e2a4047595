"""Gives the processes of a server slow processors of their own."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from benchmarks import cpu

LOOK, WINDOW = 0.0005, 0.01  # seconds: how often it is looked, and for how long, who has had a share


@contextmanager
def rationed(root: int, share: float) -> Iterator[None]:
    """Let each process of a server that serves use but a share of a processor: who has had it is stopped for a while.

    So each has a slow processor of its own, and leaves others as much as if it were another machine's.
    """
    pids = cpu.last(root, cpu.running() or {})
    ended = Event()

    def used(pid: int) -> float:
        """Seconds of its first thread, which does all that a worker does; /proc/<pid>/stat counts in hundredths."""
        return int((cpu.PROC / str(pid) / "schedstat").read_text().split()[0]) / 1e9

    def ration() -> None:
        while not ended.is_set():
            # What was not used in one window is lost.
            began, before = time.monotonic(), {pid: used(pid) for pid in pids}
            while not ended.wait(LOOK) and time.monotonic() - began < WINDOW:
                for pid in pids:
                    has_had_it = used(pid) - before[pid] > share * (time.monotonic() - began)
                    os.kill(pid, signal.SIGSTOP if has_had_it else signal.SIGCONT)

    thread = Thread(target=ration)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
