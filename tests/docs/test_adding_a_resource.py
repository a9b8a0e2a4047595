"""The guide to a new resource: each chapter, applied to a copy of the project, passes the linters and its tests."""

import re
import shlex

import pytest

from backend.dev.new_resource import GUIDE, apply_guide
from tests.support.checkout import ROOT, Checkout

TEXT = (ROOT / GUIDE).read_text()
CHAPTERS = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n)+)", TEXT, re.MULTILINE))
FIRST, LAST = "The smallest resource", "Tests"
CODE = re.compile(r"^```\w.*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MIGRATION = re.compile(r"^\.venv/bin/(alembic .+)$", re.MULTILINE)


class Reader:
    """Follows the guide in a copy of the project."""

    def __init__(self, checkout: Checkout) -> None:
        self.checkout = checkout
        self.files: dict[str, None] = {}
        self._unread = list(CHAPTERS)
        checkout.run("backend.cli", "migrate")

    def read_to(self, heading: str) -> None:
        """Apply all chapters up to this one."""
        while heading in self._unread:
            chapter = CHAPTERS[self._unread.pop(0)]
            for file, text in apply_guide(self.checkout.folder, chapter).items():
                name = str(file.relative_to(self.checkout.folder))
                self.checkout.write(name, text)
                self.files[name] = None
            for command in MIGRATION.findall(chapter):
                self.checkout.run(*shlex.split(command))
                self.files[f"backend/migrations/versions/{self.checkout.migrations()[-1]}"] = None
                self.checkout.run("backend.cli", "migrate")

    def lint(self, *linter: str) -> None:
        self.checkout.run(*linter, *self.files)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, postgres: str) -> Reader:
    return Reader(Checkout(tmp_path_factory.mktemp("checkout"), postgres))


def test_the_first_chapter_has_at_most_70_lines_of_code() -> None:
    assert next(iter(CHAPTERS)) == FIRST
    assert sum(block.count("\n") for block in CODE.findall(CHAPTERS[FIRST])) <= 70


@pytest.mark.parametrize(
    "heading",
    [
        FIRST,
        *(
            pytest.param(heading, marks=pytest.mark.full)
            for heading in ("Permissions", "Updates with ETags", "Pages and filters", "Search", "Sync")
        ),
    ],
)
def test_a_chapter_works(reader: Reader, heading: str) -> None:
    """In another interpreter, on a new database."""
    reader.read_to(heading)
    reader.lint("ruff", "check", "--no-cache")
    reader.lint("ruff", "format", "--check", "--no-cache")
    test = f"tests/docs/chapters.py::test_{heading.lower().replace(' ', '_')}"
    reader.checkout.run("pytest", "-q", "-p", "no:cacheprovider", test)
    assert "No new upgrade operations" in reader.checkout.run("alembic", "check")


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
def test_the_linters_accept_all_chapters(reader: Reader, linter: list[str]) -> None:
    reader.read_to(LAST)
    reader.lint(*linter)


# Tests of the whole API, which must pass with another resource.
TESTS_OF_THE_WHOLE_API = [
    "tests/test_app.py::test_the_resource_metadata_come_from_the_settings",
    "tests/contract/test_openapi.py::test_every_operation_is_documented",
    "tests/contract/test_openapi.py::test_every_schema_and_its_members_are_described",
    "tests/tasks/test_isolation.py::test_every_operation_of_the_api_takes_part",
    "tests/users/test_lifecycle.py::test_nothing_of_an_account_is_left",
    "tests/users/test_permissions.py::test_each_inclusion_of_a_route_has_its_own_permission",
    "tests/users/test_users.py::test_no_column_stores_a_password",
]


def test_the_resource_passes_the_tests_of_all_resources(reader: Reader) -> None:
    reader.read_to(LAST)
    tests = [
        "tests/notes",
        "tests/docs/chapters.py",
        "tests/resources/test_owned_resources.py",
        "tests/database/test_migrations.py",
        "tests/contract/test_conformance.py",
        "tests/test_architecture.py",
    ]
    chosen = (
        "(not test_conformance or notes) and not concurrent_migrations and not smallest_resource and not many_to_many"
    )
    output = reader.checkout.run(
        "pytest", "-v", "--no-header", "-p", "no:cacheprovider", *tests, *TESTS_OF_THE_WHOLE_API, "-k", chosen
    )
    # These tests exist only in the copy.
    for name in (
        "test_a_note_is_stored",
        "test_search",
        "test_users_cannot_see_change_or_detect_rows_of_others[notes-unfiltered]",
        "test_every_operation_is_documented[list_notes]",
        "test_hostile_values_are_answered_as_documented[post-/api/v1/notes]",
        "test_only_the_application_imports_a_feature[notes]",
    ):
        assert f"{name} PASSED" in output


@pytest.mark.full
def test_labels_pass_the_tests_of_all_resources(reader: Reader) -> None:
    """Last: its chapter changes lines of the chapter `Tests`."""
    reader.read_to("Many-to-many")
    reader.lint("ruff", "check", "--no-cache")
    reader.lint("ruff", "format", "--check", "--no-cache")
    reader.lint("mypy", f"--cache-dir={ROOT / '.mypy_cache'}")
    tests = "tests/docs/chapters.py::test_many_to_many", "tests/notes", "tests/resources/test_owned_resources.py"
    output = reader.checkout.run("pytest", "-v", "--no-header", "-p", "no:cacheprovider", *tests)
    for name in "test_many_to_many", "test_a_note_is_stored":
        assert f"{name} PASSED" in output
    assert "No new upgrade operations" in reader.checkout.run("alembic", "check")
