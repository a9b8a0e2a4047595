"""A command under the watchdog ends with its parent process, by the chosen signal, together with its children."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backend.dev import parent_watchdog
from tests.dev.processes import await_end, family


@pytest.fixture
def start() -> Iterator[Any]:
    """Run a shell script under the watchdog; processes that the test leaves are ended."""
    started = []

    def run(script: str, **options: Any) -> subprocess.Popen[bytes]:
        command = parent_watchdog.arguments(["/bin/sh", "-c", script], **options)
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.communicate()


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -9 $$", 137)]
)
def test_the_exit_code_is_that_of_the_command(start: Any, script: str, code: int) -> None:
    assert start(script).wait() == code


def test_a_missing_command_is_named() -> None:
    command = parent_watchdog.arguments(["/nowhere/at/all"])
    done = subprocess.run(command, stdin=subprocess.PIPE, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (127, b"/nowhere/at/all: No such file or directory\n")


def test_the_end_of_standard_input_stops_the_command(start: Any) -> None:
    process = start("trap 'echo asked; exit 3' INT; echo up; while :; do sleep 0.01; done", stop=signal.SIGINT)
    assert process.stdout.readline() == b"up\n"
    process.stdin.close()
    assert process.stdout.readline() == b"asked\n"
    assert process.wait() == 3
    process.stdin = None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_watchdog_stops_the_command(start: Any, number: signal.Signals) -> None:
    process = start("trap 'exit 3' TERM; echo up; while :; do sleep 0.01; done")
    assert process.stdout.readline() == b"up\n"
    process.send_signal(number)
    assert process.wait() == 3


def test_a_command_that_ignores_the_signal_is_killed_with_its_children(start: Any) -> None:
    process = start("trap '' TERM; sleep 600 & echo up; wait; wait", grace=0.1)
    assert process.stdout.readline() == b"up\n"
    processes = family(process.pid)
    assert len(processes) == 3
    process.stdin.close()
    process.stdin = None
    assert process.wait() == 137
    assert await_end(processes) == []


def test_children_that_outlive_the_command_are_ended(start: Any) -> None:
    process = start("sleep 600 >&- & echo $!")
    left = family(int(process.stdout.readline()))
    assert process.wait() == 0
    assert await_end(left) == []


def test_kill_9_of_the_parent_ends_the_command() -> None:
    script = (
        "import subprocess, sys; from backend.dev import parent_watchdog\n"
        "subprocess.Popen(parent_watchdog.arguments(['/bin/sh', '-c', 'echo up; sleep 600']), stdin=subprocess.PIPE,"
        " start_new_session=True).wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout
    assert parent.stdout.readline() == b"up\n"
    processes = family(parent.pid)
    assert len(processes) >= 3
    parent.kill()
    assert await_end(processes) == []
    parent.communicate()


def test_readiness_is_reported_once_even_if_its_text_arrives_in_pieces(start: Any) -> None:
    script = "printf 'it is re'; sleep 0.05; echo ady to serve; echo ready again; exec sleep 600"
    process = start(script, ready="ready to")
    assert int(process.stdout.readline()) > 0
    assert process.stdout.readline() == b"\n"
    assert process.stderr.readline() == b"it is ready to serve\n"
    assert process.stderr.readline() == b"ready again\n"
    assert process.communicate() == (b"", b"")


def test_the_output_of_a_command_that_ends_before_it_is_ready_is_logged(start: Any) -> None:
    process = start("echo no >&2; exit 1", ready="ready")
    assert process.wait() == 1
    out, err = process.communicate()
    assert (out.count(b"\n"), err) == (1, b"no\n")


def test_the_directory_is_deleted_after_the_command(start: Any, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "file").touch()
    assert start(f"test -e '{place}/file'", remove=place).wait() == 0
    assert not place.exists()
