"""Reads the processor time of a process tree from Linux's /proc."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Usage(NamedTuple):
    """Fields of /proc/<pid>/stat: see proc_pid_stat(5)."""

    parent: int
    ticks: int
    """User and system time of the process and of the children that it has waited for."""


def parse(stat: str) -> Usage:
    """Parse /proc/<pid>/stat. The command's name is in parentheses and may contain parentheses itself."""
    fields = stat.rpartition(")")[2].split()
    return Usage(parent=int(fields[1]), ticks=sum(map(int, fields[11:15])))


def total(root: int, processes: Mapping[int, Usage]) -> int:
    """The ticks of `root` and all its descendants."""
    below = [pid for pid, usage in processes.items() if usage.parent == root]
    return processes[root].ticks + sum(total(pid, processes) for pid in below)


def last(root: int, processes: Mapping[int, Usage]) -> list[int]:
    """The leaves of the process tree below `root`; in a server's tree, the workers."""
    below = [pid for pid, usage in processes.items() if usage.parent == root]
    return [pid for child in below for pid in last(child, processes)] or [root]


def running(proc: Path = PROC) -> dict[int, Usage] | None:
    """Every process; None without /proc."""
    if not (proc / "self" / "stat").exists():
        return None
    processes = {}
    for entry in proc.iterdir():
        if entry.name.isdecimal():
            try:
                processes[int(entry.name)] = parse((entry / "stat").read_text())
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended since the listing; its parent's figures include its time
    return processes


def seconds(root: int, proc: Path = PROC) -> float | None:
    """Processor time of a process tree so far, in seconds; None without /proc."""
    processes = running(proc)
    return None if processes is None else total(root, processes) / os.sysconf("SC_CLK_TCK")


def per_request(start: float | None, end: float | None, requests: int) -> float | None:
    """Microseconds per request, from two readings of `seconds`."""
    return None if start is None or end is None else (end - start) / requests * 1e6
