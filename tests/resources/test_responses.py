"""Responses: rows are serialized to the same bytes as by the response model."""

from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from backend.resources.responses import Answer
from backend.tasks.schemas import TagList, TagRead, TaskRead


class Colour(Enum):
    red = "r"


class Everything(BaseModel):
    """Types that tasks do not have."""

    price: Decimal
    lasts: timedelta
    on: date
    at: time
    raw: bytes
    colour: Colour
    ratio: float
    big: int
    nested: dict[str, list[int]]
    nothing: None
    moments: dict[str, list[datetime]]


TIMES = st.datetimes(timezones=st.just(UTC))
ROWS: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {
        "id": st.uuids(),
        "title": st.text(),
        "description": st.none() | st.text(),
        "status": st.sampled_from(["todo", "in_progress", "done"]),
        "priority": st.sampled_from(["low", "normal", "high", "urgent"]),
        "due_at": st.none() | TIMES,
        "tags": st.lists(st.text(), max_size=3),
        "is_overdue": st.booleans(),
        "completed_at": st.none() | TIMES,
        "created_at": TIMES,
        "updated_at": TIMES,
        "deleted_at": st.none() | TIMES,
        "version": st.integers(1, 2**31 - 1),
    }
)


@given(ROWS)
def test_a_task_is_serialized_as_by_its_model(row: dict[str, Any]) -> None:
    """Whether the times have the offset of UTC, or none."""
    expected = TaskRead.model_validate(row).model_dump_json().encode()
    assert Answer(TaskRead)(row).body == expected
    bare = {name: value.replace(tzinfo=None) if isinstance(value, datetime) else value for name, value in row.items()}
    assert Answer(TaskRead)(bare).body == expected


def test_other_types_are_serialized_as_by_pydantic() -> None:
    row: dict[str, Any] = {
        "price": Decimal("1.10"),
        "lasts": timedelta(days=1, seconds=2),
        "on": date(2026, 2, 3),
        "at": time(4, 5, tzinfo=UTC),
        "raw": b"raw",
        "colour": Colour.red,
        "ratio": 0.1,
        "big": 2**63 - 1,
        "nested": {"a": [1]},
        "nothing": None,
        "moments": {"first": [datetime(2026, 2, 3, 4, 5, 6, 7, tzinfo=UTC)]},
    }
    expected = Everything.model_validate(row).model_dump_json().encode()
    assert Answer(Everything)(row).body == expected
    bare = {"moments": {"first": [datetime(2026, 2, 3, 4, 5, 6, 7)]}}  # noqa: DTZ001  # as psycopg loads it in UTC
    assert Answer(Everything)({**row, **bare}).body == expected


def test_columns_that_the_model_lacks_are_not_in_the_response() -> None:
    id = UUID(int=1)
    row = {"task_count": 3, "owner_id": "secret", "name": "home", "id": id}
    expected = TagRead(id=id, name="home", task_count=3)
    assert Answer(TagRead)(row).body == expected.model_dump_json().encode()
    page = Answer(TagRead, many=True)({"items": [row, {**row}]})
    assert page.body == TagList(items=[expected, expected]).model_dump_json().encode()


def test_an_item_without_a_row_is_null() -> None:
    assert Answer(TagRead, many=True)({"items": [None]}).body == b'{"items":[null]}'


def test_a_row_that_lacks_a_member_of_the_model_is_an_error() -> None:
    with pytest.raises(KeyError, match="task_count"):
        Answer(TagRead)({"id": UUID(int=1), "name": "home"})


def test_a_time_with_another_offset_is_serialized_as_by_pydantic() -> None:
    class Event(BaseModel):
        at: datetime

    row = {"at": datetime.fromisoformat("2026-11-25T09:00:00.5+02:00")}
    assert Answer(Event)(row).body == Event.model_validate(row).model_dump_json().encode()
