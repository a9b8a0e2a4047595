"""Reports medians with their ranges, and this API's ratio to each peer, as Markdown and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any, Self

from benchmarks.peers import OURS, Peer
from benchmarks.rounds import Sample, Samples
from benchmarks.workloads import Workload

FIGURES = tuple(field.name for field in fields(Sample))
COLUMNS = (
    ("requests/s", "requests_per_second", ",.0f"),
    ("p50 ms", "p50", ",.1f"),
    ("p99 ms", "p99", ",.1f"),
    ("alone p50 ms", "alone_p50", ",.2f"),
    ("alone p99 ms", "alone_p99", ",.2f"),
    ("server CPU us", "server_cpu", ",.0f"),
    ("PostgreSQL CPU us", "postgres_cpu", ",.0f"),
    ("body bytes", "body", ",.0f"),
)


@dataclass(frozen=True)
class Figure:
    """Median, minimum and maximum of all rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(median(values), min(values), max(values))

    @property
    def spread(self) -> float:
        """The range of the rounds divided by the median."""
        return (self.greatest - self.least) / self.median

    def text(self, form: str) -> str:
        middle, least, greatest = (format(value, form) for value in (self.median, self.least, self.greatest))
        return middle if least == greatest else f"{middle} ({least}-{greatest})"


def figure(samples: Sequence[Sample], name: str) -> Figure | None:
    """One figure of a server over all rounds; None if it was not measured."""
    values = [value for sample in samples if (value := getattr(sample, name)) is not None]
    return Figure.of(values) if values else None


def ratio(over: Sequence[Sample], under: Sequence[Sample], name: str) -> Figure | None:
    """One server's figure divided by another's, round by round: other load on the machine affects both turns alike."""
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(over, under, strict=True)]
    values = [a / b for a, b in pairs if a is not None and b]
    return Figure.of(values) if values else None


def ratios(servers: Mapping[str, Sequence[Sample]], name: str) -> dict[str, Figure | None]:
    """This API's advantage over a peer in requests per second and in processor time per request; 1 is parity."""
    ours, theirs = servers[OURS.name], servers[name]
    return {
        "requests_per_second": ratio(ours, theirs, "requests_per_second"),
        "server_cpu": ratio(theirs, ours, "server_cpu"),
    }


def document(samples: Samples, about: Mapping[str, Any]) -> dict[str, Any]:
    """All results for machines: each round, the figures and the ratios."""

    def as_dicts(figures: Mapping[str, Figure | None]) -> dict[str, Any]:
        return {name: found and asdict(found) for name, found in figures.items()}

    return {
        "about": dict(about),
        "workloads": {
            workload: {
                name: {
                    "figures": as_dicts({column: figure(taken, column) for column in FIGURES}),
                    "times_ours": as_dicts(ratios(servers, name)),
                    "rounds": [asdict(sample) for sample in taken],
                }
                for name, taken in servers.items()
            }
            for workload, servers in samples.items()
        },
    }


def table(samples: Samples, workloads: Sequence[Workload], peers: Sequence[Peer], about: Mapping[str, Any]) -> str:
    """All results in Markdown."""
    lines = ["# This API and its peers", ""]
    lines += ["One worker each, one at a time, in turns. Medians of all rounds (least-greatest).", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    spreads = ", ".join(f"{share:.0%} for {title}" for title, share in noise(samples).items())
    lines += [f"- how far the rounds of one ratio lie apart at most, as a share of their median: {spreads}", ""]
    lines += [f"- `{peer.name}`: {peer.title}" for peer in peers]
    for workload in workloads:
        servers = samples[workload.name]
        head = ["server", *(title for title, _, _ in COLUMNS), "ours: times the requests/s", "ours: times less CPU"]
        lines += ["", f"## {workload.title}", "", _row(head), _row(["---"] * len(head))]
        for name, taken in servers.items():
            cells = [_cell(figure(taken, column), form) for _, column, form in COLUMNS]
            compared = (
                ["", ""] if name == OURS.name else [_cell(each, ".2f") for each in ratios(servers, name).values()]
            )
            lines.append(_row([f"`{name}`", *cells, *compared]))
    return "\n".join([*lines, ""])


def noise(samples: Samples) -> dict[str, float]:
    """The largest spread of the servers' ratios, for each kind of ratio."""
    found = [ratios(servers, name) for servers in samples.values() for name in servers]
    return {
        title: max((kind.spread for each in found if (kind := each[name])), default=0.0)
        for title, name in (("requests/s", "requests_per_second"), ("processor time", "server_cpu"))
    }


def _cell(found: Figure | None, form: str) -> str:
    return "not measured" if found is None else found.text(form)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
