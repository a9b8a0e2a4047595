"""An embedded PostgreSQL 18 for development and tests: binaries from a wheel, one directory, one unix socket."""

import fcntl
import hashlib
import logging
import os
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Self
from urllib.parse import quote

from backend.dev import parent_watchdog, postgres_binaries
from backend.dev.postgres_binaries import Account, EmbeddedPostgresError

__all__ = ["EmbeddedPostgres", "EmbeddedPostgresError"]

logger = logging.getLogger(__name__)

_READY = "database system is ready to accept connections"
_SOCKET = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES = 103  # sun_path has 104 bytes on macOS and the BSDs (108 on Linux), the last of them a NUL
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class EmbeddedPostgres:
    """A PostgreSQL server that stops when this process ends, even if this process is killed.

    data_dir: kept between starts. None: a temporary directory, deleted by `close`.
    durable: False turns fsync off, for tests: faster, but a crash of the machine corrupts the data.
    max_connections, settings: as in postgresql.conf, for this start only.
    start_timeout: seconds.

    `url` is a libpq URL of the superuser `postgres` over a unix socket that only this user can open. Under root, the
    server runs as the owner of the directory or as `nobody`; the permissions of existing directories stay unchanged.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        durable: bool = True,
        max_connections: int = 100,
        settings: Mapping[str, str] | None = None,
        start_timeout: float = 120,
    ) -> None:
        self.data_dir = data_dir and data_dir.absolute()
        self._settings = {
            **({} if durable else _NOT_DURABLE),
            "max_connections": str(max_connections),
            **(settings or {}),
        }
        self._durable = durable
        self._start_timeout = start_timeout
        self._locks: list[IO[str]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""
        self.pid = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """`postgresql://postgres@/postgres?host=...`; stable across starts on the same data directory."""
        if not self._url:
            raise EmbeddedPostgresError("PostgreSQL is not started")
        return self._url

    def start(self) -> None:
        """Start the server and return when it accepts connections.

        Raises EmbeddedPostgresError: no binaries for this platform, data in use by another process, data of another
        major version, or the error from the server's log.
        """
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the server; transactions in progress are rolled back. May be called more than once."""
        if self._process:
            self._process.communicate()
        self._process, self._url, self.pid = None, "", 0
        while self._locks:
            self._locks.pop().close()

    def kill(self) -> None:
        """Simulate a crash: SIGKILL without a checkpoint. The next `start` recovers. For fault tests."""
        os.kill(self.pid, signal.SIGKILL)
        self.close()

    def wait(self) -> int:
        """Block until the server has ended, for any reason, and return its exit code."""
        return self._process.wait() if self._process else 0

    def _start(self) -> None:
        binaries = postgres_binaries.installed()
        home, account = self._home()
        binaries = postgres_binaries.reachable(binaries, account)
        owner = self._lock(home / "owner.lock")
        if owner is None:
            holder = (home / "owner.lock").read_text().strip()
            remedy = "stop that process or use another directory"
            raise EmbeddedPostgresError(f"the PostgreSQL in {home} is in use by process {holder}: {remedy}")
        owner.truncate(0)
        owner.write(f"{os.getpid()}\n")
        owner.flush()
        server = self._await_end_of_earlier_server(home)

        cluster = home / "cluster"
        if not cluster.exists():
            self._initialize(binaries, cluster, account)
        version = (cluster / "PG_VERSION").read_text().strip()
        if version != postgres_binaries.MAJOR:
            raise EmbeddedPostgresError(
                f"{cluster} was written by PostgreSQL {version}, not {postgres_binaries.MAJOR}: "
                "delete it to start with empty data, or set DATABASE_URL to a server of that version"
            )
        _remove_reused_pid(cluster)
        socket = _socket_directory(home, account)
        self._launch(binaries, home, socket, account, server)
        self._url = f"postgresql://postgres@/postgres?host={quote(str(socket), safe='')}"

    def _home(self) -> tuple[Path, Account | None]:
        """The directory for data, socket, log and locks, and the account to run as (None: the current one)."""
        if self.data_dir is None:
            home = _temporary_directory()
            account = postgres_binaries.account_for(home)
        else:
            home = self.data_dir
            try:
                home.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise EmbeddedPostgresError(f"cannot create {home}: {error.strerror}") from error
            account = postgres_binaries.account_for(home)
            if account and not postgres_binaries.can_enter(home.parent, account):
                digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
                home = postgres_binaries.SYSTEM_DIRECTORY / digest
                if not home.exists():
                    logger.warning(
                        "PostgreSQL does not run as root, and other users cannot enter %s: storing its data in %s",
                        self.data_dir.parent,
                        home,
                    )
                home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if account:
            os.chown(home, *account)
        return home, account

    def _lock(self, path: Path) -> IO[str] | None:
        """Lock a file until the last process that has it open ends; None if another process holds the lock."""
        try:
            file = path.open("a+", encoding="ascii")
        except OSError as error:
            raise EmbeddedPostgresError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        self._locks.append(file)
        return file

    def _await_end_of_earlier_server(self, home: Path) -> IO[str]:
        """Return the lock that every process of a server inherits: holding it proves that no other server runs here.

        If the parent of an earlier server was killed, that server is stopping; if its watchdog was killed, too, it
        has to be signalled.
        """
        path = home / "server.lock"
        if lock := self._lock(path):
            return lock
        logger.warning("waiting for a PostgreSQL of an earlier run in %s to stop", home)
        if pid := _postmaster(home / "cluster"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        lock = path.open("a+", encoding="ascii")
        self._locks.append(lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock

    def _initialize(self, binaries: Path, cluster: Path, account: Account | None) -> None:
        """Run initdb in a directory that is renamed when complete, so that an interrupted run leaves no cluster."""
        unfinished = cluster.with_name("cluster.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        command: list[str | Path] = [binaries / "initdb", "-D", unfinished, "--username=postgres", "--encoding=UTF8"]
        command += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=PG_UNICODE_FAST", "--no-instructions"]
        command += ["--auth-local=trust", "--auth-host=reject"] + ["--no-sync"] * (not self._durable)
        done = postgres_binaries.execute(command, account)
        if done.returncode:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise EmbeddedPostgresError(f"initdb failed: {_reason(done.stderr or done.stdout)}")
        unfinished.rename(cluster)

    def _launch(self, binaries: Path, home: Path, socket: Path, account: Account | None, server: IO[str]) -> None:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": '"{}"'.format(str(socket).replace('"', '""')),
            "lc_messages": "C",
            **self._settings,
        }
        # Readiness is read from standard error, so an earlier ALTER SYSTEM must not redirect the log.
        settings |= {"logging_collector": "off", "log_destination": "stderr"}
        command: list[str | Path] = [binaries / "postgres", "-D", home / "cluster"]
        command += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        temporary = home if self.data_dir is None else socket if socket.parent != home else None
        arguments = parent_watchdog.arguments(command, stop=signal.SIGINT, user=account, ready=_READY, remove=temporary)
        with (home / "log").open("wb") as log:
            process = self._process = subprocess.Popen(  # noqa: S603 - fixed program and arguments
                arguments,
                env=postgres_binaries.ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                pass_fds=[server.fileno()],
                bufsize=0,
            )
        assert process.stdout
        self.pid = int(process.stdout.readline() or 0)
        ready, _, _ = select.select([process.stdout], [], [], self._start_timeout)
        if not ready:
            raise EmbeddedPostgresError(f"PostgreSQL was not ready in {self._start_timeout:g} s: see {home / 'log'}")
        if not process.stdout.readline():
            process.wait()
            text = (home / "log").read_text(errors="replace") if home.exists() else ""
            raise EmbeddedPostgresError(f"PostgreSQL did not start: {_reason(text)}")


def _socket_directory(home: Path, account: Account | None) -> Path:
    socket = home / "socket"
    if len(os.fsencode(socket / _SOCKET)) > _SOCKET_PATH_BYTES or "," in str(socket):  # libpq's host is a list
        socket = _temporary_directory()
    socket.mkdir(mode=0o700, exist_ok=True)
    if account:
        os.chown(socket, *account)
    return socket


def _temporary_directory() -> Path:
    """Create a temporary directory whose path is short enough for a unix socket."""
    for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - mkdtemp makes the name unguessable
        path = Path(tempfile.mkdtemp(prefix="postgres-", dir=parent))
        if len(os.fsencode(path / "socket" / _SOCKET)) <= _SOCKET_PATH_BYTES:
            break
        path.rmdir()
    return path


def _postmaster(cluster: Path) -> int:
    """The process id in postmaster.pid, 0 if there is none."""
    try:
        return int((cluster / "postmaster.pid").read_text().split(maxsplit=1)[0])
    except (FileNotFoundError, ValueError, IndexError):
        return 0


def _remove_reused_pid(cluster: Path) -> None:
    """Remove a postmaster.pid that names another program's process, which would keep PostgreSQL from starting.

    That is common in containers, where process ids repeat. The server lock is held here, so no server of this class
    runs; PostgreSQL's own check detects one that was started by hand.
    """
    pid = _postmaster(cluster)
    if pid and "postgres" not in _program(pid):
        (cluster / "postmaster.pid").unlink()


def _program(pid: int) -> str:
    """The name of the program that a process runs, empty if the process does not exist."""
    if Path("/proc/self/comm").exists():
        try:
            return Path(f"/proc/{pid}/comm").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return ""
    return postgres_binaries.execute(["/bin/ps", "-o", "comm=", "-p", str(pid)], None).stdout


def _reason(text: str) -> str:
    """The error in a log, with its hint, in one line."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if any(word in line for word in ("FATAL:", "PANIC:", "error:", "HINT:"))]
    return " ".join(line.split("UTC ")[-1].strip() for line in (errors or lines)[-2:]) or "no output"
