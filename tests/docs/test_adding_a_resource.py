"""The guide to a new resource: its code, applied to a copy of the project, passes the linters and the tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from backend import migrations
from tests.conftest import create_database

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "adding-a-resource.md"
BLOCK = re.compile(r"^```(python|diff) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_COPIED = shutil.ignore_patterns("__pycache__", "node_modules", "results", "load")


def apply_guide(folder: Path, text: str) -> list[Path]:
    """Write the files of the guide into `folder` and apply its diffs; return the changed files."""
    numbers = {"NEXT": f"{int(migrations.head()) + 1:04}", "NEWEST": migrations.head()}
    files = []
    for kind, name, block in BLOCK.findall(re.sub("NEXT|NEWEST", lambda match: numbers[match[0]], text)):
        file = folder / name
        if kind == "diff":
            lines = block.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] == " ")
            assert file.read_text().count(before) == 1, f"{name} does not contain the context of the diff:\n{before}"
            block = file.read_text().replace(before, "".join(line[1:] for line in lines))
        else:
            assert not file.exists(), f"{name} already exists"
            file.parent.mkdir(exist_ok=True)
        file.write_text(block)
        files.append(file)
    return files


class Checkout:
    """A copy of this project with the guide applied, and a way to run Python modules in it."""

    def __init__(self, folder: Path, postgres: str) -> None:
        for part in "backend", "benchmarks", "tests":
            shutil.copytree(ROOT / part, folder / part, ignore=NOT_COPIED)
        shutil.copy(ROOT / "pyproject.toml", folder)
        self.folder = folder
        self.files = [str(file.relative_to(folder)) for file in apply_guide(folder, GUIDE.read_text())]
        self._environment = os.environ | {"PYTHONPATH": str(folder), "TEST_DATABASE_URL": postgres}

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=self._environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, postgres: str) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"), postgres)


def test_a_resource_is_one_folder_one_migration_and_one_line() -> None:
    blocks = BLOCK.findall(GUIDE.read_text())
    new = {str(Path(name).parent) for kind, name, _ in blocks if kind == "python"}
    added = {name: re.findall(r"^[+-].*", block, re.MULTILINE) for kind, name, block in blocks if kind == "diff"}
    assert new == {"backend/notes", "backend/migrations/versions"}
    assert {name: len(lines) for name, lines in added.items()} == {
        "backend/app.py": 1,
        "tests/resources/test_owned_resources.py": 1,
    }


@pytest.mark.parametrize(
    "linter",
    [
        ["ruff", "check", "--no-cache"],
        ["ruff", "format", "--check", "--no-cache"],
        # The cache of this checkout, which the linters have filled.
        ["mypy", f"--cache-dir={ROOT / '.mypy_cache'}"],
    ],
    ids=lambda command: " ".join(command[:2]).partition(" --")[0],
)
def test_the_linters_accept_the_code(checkout: Checkout, linter: list[str]) -> None:
    result = checkout.run(*linter, *checkout.files)
    assert result.returncode == 0, result.stdout + result.stderr


# Tests of the whole API, which must pass with another resource.
TESTS_OF_THE_WHOLE_API = [
    "tests/test_app.py::test_the_resource_metadata_come_from_the_settings",
    "tests/contract/test_openapi.py::test_every_operation_is_documented",
    "tests/contract/test_openapi.py::test_every_schema_and_its_members_are_described",
    "tests/tasks/test_isolation.py::test_every_operation_of_the_api_takes_part",
    "tests/users/test_lifecycle.py::test_nothing_of_an_account_is_left",
    "tests/users/test_users.py::test_no_column_stores_a_password",
]


def test_the_resource_passes_the_tests_of_all_resources(checkout: Checkout) -> None:
    """Runs in another interpreter on a new database."""
    tests = [
        "tests/resources/test_owned_resources.py",
        "tests/database/test_migrations.py",
        "tests/contract/test_conformance.py",
        "tests/test_architecture.py",
    ]
    chosen = ["-k", "(not test_conformance or notes) and not concurrent_migrations and not revisions_it_replaced"]
    result = checkout.run(
        "pytest", "-v", "--no-header", "-p", "no:cacheprovider", *tests, *TESTS_OF_THE_WHOLE_API, *chosen
    )
    assert result.returncode == 0, result.stdout + result.stderr
    # These tests exist only in the copy.
    for name in (
        "test_users_cannot_see_change_or_detect_rows_of_others[notes-unfiltered]",
        "test_every_operation_is_documented[list_notes]",
        "test_hostile_values_are_answered_as_documented[post-/api/v1/notes]",
        "test_only_the_application_imports_a_feature[notes]",
    ):
        assert f"{name} PASSED" in result.stdout


def test_autogenerate_writes_the_tables_and_indexes(checkout: Checkout, postgres: str, tmp_path: Path) -> None:
    url = create_database(postgres, f"guide_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    (written,) = (checkout.folder / file for file in checkout.files if file.endswith("_notes.py"))
    original = written.rename(tmp_path / written.name)
    revision = written.name.partition("_")[0]
    result = checkout.run(
        "alembic", "revision", "--autogenerate", "--rev-id", revision, "-m", "notes", DATABASE_URL=url
    )
    generated = written.read_text()
    original.replace(written)
    assert result.returncode == 0, result.stderr
    up, down = generated.split("def downgrade")
    assert re.findall(r"op\.(\w+\('\w+')", up) == [
        "create_table('notes'",
        "create_index('notes_by_change'",
        "create_index('notes_by_creation'",
        "create_index('notes_by_number'",
        "create_index('notes_deleted'",
        "create_index('notes_to_purge'",
    ]
    assert "op.drop_table('notes')" in down
