"""Measures the servers in rounds, A B C A B C ...: each alone, newly started, and on the same data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cpu, data, load
from benchmarks.load import Generator
from benchmarks.peers import Peer
from benchmarks.servers import Server, running
from benchmarks.workloads import Request, Workload

CONNECTIONS = 32


@dataclass(frozen=True)
class Pace:
    """The number of rounds, and seconds of warm-up, of load, and of the latency test with one connection (0: none)."""

    rounds: int
    warm_up: int
    loaded: int
    alone: int
    connections: int = CONNECTIONS


FULL = Pace(rounds=5, warm_up=2, loaded=5, alone=2)
QUICK = Pace(rounds=2, warm_up=1, loaded=1, alone=0)


@dataclass(frozen=True)
class Sample:
    """One server under one workload in one round. Latencies in ms, processor time in us per request."""

    requests_per_second: float
    p50: float
    p99: float
    alone_p50: float | None
    alone_p99: float | None
    server_cpu: float | None
    postgres_cpu: float | None
    body: int
    """Bytes of one response body."""


Samples = dict[str, dict[str, list[Sample]]]
"""By workload, then by peer: one sample per round."""


@dataclass(frozen=True)
class Scene:
    """The parts that all servers share: PostgreSQL's URL and process id, the settings, the requests."""

    database_url: str
    postgres: int
    variables: Mapping[str, str]
    generator: Generator
    requests: Mapping[str, list[Request]]
    files: Mapping[str, Path]
    verbose: bool = False


def measure(
    scene: Scene, peers: Sequence[Peer], workloads: Sequence[Workload], pace: Pace, say: Callable[[str], None]
) -> Samples:
    """Load every peer with each of its workloads. Raises BenchmarkError at the first wrong response."""
    samples: Samples = {workload.name: {} for workload in workloads}
    for number in range(pace.rounds):
        for peer in peers:
            with running(peer, scene.variables, show_log=scene.verbose) as server:
                for workload in workloads:
                    if workload.name in peer.workloads:
                        sample = take(scene, server, workload, pace)
                        samples[workload.name].setdefault(peer.name, []).append(sample)
                        figure = f"{sample.requests_per_second:8.0f}/s"
                        say(f"round {number + 1} of {pace.rounds}: {peer.name:17} {workload.name:8} {figure}")
            data.restore(scene.database_url)
    return samples


def take(scene: Scene, server: Server, workload: Workload, pace: Pace) -> Sample:
    """Take one sample: warm up, load, and load with one connection."""
    refused = workload.status >= 400
    body = server.check(workload, scene.requests[workload.name][0])

    def run(connections: int, seconds: int) -> load.Load:
        file = scene.files[workload.name]
        return load.run(scene.generator, server.url, file, connections=connections, seconds=seconds, refused=refused)

    run(pace.connections, pace.warm_up)
    before = cpu.seconds(server.pid), cpu.seconds(scene.postgres)
    loaded = run(pace.connections, pace.loaded)
    after = cpu.seconds(server.pid), cpu.seconds(scene.postgres)
    alone = run(1, pace.alone) if pace.alone else None
    server_cpu, postgres_cpu = (
        cpu.per_request(start, end, loaded.requests) for start, end in zip(before, after, strict=True)
    )
    return Sample(
        requests_per_second=loaded.requests / loaded.seconds,
        p50=loaded.p50,
        p99=loaded.p99,
        alone_p50=alone.p50 if alone else None,
        alone_p99=alone.p99 if alone else None,
        server_cpu=server_cpu,
        postgres_cpu=postgres_cpu,
        body=body,
    )
