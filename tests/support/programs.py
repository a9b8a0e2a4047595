"""A pytest plugin: tests that need a program of the machine's or the environment's, `@pytest.mark.needs("promtool")`.

Where it is missing the test is left out, and the run says so; in CI that is an error. `tmpfs` is the right to mount
one, and `netns` the right to make a network namespace (with iproute2), which no package brings: without them the test
is left out in CI, too.
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

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
    packages = sorted(set(missing.values()) - {"tmpfs", "netns"})
    if packages and os.environ.get("CI") == "true":
        raise pytest.UsageError(f"this machine has no {', '.join(packages)}")
    for item, program in missing.items():
        config.stash[_LEFT_OUT].setdefault(program, []).append(item.nodeid)
    items[:] = [item for item in items if item not in missing]
    config.hook.pytest_deselected(items=list(missing))


@cache
def is_here(program: str) -> bool:
    if program not in ("tmpfs", "netns"):
        return find(program) is not None
    try:
        with ExitStack() as stack:
            if program == "netns":
                stack.enter_context(network())
            else:
                stack.enter_context(mounted(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
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


class Network(NamedTuple):
    """A network namespace and its one link, whose ends have an address each."""

    name: str
    link: str
    here: str
    there: str

    def command(self, *command: str) -> list[str]:
        """What runs a command in it."""
        return ["ip", "netns", "exec", self.name, *command]

    def cut(self) -> None:
        """As a loss of power does: nothing arrives any more at either end, and neither is told."""
        _ip("-n", self.name, "link", "set", "there", "down")

    def mend(self) -> None:
        """The opposite of `cut`."""
        _ip("-n", self.name, "link", "set", "there", "up")


def _ip(*arguments: str) -> None:
    command = ["ip", *arguments]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def network() -> Iterator[Network]:
    """A machine of its own, as far as TCP can tell."""
    number = secrets.randbelow(2**14)
    # Of the addresses for benchmarks of networks (RFC 2544), which lead nowhere.
    prefix, first = f"198.18.{number >> 6}", number % 64 * 4
    made = Network(f"tests-{number}", f"tests{number}", f"{prefix}.{first + 1}", f"{prefix}.{first + 2}")
    _ip("netns", "add", made.name)
    try:
        _ip("link", "add", made.link, "type", "veth", "peer", "name", "there", "netns", made.name)
        _ip("addr", "add", f"{made.here}/30", "dev", made.link)
        _ip("-n", made.name, "addr", "add", f"{made.there}/30", "dev", "there")
        _ip("link", "set", made.link, "up")
        _ip("-n", made.name, "link", "set", "there", "up")
        yield made
    finally:
        _ip("netns", "del", made.name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for program, tests in config.stash[_LEFT_OUT].items():
        terminalreporter.write_line(f"left out, since this machine has no {program}: {len(tests)} tests")
