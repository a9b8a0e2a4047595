"""`python -m benchmarks.streams [--streams N]`: the cost of open event streams for one worker of `serve`.

Measures memory, processor time, connections and statements with and without the streams, and the delay of a change
to each reader, over real sockets, on a durable PostgreSQL, with production settings. A full run is written to
benchmarks/results/streams.md.
"""

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import psycopg

from backend import migrations
from backend.auth.testing import LocalIssuer
from backend.dev.postgres import EmbeddedPostgres
from backend.sync.broker import MAX_STREAMS
from backend.web.connection_limit import max_connections
from benchmarks import cpu
from benchmarks.__main__ import ISSUER, say, write
from benchmarks.errors import BenchmarkError
from benchmarks.issuer import AUDIENCE, LIFETIME, serve_keys
from benchmarks.peers import OURS
from benchmarks.plans import table
from benchmarks.servers import environment, running
from benchmarks.workloads import NEW_TASK
from benchmarks.writes import machine

STREAMS = 1000
IDLE = 20.0  # seconds
CHANGES = 10
PATIENCE = 60.0


class State(NamedTuple):
    """The idle worker's state. `memory`: its private bytes; `transactions`: per second."""

    streams: int
    memory: int
    busy: float | None
    connections: int
    transactions: float


class Reader:
    """The client of one event stream."""

    async def open(self, port: int, token: str) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        await send(self._writer, "GET", "/api/v1/tasks/events", token)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise BenchmarkError(f"a stream was refused: {head.decode()}")
        await self._reader.readuntil(b"\n\n")

    async def next_event(self) -> float:
        """Wait for the next event; the time of its arrival."""
        while not (await self._reader.readuntil(b"\n\n")).partition(b"event: task\n")[1]:
            pass
        return time.perf_counter()

    def close(self) -> None:
        self._writer.close()


async def send(writer: asyncio.StreamWriter, method: str, path: str, token: str, body: str = "") -> None:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}\r\n{body}".encode())
    await writer.drain()


async def change(port: int, token: str) -> None:
    """Create a task and wait for the response, which follows the commit."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await send(writer, "POST", "/api/v1/tasks", token, json.dumps(NEW_TASK))
    head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    if not head.startswith(b"HTTP/1.1 201"):
        raise BenchmarkError(f"creating a task failed: {head.decode()}")


def memory(pid: int) -> int:
    """Private memory of a process tree in bytes (proc_pid_smaps(5))."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    own = sum(int(kilobytes) for kilobytes in re.findall(r"^Private_\w+: +(\d+) kB", rollup, re.MULTILINE))
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own * 1024 + sum(memory(int(child)) for child in children)


async def idle(pid: int, url: str, streams: int, seconds: float) -> State:
    """Measure the worker's state while no request arrives."""
    with psycopg.connect(url, autocommit=True) as connection:

        def transactions(after: float) -> int:
            connection.execute("SELECT pg_sleep(%s)", [after])
            row = connection.execute(
                "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
            ).fetchone()
            assert row
            return int(row[0])

        first = transactions(11)  # an idle connection reports its statistics within 10 s
        started, before = time.perf_counter(), cpu.seconds(pid)
        await asyncio.sleep(seconds)
        after, took = cpu.seconds(pid), time.perf_counter() - started
        last, lasted = transactions(1.1), time.perf_counter() - started
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend'"
        ).fetchone()
        assert row
        busy = None if before is None or after is None else (after - before) / took
        ours = 2  # the two queries of `transactions`
        return State(streams, memory(pid), busy, row[0], max(0.0, (last - first - ours) / lasted))


async def latencies(port: int, tokens: Sequence[str], readers: Sequence[Sequence[Reader]]) -> list[float]:
    """All users create a task at the same time; the seconds from each response to each of its readers."""

    async def one(token: str, theirs: Sequence[Reader]) -> list[float]:
        events = asyncio.gather(*(reader.next_event() for reader in theirs))
        await change(port, token)
        created = time.perf_counter()
        return [arrival - created for arrival in await events]

    async with asyncio.timeout(PATIENCE):
        found = await asyncio.gather(*(one(*pair) for pair in zip(tokens, readers, strict=True)))
    return [seconds for each in found for seconds in each]


def report(
    states: Sequence[State], seconds: float, spread: Sequence[float], wide: Sequence[float], version: str | None
) -> str:
    rows: list[tuple[str, ...]] = []
    for state in states:
        busy = "-" if state.busy is None else f"{100 * state.busy:.1f} %"
        size, rate = f"{state.memory / 2**20:,.1f} MiB", f"{state.transactions:.1f}"
        rows.append((f"{state.streams:,}", size, busy, str(state.connections), rate))
    added = [(after.memory - before.memory) / (after.streams - before.streams) for before, after in pairwise(states)]
    waits = [
        (name, f"{len(each):,}", *(f"{1000 * value:,.0f} ms" for value in summary(each)))
        for name, each in (("all people at once", spread), ("one person", wide))
    ]
    lines = [
        "# What open streams cost",
        "",
        f"One worker of `resource-server serve`, {MAX_STREAMS} streams for each person, PostgreSQL {version},"
        f" {datetime.now(UTC):%Y-%m-%d}, made by `python -m benchmarks.streams`; {machine()}.",
        "",
        f"While nothing happens, for {seconds:g} s each time:",
        "",
        *table("Streams", "Memory", "Processor", "Connections", "Transactions/s", rows=rows),
        "",
        f"Memory of one more stream: {' and '.join(f'{bytes / 1024:.1f} KiB' for bytes in added)}. PostgreSQL counts"
        " only the transactions that read a table: the one statement that looks for changes does.",
        "",
        f"From the answer to a write until each reader is told, of {states[-1].streams:,} who listen:",
        "",
        *table("A task is made by", "Told", "Median", "99 %", "Most", rows=waits),
    ]
    return "\n".join(lines) + "\n"


def summary(seconds: Sequence[float]) -> tuple[float, float, float]:
    return median(seconds), quantiles(seconds, n=100)[98], max(seconds)


async def run(pid: int, port: int, url: str, tokens: Sequence[str], seconds: float) -> str:
    readers: list[list[Reader]] = [[] for _ in tokens]
    for token in tokens:  # creates the user rows before the measurement
        await change(port, token)
    states = [await idle(pid, url, 0, seconds)]
    for half in (slice(None, len(tokens) // 2), slice(len(tokens) // 2, None)):
        for token, theirs in zip(tokens[half], readers[half], strict=True):
            for _ in range(MAX_STREAMS):
                theirs.append(reader := Reader())
                await reader.open(port, token)
        states.append(await idle(pid, url, sum(map(len, readers)), seconds))
    say("making changes")
    spread = [wait for _ in range(CHANGES) for wait in await latencies(port, tokens, readers)]
    wide = [wait for _ in range(CHANGES) for wait in await latencies(port, tokens[:1], readers[:1])]
    with psycopg.connect(url) as connection:
        text = report(states, seconds, spread, wide, connection.info.parameter_status("server_version"))
    for theirs in readers:
        for reader in theirs:
            reader.close()
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.streams", description="What open streams cost one worker.")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--idle", type=float, default=IDLE, help="seconds of each measurement")
    options = parser.parse_args(arguments)
    if max_connections() < options.streams + 100:
        say("the limit of open files is too low")
        return 1
    issuer = LocalIssuer(ISSUER, audience=AUDIENCE)
    people = max(2, options.streams // MAX_STREAMS)
    tokens = [issuer.token(sub=f"user{number}", expires_in=LIFETIME) for number in range(people)]
    try:
        with EmbeddedPostgres() as postgres, serve_keys(issuer) as jwks_url:
            migrations.upgrade(postgres.url)
            variables = environment(postgres.url, ISSUER, jwks_url, AUDIENCE)
            with running(OURS, variables) as server:
                port = int(server.url.rpartition(":")[2])
                text = asyncio.run(run(server.pid, port, postgres.url, tokens, options.idle))
    except BenchmarkError as error:
        say(str(error))
        return 1
    sys.stdout.write(text)
    if (options.streams, options.idle) == (STREAMS, IDLE):
        write({"streams.md": text})
    return 0


if __name__ == "__main__":
    sys.exit(main())
