"""`alembic revision --autogenerate` writes whole migrations of owned tables, in a copy of the project."""

import re
from typing import Any

import psycopg
import pytest

from backend import migrations
from tests.support.checkout import Checkout

ROUTER = """
from datetime import datetime

from fastapi import APIRouter
from sqlalchemy import CheckConstraint, Computed, Index
from sqlmodel import Field

from backend.resources.models import Owned, Synced

router = APIRouter()


class Gadget(Owned, table=True):
    __tablename__ = "gadgets"

    name: str


class Part(Synced, table=True):
    __tablename__ = "parts"
    __table_args__ = (
        CheckConstraint("char_length(name) between 1 and 50", name="parts_name_length"),
        Index("parts_by_number", "owner_id", "n", "id"),
    )

    name: str = Field(max_length=50)
    folded: str = Field(sa_column_args=[Computed("casefold(name COLLATE pg_unicode_fast)", persisted=True)])
"""
NUMBERS = [f"{int(migrations.head()) + step:04}" for step in (1, 2, 3)]

# Columns: forced, policies, privileges of api_user, triggers with the arguments of `number_change`.
RULES = """
SELECT c.relname, c.relrowsecurity AND c.relforcerowsecurity,
       array(SELECT polname::text FROM pg_policy WHERE polrelid = c.oid ORDER BY 1),
       array(SELECT DISTINCT privilege_type::text FROM information_schema.role_table_grants
             WHERE table_name = c.relname AND grantee IN ('api_user', 'api_system') ORDER BY 1),
       array(SELECT t.tgname || ' ' || encode(t.tgargs, 'escape') FROM pg_trigger t
             WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgname = 'number_change')
FROM pg_class c WHERE c.relname IN ('gadgets', 'parts') ORDER BY 1
"""
ALL = ["DELETE", "INSERT", "SELECT", "UPDATE"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, postgres: str) -> Checkout:
    copy = Checkout(tmp_path_factory.mktemp("checkout"), postgres)
    copy.run("backend.cli", "migrate")
    copy.write("backend/gadgets/__init__.py", '"""Gadgets."""\n')
    copy.write("backend/gadgets/router.py", ROUTER)
    copy.replace("backend/app.py", "ROUTERS = (\n", 'ROUTERS = (\n    "backend.gadgets.router:router",\n')
    return copy


def fetch(checkout: Checkout, sql: str, *values: Any) -> list[Any]:
    with psycopg.connect(checkout.url) as connection:
        return [list(row) for row in connection.execute(sql.encode(), values)]


def generate(checkout: Checkout, message: str) -> str:
    """The text of the migration that Alembic writes, which must pass the linters. It is applied."""
    before = checkout.migrations()
    checkout.run("alembic", "revision", "--autogenerate", "-m", message)
    (written,) = set(checkout.migrations()) - set(before)
    path = f"backend/migrations/versions/{written}"
    for linter in ("ruff", "check", "--no-cache"), ("ruff", "format", "--check", "--no-cache"):
        checkout.run(*linter, path)
    checkout.run("backend.cli", "migrate")
    assert "No new upgrade operations" in checkout.run("alembic", "check")
    return (checkout.folder / path).read_text()


def test_new_tables_are_isolated_and_numbered(checkout: Checkout) -> None:
    text = generate(checkout, "gadgets")
    assert re.search(f'^revision = "{NUMBERS[0]}"\ndown_revision = "{migrations.head()}"$', text, re.MULTILINE)
    assert "from backend.migrations import isolate, number\n" in text
    assert re.findall(r"op\.(\w+\((?:\w+\()?)", text) == [
        "create_table(", "create_table(", "create_index(", "execute(isolate(", "execute(isolate(", "execute(number(",
        "drop_index(", "drop_table(", "drop_table(",
    ]  # fmt: skip
    assert fetch(checkout, RULES) == [
        ["gadgets", True, ["owner", "system"], ALL, []],
        ["parts", True, ["owner", "system"], ALL, ["number_change folded\\000"]],
    ]


def test_a_new_column_writes_nothing_else(checkout: Checkout) -> None:
    checkout.replace("backend/gadgets/router.py", "    name: str\n", "    name: str\n    seen_at: datetime | None\n")
    text = generate(checkout, "seen")
    assert re.findall(r"op\.(\w+)", text) == ["add_column", "drop_column"]
    assert "backend.migrations" not in text
    assert "nothing to do" in checkout.run("alembic", "revision", "--autogenerate", "-m", "nothing")
    assert checkout.migrations()[-1] == f"{NUMBERS[1]}_seen.py"


def test_a_table_with_rows_becomes_synced(checkout: Checkout) -> None:
    user = "INSERT INTO users (issuer, subject) VALUES ('i', 's') RETURNING id"
    ((owner,),) = fetch(checkout, user)
    fetch(checkout, "INSERT INTO gadgets (owner_id, name) VALUES (%s, 'old') RETURNING id", owner)
    checkout.replace("backend/gadgets/router.py", "Gadget(Owned", "Gadget(Synced")
    assert "unnumber" in generate(checkout, "synced")
    fetch(checkout, "INSERT INTO gadgets (owner_id, name) VALUES (%s, 'new') RETURNING id", owner)
    assert fetch(checkout, "SELECT name, n FROM gadgets ORDER BY n") == [["old", 0], ["new", 1]]


def test_every_downgrade_runs(checkout: Checkout) -> None:
    checkout.run("alembic", "downgrade", NUMBERS[1])
    assert fetch(checkout, "SELECT name FROM gadgets ORDER BY name") == [["new"], ["old"]]
    assert fetch(checkout, RULES)[0] == ["gadgets", True, ["owner", "system"], ALL, []]
    fetch(checkout, "INSERT INTO gadgets (owner_id, name) SELECT owner_id, 'again' FROM gadgets RETURNING id")
    checkout.run("alembic", "downgrade", migrations.head())
    assert fetch(checkout, RULES) == []
    checkout.run("backend.cli", "migrate")
    assert [row[0] for row in fetch(checkout, RULES)] == ["gadgets", "parts"]


@pytest.mark.full
def test_an_existing_table_without_policies_is_found(checkout: Checkout) -> None:
    with psycopg.connect(checkout.url) as connection:
        connection.execute(migrations.unisolate("gadgets").encode())
    assert checkout.start("alembic", "check").returncode != 0
    text = generate(checkout, "policies")
    assert re.findall(r"op\.execute\((\w+)", text) == ["isolate", "unisolate"]
    assert fetch(checkout, RULES)[0] == ["gadgets", True, ["owner", "system"], ALL, ["number_change "]]
    checkout.run("alembic", "downgrade", "-1")
    assert fetch(checkout, RULES)[0][1:4] == [False, [], []]
