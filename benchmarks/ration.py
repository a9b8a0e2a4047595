"""Limits each worker of a server to a share of a processor."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from benchmarks import cpu

LOOK, WINDOW = 0.0005, 0.01  # seconds: interval of the checks, and length of an accounting window


@contextmanager
def rationed(root: int, share: float) -> Iterator[None]:
    """Stop each worker of a server with SIGSTOP whenever it has used its share of a processor in a window.

    Each worker then behaves as on a slow processor of its own, and leaves the rest to other processes.
    """
    pids = cpu.last(root, cpu.running() or {})
    ended = Event()

    def used(pid: int) -> float:
        """Processor seconds of the main thread, which does all the work; /proc/<pid>/stat is too coarse (10 ms)."""
        return int((cpu.PROC / str(pid) / "schedstat").read_text().split()[0]) / 1e9

    def ration() -> None:
        while not ended.is_set():
            # Unused time of a window is not carried over.
            began, before = time.monotonic(), {pid: used(pid) for pid in pids}
            while not ended.wait(LOOK) and time.monotonic() - began < WINDOW:
                for pid in pids:
                    is_over_share = used(pid) - before[pid] > share * (time.monotonic() - began)
                    os.kill(pid, signal.SIGSTOP if is_over_share else signal.SIGCONT)

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
