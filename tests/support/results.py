"""A pytest plugin: `--results FILE` writes a table of the run, one row per folder of tests."""

import platform
import shutil
import subprocess
from collections import Counter, defaultdict
from datetime import UTC, datetime
from pathlib import Path

import pytest

_OUTCOMES = ("passed", "failed", "error", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="FILE", help="write a table of the run to this file")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    file = config.getoption("--results")
    if file is None:
        return
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    seconds: defaultdict[str, float] = defaultdict(float)
    for outcome in _OUTCOMES:
        for report in terminalreporter.getreports(outcome):
            counts[_folder(report.nodeid)][outcome] += 1
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[_folder(report.nodeid)] += report.duration
    lines = [
        "# The last full run of the tests",
        "",
        f"`make test-full` wrote this table at revision {_revision()} on {datetime.now(UTC):%Y-%m-%d}, with Python "
        f"{platform.python_version()} on {platform.system()}.",
        "",
        f"| Folder | {' | '.join(_OUTCOMES)} | Seconds |",
        f"|---|{'---|' * (len(_OUTCOMES) + 1)}",
        *(_row(name, counts[name], seconds[name]) for name in sorted(counts)),
        _row("all", sum(counts.values(), Counter()), sum(seconds.values())),
    ]
    Path(file).write_text("\n".join([*lines, ""]))


def _row(name: str, counts: Counter[str], seconds: float) -> str:
    return f"| {name} | {' | '.join(str(counts[outcome]) for outcome in _OUTCOMES)} | {seconds:.0f} |"


def _revision() -> str:
    git = shutil.which("git")
    command = [git or "", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() if git else "unknown"


def _folder(test: str) -> str:
    """`tests/web/test_server.py::test_x` belongs to `tests/web`, `tests/test_app.py` to `tests`."""
    return test.partition("::")[0].rpartition("/")[0]
