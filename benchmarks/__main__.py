"""`python -m benchmarks [--quick]`: seed, measure, print; a full run is written to benchmarks/results/latest.*

Every server uses the same PostgreSQL with durable settings and 200,000 tasks of 1,000 users, 100 of whom send
requests. This API runs as in production: row-level security, all middleware, and its structured log, which goes to
/dev/null in place of a fast collector. No client requests compression.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg

from backend import __version__
from backend.auth.testing import LocalIssuer
from backend.dev.postgres import EmbeddedPostgres, EmbeddedPostgresError
from benchmarks import chart, cpu, data, load, report, rounds
from benchmarks.errors import BenchmarkError
from benchmarks.issuer import AUDIENCE, LIFETIME, serve_keys
from benchmarks.peers import OURS, PEERS
from benchmarks.servers import ROOT, environment
from benchmarks.workloads import WORKLOADS, Person

RESULTS = Path(__file__).with_name("results")
ISSUER = "http://issuer.test"
PEOPLE = 100
TASKS_EACH = 5


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks", description="This API and its peers, side by side under load.")
    names, kinds = [peer.name for peer in PEERS], [workload.name for workload in WORKLOADS]
    parser.add_argument("--quick", action="store_true", help="two short rounds, without the latency of one connection")
    parser.add_argument("--peer", action="append", choices=names, help="compare only with this peer; can be repeated")
    parser.add_argument("--workload", action="append", choices=kinds, help="run only this workload; can be repeated")
    parser.add_argument("--verbose", action="store_true", help="print the servers' logs")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (BenchmarkError, EmbeddedPostgresError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    generator = load.choose()
    pace = rounds.QUICK if options.quick else rounds.FULL
    peers = [OURS, *(peer for peer in PEERS if not options.peer or peer.name in options.peer)]
    workloads = [each for each in WORKLOADS if not options.workload or each.name in options.workload]
    for peer in peers:
        peer.command(0)  # reports a missing installation before the slow steps
    issuer = LocalIssuer(ISSUER, audience=AUDIENCE)
    busy_before = os.getloadavg()[0]
    say(f"seeding {data.TASKS:,} tasks of {data.USERS:,} people")
    with EmbeddedPostgres() as postgres, serve_keys(issuer) as jwks_url, TemporaryDirectory() as folder:
        data.seed(postgres.url, ISSUER)
        subjects = [f"user{number}" for number in range(PEOPLE)]
        people = [
            Person(issuer.token(sub=subject, expires_in=LIFETIME), data.newest(postgres.url, subject, TASKS_EACH))
            for subject in subjects
        ]
        requests = {workload.name: workload.requests(people) for workload in workloads}
        scene = rounds.Scene(
            database_url=postgres.url,
            postgres=postgres.pid,
            variables=environment(postgres.url, ISSUER, jwks_url, AUDIENCE),
            generator=generator,
            requests=requests,
            files={name: generator.prepare(each, Path(folder, name)) for name, each in requests.items()},
            verbose=options.verbose,
        )
        samples = rounds.measure(scene, peers, workloads, pace, say)
        about = circumstances(
            f"{pace.rounds}, each {pace.warm_up} s of warm-up, {pace.loaded} s with {rounds.CONNECTIONS} connections, "
            f"{pace.alone} s with one (alone)",
            generator=generator,
            database_url=postgres.url,
            busy_before=busy_before,
        )
    text = report.table(samples, workloads, peers, about)
    sys.stdout.write(text)
    if not (options.quick or options.peer or options.workload):
        document = json.dumps(report.document(samples, about), indent=1) + "\n"
        drawing = chart.svg(samples, workloads, about["revision"])
        write({"latest.md": text, "latest.json": document, "latest.svg": drawing})


def circumstances(paced: str, *, generator: load.Generator, database_url: str, busy_before: float) -> dict[str, str]:
    """The conditions of a result: revision, `paced` (the rounds), versions, machine, and the subject of the figures."""
    with psycopg.connect(database_url) as connection:
        version = connection.info.parameter_status("server_version")
    return {
        "revision": revision(),
        "rounds": paced,
        "load": generator.name,
        "versions": f"Python {platform.python_version()}, PostgreSQL {version}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, load average "
        f"{busy_before:.1f} before and {os.getloadavg()[0]:.1f} after",
        "processor time": "of whole process trees, from /proc" if cpu.PROC.exists() else "not measured: no /proc here",
        "this API": "row-level security, all middleware, rate limits counted, and its log of one JSON line a request, "
        "sent to /dev/null",
    }


def revision() -> str:
    """The version, and the commit in a git checkout, with `-dirty` if there are uncommitted changes.

    Changes of result files do not count.
    """
    git = shutil.which("git")

    def ask(*words: str) -> str:
        command = [git or "", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603  # fixed

    commit = ask("describe", "--always", "--exclude=*") if git else ""
    dirty = "-dirty" if commit and ask("status", "--porcelain", "--", ".", ":!benchmarks/results") else ""
    return f"{__version__} {commit}{dirty}".strip()


def write(files: Mapping[str, str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    for name, text in files.items():
        unfinished = RESULTS / f"{name}.tmp"
        unfinished.write_text(text)
        unfinished.rename(RESULTS / name)
        say(f"written: {Path('benchmarks', 'results', name)}")


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
