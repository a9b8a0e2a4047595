"""A pytest plugin: tests that need a program of the machine's or the environment's, `@pytest.mark.needs("promtool")`.

Where it is missing the test is left out, and the run says so; in CI that is an error. `tmpfs` is the right to mount
one, which no package brings: without it the test is left out in CI, too.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

_LEFT_OUT = pytest.StashKey[dict[str, list[str]]]()


def find(program: str) -> str | None:
    """Its path: on the machine's PATH, or else beside this Python, which need not be on it."""
    return shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(program): a program that the test runs, from the system's packages")
    config.stash[_LEFT_OUT] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = {
        item: program
        for item in items
        for marker in item.iter_markers("needs")
        for program in marker.args
        if not is_here(program)
    }
    packages = sorted(set(missing.values()) - {"tmpfs"})
    if packages and os.environ.get("CI") == "true":
        raise pytest.UsageError(f"this machine has no {', '.join(packages)}")
    for item, program in missing.items():
        config.stash[_LEFT_OUT].setdefault(program, []).append(item.nodeid)
    items[:] = [item for item in items if item not in missing]
    config.hook.pytest_deselected(items=list(missing))


@cache
def is_here(program: str) -> bool:
    if program != "tmpfs":
        return find(program) is not None
    try:
        with tempfile.TemporaryDirectory() as name, mounted(Path(name)):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def mounted(place: Path, options: str = "size=1m") -> Iterator[None]:
    """A file system of its own, in memory."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        umount = ["umount", str(place)]
        subprocess.run(umount, check=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for program, tests in config.stash[_LEFT_OUT].items():
        terminalreporter.write_line(f"left out, since this machine has no {program}: {len(tests)} tests")
