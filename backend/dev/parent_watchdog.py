"""Runs a command that stops when its parent process ends: the end of standard input stops it.

POSIX has no such feature. Linux's PR_SET_PDEATHSIG follows the thread that forked instead of the process, and is lost
when the user changes. The kernel closes a pipe however its holder ends. This file runs as a program of its own
(`arguments` returns its command line) without site-packages, and imports little, to use little memory while it waits.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def arguments(
    command: Sequence[str | Path],
    *,
    stop: signal.Signals = signal.SIGTERM,
    grace: float = 15,
    user: tuple[int, int] | None = None,
    ready: str = "",
    remove: Path | None = None,
) -> list[str]:
    """The command line that runs `command` under this program; start it with a pipe as stdin and in a new session.

    stop: the signal that asks the command to end; after `grace` seconds its process group is killed.
    user: (uid, gid) to run the command as.
    ready: text that the command logs when it is ready. With it, standard output gets two lines: the command's process
        id, and an empty line when the command has logged that text. Its output goes to standard error.
    remove: a directory to delete when the command has ended.
    """
    account = "{}:{}".format(*user) if user else ""
    options = [str(stop.value), str(grace), account, ready, str(remove or "")]
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), *options, *map(str, command)]


def main(stop: str, grace: str, user: str, ready: str, remove: str, *command: str) -> int:
    signals, wake = os.pipe()
    os.set_blocking(signals, False)
    os.set_blocking(wake, False)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(wake)

    output, child_output = os.pipe() if ready else (-1, -1)
    pid = os.fork()
    if pid == 0:
        execute(command, user, child_output)
    if ready:
        os.close(child_output)
        os.set_blocking(output, False)
        os.write(1, b"%d\n" % pid)

    watched = [0, signals] + [output] * bool(ready)
    awaited, recent = ready.encode(), b""
    deadline: float | None = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select(watched, [], [], left)
        if output in readable:
            chunk = os.read(output, 65536)
            log(chunk)
            if not chunk:
                watched.remove(output)
            elif awaited and awaited in (recent := recent[-len(awaited) :] + chunk):
                awaited = b""
                report_ready()
        received = set(os.read(signals, 512)) if signals in readable else set()
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if deadline is None and (received - {signal.SIGCHLD} or (0 in readable and not os.read(0, 4096))):
            os.kill(pid, int(stop))
            deadline = time.monotonic() + float(grace)
            watched.remove(0)
        elif deadline is not None and time.monotonic() >= deadline:
            kill_group(pid)
            deadline = time.monotonic() + float(grace)

    kill_group(pid)
    if output in watched:
        log_rest(output)
    if remove:
        import shutil  # imported late to save memory while waiting

        shutil.rmtree(remove, ignore_errors=True)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def execute(command: Sequence[str], user: str, output: int) -> None:
    """Replace the forked child by the command; never returns."""
    try:
        os.setpgid(0, 0)
        if user:
            uid, gid = map(int, user.split(":"))
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        if output >= 0:
            os.dup2(output, 1)
            os.dup2(output, 2)
        os.execv(command[0], [*command])  # noqa: S606 - without a shell on purpose
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def log(chunk: bytes) -> None:
    with suppress(OSError):  # a full disk must not end this process, which has to stop the command
        os.write(2, chunk)


def report_ready() -> None:
    with suppress(BrokenPipeError):  # the parent has ended; standard input will end, too
        os.write(1, b"\n")


def log_rest(output: int) -> None:
    with suppress(BlockingIOError):  # a process that the command left running holds the other end
        while chunk := os.read(output, 65536):
            log(chunk)


def kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
