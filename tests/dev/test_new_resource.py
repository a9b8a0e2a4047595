"""`resource-server new` writes a resource that passes the linters and the tests untouched."""

import shutil
from pathlib import Path

import pytest

from backend.dev import new_resource as module
from backend.dev.new_resource import Name, NewResourceError, new_resource
from backend.settings import Settings
from tests.contract.packages import CONTRACT
from tests.support.checkout import ROOT, Checkout

FILES = ("__init__", "models", "statements", "router", "auth", "schemas", "service")


def snapshot(folder: Path) -> dict[Path, bytes]:
    """The contents of all files but caches."""
    found = (file for name in ("backend", "docs", "tests") for file in (folder / name).rglob("*.*"))
    return {file: file.read_bytes() for file in found if file.is_file() and file.suffix != ".pyc"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, postgres: str) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"), postgres)


@pytest.mark.parametrize(
    ("plural", "singular", "reason"),
    [
        ("Projects", None, "'Projects' is not a name in lower case"),
        ("bank-accounts", None, "'bank-accounts' is not a name"),
        ("../evil", None, "'../evil' is not a name"),
        ("x" * 30 + "s", None, "of at most 30 letters"),
        ("project", None, "project is not a plural, such as projects: name its singular with --singular"),
        ("classes", None, "class is a keyword of Python"),
        ("references", None, "references is a reserved word of PostgreSQL"),
        ("users", None, "backend/users exists"),
        ("tags", None, "the table tags exists"),
        ("fields", None, "Field is a name in the code of every resource"),
        ("people", "Person", "'Person' is not a name"),
    ],
)
def test_a_bad_name_is_refused_in_one_line_and_writes_nothing(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, plural: str, singular: str | None, reason: str
) -> None:
    monkeypatch.chdir(checkout.folder)
    before = snapshot(checkout.folder)
    with pytest.raises(NewResourceError) as refusal:
        new_resource(plural, singular, Settings(_env_file=None, database_url="postgresql://nobody@127.0.0.1:9/nothing"))
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert snapshot(checkout.folder) == before


def test_the_command_names_the_reason_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_PACKAGE", tmp_path / "site-packages" / "backend")
    with pytest.raises(NewResourceError, match=r"^run this command in a checkout of the project: "):
        new_resource("projects", None, Settings(_env_file=None))


def test_a_failure_restores_every_file(checkout: Checkout) -> None:
    before = snapshot(checkout.folder)
    failed = checkout.start("backend.cli", "new", "projects", DATABASE_URL="postgresql://nobody@127.0.0.1:9/nothing")
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "cannot connect to the database" in failed.stderr
    assert snapshot(checkout.folder) == before
    assert not (checkout.folder / "backend/projects").exists()


def test_names_are_replaced_in_their_own_case() -> None:
    text = '"""A note; a Note, NOTES, notes."""\ndef test_a_note(note_id: NotesRead) -> NOTE_ID: annotated'
    assert Name("bank_accounts", "bank_account").rename(text.replace("a Note", "the Note")) == (
        '"""A bank_account; the BankAccount, BANK_ACCOUNTS, bank_accounts."""\n'
        "def test_a_bank_account(bank_account_id: BankAccountsRead) -> BANK_ACCOUNT_ID: annotated"
    )
    assert Name("ideas", "idea").rename("a note, A note, test_a_note") == "an idea, An idea, test_an_idea"


@pytest.mark.full
@pytest.mark.parametrize(
    ("plural", "singular"),
    [("invoices", "invoice"), ("very_long_names_of_a_resource", "very_long_name_of_a_resource")],
)
def test_what_it_writes_passes_the_linters_and_the_tests(
    tmp_path: Path, postgres: str, plural: str, singular: str
) -> None:
    checkout = Checkout(tmp_path, postgres)
    (tmp_path / "frontend-contract").mkdir()
    for name in "openapi.json", "schema.d.ts", "package.json":
        shutil.copy(CONTRACT / name, tmp_path / "frontend-contract")
    (tmp_path / "frontend-contract/node_modules").symlink_to(CONTRACT / "node_modules")
    # Without DATABASE_URL it starts an embedded PostgreSQL.
    started = checkout.start("backend.cli", "new", plural, "--singular", singular, DATABASE_URL="")
    assert started.returncode == 0, started.stderr
    files = started.stderr.splitlines()
    assert {f"backend/{plural}/{name}.py" for name in FILES} < set(files)
    assert f"tests/{plural}/test_{plural}.py" in files
    assert singular in (tmp_path / f"backend/{plural}/service.py").read_text()
    python = [file for file in files if file.endswith(".py")]
    checkout.run("ruff", "check", "--no-cache", *python)
    checkout.run("ruff", "format", "--check", "--no-cache", *python)
    checkout.run("mypy", f"--cache-dir={ROOT / '.mypy_cache'}", *python)
    tests = [
        f"tests/{plural}",
        "tests/resources/test_owned_resources.py",
        "tests/test_architecture.py",
        "tests/contract/test_openapi.py",
        "tests/docs/test_docs.py::test_the_page_of_routes_is_up_to_date",
        "tests/database/test_migrations.py",
    ]
    checkout.run("pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "not concurrent")
