"""Draws the requests per second of every server under every workload as an SVG for light and dark pages."""

from collections.abc import Mapping, Sequence
from html import escape

from benchmarks.peers import OURS
from benchmarks.report import Figure, figure
from benchmarks.rounds import Samples
from benchmarks.workloads import Workload

WIDTH = 880
NAMES = 170  # left end of the bars
LONGEST = 520  # of the longest bar or whisker
ROW = 22
HEAD = 40  # above the bars of a workload
BAR = 14

# The background is transparent, so only the colours of texts and bars depend on the theme.
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.bar { fill: #8c959f }
.ours { fill: #0969da }
.whisker { stroke: #1f2328; stroke-width: 1.5; fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .bar { fill: #6e7681 }
  .ours { fill: #4493f8 }
  .whisker { stroke: #e6edf3 }
}
"""


def svg(samples: Samples, workloads: Sequence[Workload], revision: str) -> str:
    """The chart. Each workload has its own scale from 0, because refusals are many times as fast as the others."""
    drawn, y = [], 28
    note = f"Requests per second: median of all rounds, least and greatest. {revision}"
    drawn.append(f'<text x="0" y="{y - 10}">{escape(note)}</text>')
    for workload in workloads:
        rates = {
            name: rate
            for name, taken in samples[workload.name].items()
            if (rate := figure(taken, "requests_per_second")) is not None
        }
        drawn.append(f'<text class="title" x="0" y="{y + HEAD - 14}">{escape(workload.title)}</text>')
        y += HEAD
        drawn += _bars(rates, y)
        y += ROW * len(rates)
    label = f"Requests per second of {', '.join(samples[workloads[0].name])}" if workloads else "Nothing"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 8}" '
        f'viewBox="0 0 {WIDTH} {y + 8}" role="img" aria-label="{escape(label)}">'
    )
    return "\n".join([head, f"<style>{STYLE}</style>", *drawn, "</svg>", ""])


def _bars(rates: Mapping[str, Figure], top: int) -> list[str]:
    """The bars of one workload, the fastest server first."""
    scale = LONGEST / max((rate.greatest for rate in rates.values()), default=1)
    drawn = []
    for row, (name, rate) in enumerate(sorted(rates.items(), key=lambda each: -each[1].median)):
        y = top + row * ROW
        middle, text = y + BAR / 2, y + 12
        least, median, greatest = (
            round(NAMES + scale * value, 1) for value in (rate.least, rate.median, rate.greatest)
        )
        kind = "bar ours" if name == OURS.name else "bar"
        drawn += [
            f'<text x="{NAMES - 8}" y="{text}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="{kind}" x="{NAMES}" y="{y}" width="{round(median - NAMES, 1)}" height="{BAR}"/>',
            f'<path class="whisker" d="M{least} {middle}H{greatest}M{least} {y + 3}v8M{greatest} {y + 3}v8"/>',
            f'<text x="{greatest + 8}" y="{text}">{rate.text(",.0f")}</text>',
        ]
    return drawn
