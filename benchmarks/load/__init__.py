"""Runs a load generator: wrk if it is on the PATH, otherwise autocannon, which `bootstrap.py bench` installs."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from backend.dev.issuer import IssuerError, find_node
from benchmarks.errors import BenchmarkError
from benchmarks.workloads import Request

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Load:
    """A generator's figures. Latencies in milliseconds; `refused` counts responses of status 400 and above."""

    requests: int
    seconds: float
    p50: float
    p99: float
    refused: int
    errors: int
    """Failed connections and missing responses."""


class Generator(Protocol):
    """Sends requests in rotation over keep-alive connections, each as soon as the previous response has arrived."""

    name: str

    def prepare(self, requests: Sequence[Request], file: Path) -> Path:
        """Write the requests in the generator's own format; return the path of `file` with its suffix."""
        ...

    def command(self, url: str, requests: Path, connections: int, seconds: int) -> list[str]:
        """A command line whose last line of output contains the members of `Load` as JSON."""
        ...


class Wrk:
    def __init__(self, program: str) -> None:
        self._program = program
        words = subprocess.run([program, "-v"], capture_output=True, text=True, check=False).stdout.split()  # noqa: S603
        self.name = " ".join(words[:2])

    def prepare(self, requests: Sequence[Request], file: Path) -> Path:
        # JSON string literals of printable ASCII, \r and \n are valid Lua.
        path = file.with_suffix(".lua")
        path.write_text("return {\n" + ",\n".join(json.dumps(request.text) for request in requests) + "\n}\n")
        return path

    def command(self, url: str, requests: Path, connections: int, seconds: int) -> list[str]:
        options = ["--threads=1", f"--connections={connections}", f"--duration={seconds}s"]
        return [self._program, *options, "--timeout=10s", f"--script={HERE / 'wrk.lua'}", url, "--", str(requests)]


class Autocannon:
    name = "autocannon " + json.loads((HERE / "package.json").read_text())["dependencies"]["autocannon"]

    def __init__(self, node: str) -> None:
        self._node = node

    def prepare(self, requests: Sequence[Request], file: Path) -> Path:
        path = file.with_suffix(".json")
        members = ("method", "path", "headers", "body")
        path.write_text(json.dumps([{name: getattr(request, name) for name in members} for request in requests]))
        return path

    def command(self, url: str, requests: Path, connections: int, seconds: int) -> list[str]:
        return [self._node, str(HERE / "autocannon.mjs"), url, str(requests), str(connections), str(seconds)]


def choose() -> Generator:
    """The generator installed on this machine. Raises BenchmarkError, which names the package to install."""
    if wrk := shutil.which("wrk"):
        return Wrk(wrk)
    if not (HERE / "node_modules" / "autocannon").is_dir():
        raise BenchmarkError(
            "no load generator: install wrk (Debian, Ubuntu: apt install wrk), "
            "or run `python3 bootstrap.py bench`, which installs autocannon"
        )
    try:
        return Autocannon(find_node())
    except IssuerError as error:
        raise BenchmarkError(f"autocannon needs Node.js: {error}") from error


def run(generator: Generator, url: str, requests: Path, *, connections: int, seconds: int, refused: bool) -> Load:
    """Load a server. refused: whether all responses must have a status of 400 or above, or none.

    Raises BenchmarkError for other responses, failed requests, or no response at all.
    """
    command = generator.command(url, requests, connections, seconds)
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)  # noqa: S603
    if done.returncode:
        raise BenchmarkError(f"{generator.name} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    load = Load(**json.loads(done.stdout.splitlines()[-1]))
    if load.errors or not load.requests or load.refused != (load.requests if refused else 0):
        raise BenchmarkError(
            f"{url}: {load.refused} of {load.requests} responses had status 400 or above, {load.errors} requests failed"
        )
    return load
