"""A pytest plugin: skips tests whose programs are missing, and provides temporary file systems and networks.

`@pytest.mark.needs("promtool")` names a program that a test runs. Where it is missing, the test is skipped, and `-rs`
lists it with the reason. In CI (`CI=true`) the test fails instead, since packages provide the programs.
`needs("tmpfs")` is the privilege to mount a tmpfs, and `needs("netns")` the privilege to create a network namespace,
with iproute2: tests that lack one are skipped in CI, too.
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

_PRIVILEGES = {
    "tmpfs": "may not mount a tmpfs",
    "netns": "may not create a network namespace, or has no iproute2",
}


def find(program: str) -> str | None:
    """The path of a program on PATH or, like those of Python packages, beside this Python interpreter."""
    return shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(program): a program that the test runs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for need in _missing(item):
            if need in _PRIVILEGES or os.environ.get("CI") != "true":
                item.add_marker(pytest.mark.skip(reason=f"this machine {_PRIVILEGES.get(need, f'has no {need}')}"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # Not a UsageError at collection: that ends a worker process of pytest-xdist without its message.
    for need in _missing(item):
        if need not in _PRIVILEGES and os.environ.get("CI") == "true":
            pytest.fail(f"this machine has no {need}", pytrace=False)


def _missing(item: pytest.Item) -> list[str]:
    return [need for marker in item.iter_markers("needs") for need in marker.args if not is_available(need)]


@cache
def is_available(need: str) -> bool:
    """Whether the program is installed, or this process has the privilege."""
    if need not in _PRIVILEGES:
        return find(need) is not None
    try:
        with ExitStack() as stack:
            if need == "netns":
                stack.enter_context(network())
            else:
                stack.enter_context(mounted(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def mounted(place: Path, options: str = "size=1m") -> Iterator[None]:
    """Mount a tmpfs on the folder `place`."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        umount = ["umount", str(place)]
        subprocess.run(umount, check=True)


class Network(NamedTuple):
    """A network namespace and the link to it; `here` and `there` are the addresses of the link's ends."""

    name: str
    link: str
    here: str
    there: str

    def command(self, *command: str) -> list[str]:
        """The command line that runs a command inside the namespace."""
        return ["ip", "netns", "exec", self.name, *command]

    def cut(self) -> None:
        """Drop all packets in both directions, as after a loss of power. Neither end receives an error."""
        _ip("-n", self.name, "link", "set", "there", "down")

    def mend(self) -> None:
        """Undo `cut`."""
        _ip("-n", self.name, "link", "set", "there", "up")


def _ip(*arguments: str) -> None:
    command = ["ip", *arguments]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def network() -> Iterator[Network]:
    """Create a network namespace: for TCP, the processes in it run on another machine."""
    number = secrets.randbelow(2**14)
    # Addresses that are reserved for benchmarks (RFC 2544), so that they belong to no real machine.
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
