"""The processor time that a process and all its descendants have used, from Linux's /proc."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Usage(NamedTuple):
    """One line of /proc/<pid>/stat, as far as it matters here: see proc_pid_stat(5)."""

    parent: int
    ticks: int
    """User and system time, its own and that of the children it has waited for."""


def parse(stat: str) -> Usage:
    """Read one /proc/<pid>/stat. The command's name stands in parentheses and may hold any character, also those."""
    fields = stat.rpartition(")")[2].split()
    return Usage(parent=int(fields[1]), ticks=sum(map(int, fields[11:15])))


def total(root: int, processes: Mapping[int, Usage]) -> int:
    """The ticks of `root` and everything below it."""
    below = [pid for pid, usage in processes.items() if usage.parent == root]
    return processes[root].ticks + sum(total(pid, processes) for pid in below)


def last(root: int, processes: Mapping[int, Usage]) -> list[int]:
    """Those of `root` and everything below it that have nothing below them: of a server those that serve."""
    below = [pid for pid, usage in processes.items() if usage.parent == root]
    return [pid for child in below for pid in last(child, processes)] or [root]


def running(proc: Path = PROC) -> dict[int, Usage] | None:
    """Every process; None where there is no /proc."""
    if not (proc / "self" / "stat").exists():
        return None
    processes = {}
    for entry in proc.iterdir():
        if entry.name.isdecimal():
            try:
                processes[int(entry.name)] = parse((entry / "stat").read_text())
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended since the listing; its parent has its time
    return processes


def seconds(root: int, proc: Path = PROC) -> float | None:
    """Processor time of a process tree so far, in seconds; None where there is no /proc."""
    processes = running(proc)
    return None if processes is None else total(root, processes) / os.sysconf("SC_CLK_TCK")


def per_request(start: float | None, end: float | None, requests: int) -> float | None:
    """Microseconds for each request, from two readings of `seconds`."""
    return None if start is None or end is None else (end - start) / requests * 1e6
