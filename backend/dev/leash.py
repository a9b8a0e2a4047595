"""Run one command that cannot outlive whoever started it: when standard input ends, so does the command.

POSIX has no such thing, and Linux's PR_SET_PDEATHSIG follows the thread that forked, not the process, and is lost when
the user changes. A pipe is closed by the kernel however its holder dies. This file is a program of its own (`arguments`
gives its command line), runs on a bare interpreter, and imports little, to be small while it waits.
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
    """The command line that runs `command` on a leash; give its process a pipe as standard input and a new session.

    stop: the signal that asks the command to end; after `grace` seconds its whole process group is killed.
    user: (uid, gid) to run the command as.
    ready: text that the command writes when it serves. With it, standard output gets two lines: the command's process
        id, and an empty one when that text has passed on its way to standard error.
    remove: a directory to delete when the command has ended.
    """
    who = "{}:{}".format(*user) if user else ""
    options = [str(stop.value), str(grace), who, ready, str(remove or "")]
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), *options, *map(str, command)]


def main(stop: str, grace: str, user: str, ready: str, remove: str, *command: str) -> int:
    signals, wake = os.pipe()
    os.set_blocking(signals, False)
    os.set_blocking(wake, False)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(wake)

    words, child_words = os.pipe() if ready else (-1, -1)
    pid = os.fork()
    if pid == 0:
        execute(command, user, child_words)
    if ready:
        os.close(child_words)
        os.set_blocking(words, False)
        os.write(1, b"%d\n" % pid)

    watched = [0, signals] + [words] * bool(ready)
    awaited, heard = ready.encode(), b""
    deadline: float | None = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select(watched, [], [], left)
        if words in readable:
            chunk = os.read(words, 65536)
            log(chunk)
            if not chunk:
                watched.remove(words)
            elif awaited and awaited in (heard := heard[-len(awaited) :] + chunk):
                awaited = b""
                announce()
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
    if words in watched:
        last_words(words)
    if remove:
        import shutil  # not needed until now, and not small

        shutil.rmtree(remove, ignore_errors=True)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def execute(command: Sequence[str], user: str, words: int) -> None:
    """Become the command; in the forked child, so it never returns."""
    try:
        os.setpgid(0, 0)
        if user:
            uid, gid = map(int, user.split(":"))
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        if words >= 0:
            os.dup2(words, 1)
            os.dup2(words, 2)
        os.execv(command[0], [*command])  # noqa: S606 - no shell is the point
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def log(chunk: bytes) -> None:
    with suppress(OSError):  # a full disk must not take the command's minder with it
        os.write(2, chunk)


def announce() -> None:
    with suppress(BrokenPipeError):  # whoever asked is gone; standard input is about to tell
        os.write(1, b"\n")


def last_words(words: int) -> None:
    with suppress(BlockingIOError):  # a process of the command that lives on holds the other end
        while chunk := os.read(words, 65536):
            log(chunk)


def kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
