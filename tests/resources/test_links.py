"""Many-to-many by `link`: notes with labels, in tables that the application does not have."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from uuid import UUID, uuid4

import psycopg
import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from sqlalchemy import Column, Table, Text, Uuid, bindparam, delete, insert, update
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel, col, select

from backend import migrations
from backend.database import SYSTEM, Actor, Database, Pool, Row, Statement, Transaction, executor
from backend.resources import models
from backend.resources.links import MAX_NAMES, NAME_LENGTH, Name, Named, Names, link, shown_names
from backend.resources.models import CALLER, Synced
from backend.sync import changes
from backend.sync.changes import Feed, Position, write_in_turn
from backend.users import owned_data
from tests.conftest import create_database
from tests.database.test_executor import raw
from tests.database.test_migrations import engine_of


class Scratch(SQLModel, registry=registry()):
    """Keeps these tables out of the application's metadata, which other tests compare with its database."""


Table("users", Scratch.metadata, Column("id", Uuid, primary_key=True))


class Note(Synced, Scratch, table=True):
    __tablename__ = "scratch_notes"

    title: str = Field(sa_type=Text)
    labels: list[str] = shown_names()


class Label(Named, Scratch, table=True):
    __tablename__ = "scratch_labels"


LABELS = link("scratch_note_labels", note=Note, label=Label, names="labels")

TABLE = LABELS.rows
READ = [TABLE.c[name] for name in ("id", "title", "labels", "version", "updated_at", "deleted_at")]
MINE = col(Note.owner_id) == CALLER
THIS_LABEL = (col(Label.owner_id) == CALLER, col(Label.name) == bindparam("label"))
INSERT = LABELS.write(insert(Note).values(owner_id=CALLER, title=bindparam("title")), "labels", *READ)
UPDATE = LABELS.write(
    update(Note)
    .where(MINE, col(Note.id) == bindparam("note_id"))
    .values(models.changes(TABLE, ["labels"], labels=LABELS.names("labels"))),
    "labels",
    *READ,
)
RENAME = Statement(update(Label).where(*THIS_LABEL).values(name=bindparam("name")).returning(col(Label.id)))
DELETE = Statement(delete(Label).where(*THIS_LABEL).returning(col(Label.id)))
LIST = Statement(select(*READ).where(MINE).order_by(col(Note.title)))
FILTERED = Statement(select(*READ).where(MINE, LABELS.all_of("label")).order_by(col(Note.title)))
COUNTS = Statement(
    select(col(Label.id), col(Label.name), LABELS.count(MINE).label("notes"))
    .where(col(Label.owner_id) == CALLER)
    .order_by(col(Label.folded))
)
FEED = Feed("scratch_notes", "note", BaseModel, changes.statement(TABLE, READ))


@dataclass
class Owner:
    id: UUID
    database: Database

    async def note(self, title: str, labels: Sequence[str]) -> Row:
        row = await write_in_turn(self.database, INSERT, title=title, labels=list(labels))
        assert row is not None
        return row

    async def label(self, note: Row, labels: Sequence[str]) -> Row:
        row = await write_in_turn(self.database, UPDATE, note_id=note["id"], labels=list(labels))
        assert row is not None
        return row

    async def rename(self, label: str, name: str) -> None:
        assert await write_in_turn(self.database, RENAME, label=label, name=name)

    async def delete(self, label: str) -> None:
        assert await write_in_turn(self.database, DELETE, label=label)

    async def notes(self) -> dict[str, tuple[list[str], int]]:
        """The labels and the version of each note, by title."""
        return {row["title"]: (row["labels"], row["version"]) for row in await self.database.rows(LIST)}

    async def labels(self) -> dict[str, int]:
        """The number of notes by label."""
        return {row["name"]: row["notes"] for row in await self.database.rows(COUNTS)}

    async def label_id(self, name: str) -> UUID:
        (id,) = (row["id"] for row in await self.database.rows(COUNTS) if row["name"] == name)
        assert isinstance(id, UUID)
        return id

    async def changed(self, since: Position | None) -> tuple[dict[str, tuple[list[str], int]], Position]:
        """What the feed shows after a position: labels and versions by title, and the next position."""
        found = await FEED.after(self.database, since, 100)
        return {row["title"]: (row["labels"], row["version"]) for _, row in found.items}, found.next


@pytest.fixture(scope="module")
def url(postgres: str) -> str:
    """A database with the tables, as a migration makes them."""
    url = create_database(postgres, f"links_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    with engine_of(url).begin() as connection:
        owned = [table for table in Scratch.metadata.sorted_tables if table.name != "users"]
        Scratch.metadata.create_all(connection, owned)
        for table in owned:
            connection.exec_driver_sql(migrations.isolate(table.name))
        connection.exec_driver_sql(migrations.number("scratch_notes"))
        connection.exec_driver_sql(
            migrations.link("scratch_note_labels", note="scratch_notes", label="scratch_labels", names="labels")
        )
    return url


@pytest.fixture(scope="module")
async def pool(url: str) -> AsyncIterator[Pool]:
    async with Pool(url, size=24) as pool:
        yield pool


async def new_owner(pool: Pool) -> Owner:
    insert = raw("INSERT INTO users (issuer, subject) VALUES ('i', :subject) RETURNING id")
    (row,) = await Database(pool, SYSTEM).rows(insert, subject=uuid4().hex)
    return Owner(row["id"], Database(pool, Actor.user(row["id"])))


@pytest.fixture
async def ada(pool: Pool) -> Owner:
    return await new_owner(pool)


@pytest.fixture
async def eve(pool: Pool) -> Owner:
    return await new_owner(pool)


async def test_a_note_shows_its_labels_sorted_in_the_spelling_first_stored(ada: Owner) -> None:
    first = await ada.note("a", ["work", "Home", "HOME"])
    assert (first["labels"], first["version"]) == (["Home", "work"], 1)
    assert (await ada.note("b", ["home", "Straße"]))["labels"] == ["Home", "Straße"]
    assert (await ada.note("c", ["STRASSE"]))["labels"] == ["Straße"]
    assert (await ada.note("d", []))["labels"] == []
    assert await ada.labels() == {"Home": 2, "Straße": 2, "work": 1}
    assert await ada.label(first, ["WORK", "home"]) == first
    replaced = await ada.label(first, ["work", "new"])
    assert (replaced["labels"], replaced["version"]) == (["new", "work"], 2)
    shown = {title: labels for title, (labels, _) in (await ada.notes()).items()}
    assert shown == {"a": ["new", "work"], "b": ["Home", "Straße"], "c": ["Straße"], "d": []}
    for names, titles in (["HOME"], ["b"]), (["home", "strasse"], ["b"]), (["straße"], ["b", "c"]), (["x"], []):
        assert [row["title"] for row in await ada.database.rows(FILTERED, label=names)] == titles


async def test_renamed_and_deleted_labels_are_in_the_feed(ada: Owner) -> None:
    for title, labels in {"a": ["home"], "b": ["home", "work"], "c": ["work"]}.items():
        await ada.note(title, labels)
    _, position = await ada.changed(None)
    await ada.rename("home", "at home")
    changed, position = await ada.changed(position)
    assert changed == {"a": (["at home"], 2), "b": (["at home", "work"], 2)}
    before = {row["title"]: row["updated_at"] for row in await ada.database.rows(LIST)}
    await ada.delete("work")
    changed, position = await ada.changed(position)
    assert changed == {"b": (["at home"], 3), "c": ([], 2)}
    after = {row["title"]: row["updated_at"] for row in await ada.database.rows(LIST)}
    assert {title for title in after if after[title] > before[title]} == set(changed)
    await ada.rename("at home", "at home")
    assert (await ada.changed(position))[0] == {}


async def test_links_that_are_moved_to_another_label_are_in_the_feed(ada: Owner, pool: Pool) -> None:
    await ada.note("a", ["home"])
    await ada.note("b", ["house"])
    _, position = await ada.changed(None)
    home, house = [await ada.label_id(name) for name in ("home", "house")]
    merge = raw("UPDATE scratch_note_labels SET label_id = :new WHERE label_id = :old")
    await Database(pool, SYSTEM).rows(merge, old=house, new=home)
    assert (await ada.changed(position))[0] == {"b": (["home"], 2)}
    assert await ada.labels() == {"home": 2, "house": 0}


async def test_a_merge_of_accounts_unites_equal_labels(
    ada: Owner, eve: Owner, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ada.note("a", ["Home", "own"])
    await eve.note("e", ["HOME"])
    _, position = await eve.changed(None)
    tables = [LABELS.labels, TABLE, LABELS.table]
    monkeypatch.setattr(owned_data, "tables", lambda: tables)

    async def work(transaction: Transaction) -> None:
        for statement in owned_data.transfers.__wrapped__():
            await transaction.rows(statement, old_id=ada.id, new_id=eve.id)
        for statement in owned_data.deletions.__wrapped__():
            await transaction.rows(statement, user_id=ada.id)

    await Database(pool, SYSTEM).transact(work)
    assert await eve.notes() == {"a": (["HOME", "own"], 2), "e": (["HOME"], 1)}
    assert (await eve.changed(position))[0] == {"a": (["HOME", "own"], 2)}
    assert await eve.labels() == {"HOME": 2, "own": 1}
    assert (await ada.notes(), await ada.labels()) == ({}, {})


async def test_owners_never_share_a_label(ada: Owner, eve: Owner) -> None:
    for owner in ada, eve:
        await owner.note("a", ["home"])
    assert await ada.label_id("home") != await eve.label_id("home")
    await ada.rename("home", "mine")
    assert await eve.notes() == {"a": (["home"], 1)}
    await eve.delete("home")
    assert await ada.notes() == {"a": (["mine"], 2)}


async def test_a_label_of_another_owner_cannot_be_linked(ada: Owner, eve: Owner, pool: Pool) -> None:
    """By the foreign keys, for the system too, and by row-level security."""
    note, other = await ada.note("a", []), await eve.note("e", ["home"])
    home = await eve.label_id("home")
    link = raw("INSERT INTO scratch_note_labels (owner_id, note_id, label_id) VALUES (:owner, :note, :label)")
    for database in ada.database, Database(pool, SYSTEM):
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            await database.rows(link, owner=ada.id, note=note["id"], label=home)
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        await Database(pool, SYSTEM).rows(link, owner=eve.id, note=note["id"], label=home)
    await eve.label(other, [])
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
        await ada.database.rows(link, owner=eve.id, note=other["id"], label=home)
    for statement in (
        "UPDATE scratch_labels SET name = 'x' RETURNING id",
        "SELECT id FROM scratch_labels",
        "SELECT * FROM scratch_note_labels",
    ):
        assert await ada.database.rows(raw(statement)) == []
    assert await eve.labels() == {"home": 0}


async def test_concurrent_writes_do_not_deadlock(ada: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a write miss a label that another one creates."""
    retried: list[psycopg.Error] = []

    async def pause_after(error: psycopg.Error) -> None:
        retried.append(error)

    monkeypatch.setattr(executor, "_pause_after", pause_after)
    notes = [await ada.note(f"{number}", [f"own {number}"]) for number in range(6)]
    await ada.note("renamed", ["name 0"])
    for turn in range(4):
        answers = await asyncio.gather(
            *(ada.label(note, [f"name {turn}", f"new {turn}"]) for note in notes[:3]),
            ada.rename(f"name {turn}", f"name {turn + 1}"),
            *(ada.label(note, [f"NAME {turn}", f"NEW {turn}"]) for note in notes[3:]),
            ada.note(f"another {turn}", [f"new {turn}"]),
            ada.delete(f"own {turn}"),
        )
        assert [len(row["labels"]) for row in answers if row] == [2] * 6 + [1]
    assert retried == []
    assert {len(labels) for labels, _ in (await ada.notes()).values()} == {1, 2}
    assert await ada.database.rows(INCONSISTENT) == []


INCONSISTENT = raw(
    "SELECT title, labels FROM scratch_notes n WHERE labels <> array("
    " SELECT name FROM scratch_note_labels l JOIN scratch_labels s ON (s.owner_id, s.id) = (l.owner_id, l.label_id)"
    " WHERE (l.owner_id, l.note_id) = (n.owner_id, n.id) ORDER BY folded)"
)


async def test_names_are_limited(ada: Owner) -> None:
    names: TypeAdapter[list[str]] = TypeAdapter(Names)
    most = [f"{number}" for number in range(MAX_NAMES)]
    assert len((await ada.note("a", names.validate_python(most)))["labels"]) == MAX_NAMES == 20
    longest = TypeAdapter(Name).validate_python("x" * NAME_LENGTH)
    assert (await ada.note("b", [longest]))["labels"] == [longest]
    assert NAME_LENGTH == 50
    for invalid in [*most, "one more"], [longest + "x"], [""], [" "], ["a\0"], [None]:
        with pytest.raises(ValidationError):
            names.validate_python(invalid)
    for name in "", longest + "x":
        with pytest.raises(psycopg.errors.CheckViolation):
            await ada.note("c", [name])


SECOND_LINK = """
ALTER TABLE scratch_notes ADD marks text[] DEFAULT '{}' NOT NULL;
CREATE TABLE note_marks (LIKE scratch_note_labels INCLUDING ALL);
ALTER TABLE note_marks RENAME label_id TO mark_id;
"""


def test_links_can_share_labels_and_be_undone(url: str) -> None:
    definitions = "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1"
    with psycopg.connect(url) as connection:
        before = connection.execute(definitions).fetchall()
        connection.execute(SECOND_LINK)
        marks = migrations.link("note_marks", note="scratch_notes", mark="scratch_labels", names="marks")
        connection.execute(marks.encode())
        ids = {name: uuid4() for name in ("owner", "note", "label")}
        for statement in (
            "INSERT INTO users (id, issuer, subject) VALUES (%(owner)s, 'i', 'marks')",
            "INSERT INTO scratch_notes (owner_id, id, title) VALUES (%(owner)s, %(note)s, 'a')",
            "INSERT INTO scratch_labels (owner_id, id, name) VALUES (%(owner)s, %(label)s, 'home')",
            "INSERT INTO scratch_note_labels VALUES (%(owner)s, %(note)s, %(label)s)",
            "INSERT INTO note_marks VALUES (%(owner)s, %(note)s, %(label)s)",
            "UPDATE scratch_labels SET name = 'house' WHERE id = %(label)s",
        ):
            connection.execute(statement.encode(), ids)
        shown = connection.execute("SELECT labels, marks FROM scratch_notes WHERE id = %(note)s", ids).fetchone()
        assert shown == (["house"], ["house"])
        for table in "note_marks", "scratch_note_labels":
            connection.execute(migrations.unlink(table, labels="scratch_labels").encode())
            connection.execute(f"DROP TABLE {table}".encode())
        left = connection.execute(definitions).fetchall()
        assert {name for (name,) in before} - {name for (name,) in left} == {
            f"{name}_in_scratch_note_labels"
            for name in ("names_of_scratch_labels", "show_scratch_labels", "show_links", "show_new_names", "unlink")
        }
        connection.execute("UPDATE scratch_labels SET name = name; DELETE FROM scratch_labels")
        connection.rollback()


class Owners(Synced, Scratch, table=True):
    __tablename__ = "scratch_owners"

    owner: UUID
    labels: list[str] = shown_names()


class Shown(Synced, Scratch, table=True):
    __tablename__ = "scratch_shown"

    names: list[str] = shown_names()


@pytest.mark.parametrize(
    ("name", "names", "ends", "reason"),
    [
        ("Links", "labels", {"note": Note, "label": Label}, "Links is not a name"),
        ("links", "labels", {"order": Note, "label": Label}, "order is not a name"),
        ("links", "labels", {"note": Note, "version": Label}, "name version: choose another for this end"),
        ("links", "labels", {"note": Note, "title": Label}, "rename scratch_notes.title"),
        ("links", "labels", {"note": Owners, "label": Label}, "rename scratch_owners.owner"),
        ("links", "names", {"row": Shown, "label": Label}, "name names: choose another for the column"),
    ],
)
def test_names_that_the_triggers_cannot_contain_are_refused(
    name: str, names: str, ends: dict[str, type[SQLModel]], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        link(name, names=names, **ends)
