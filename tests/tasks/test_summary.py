"""GET /tasks/summary: counts by status, overdue tasks, and tasks due today in the user's time zone."""

from datetime import UTC, datetime, timedelta

import pytest

from backend.tasks import service
from tests.conftest import Api

TASKS = "/api/v1/tasks"
SUMMARY = f"{TASKS}/summary"


async def test_the_summary_counts_live_tasks_of_the_caller(api: Api) -> None:
    ada = api.person()
    empty = {"by_status": {"todo": 0, "in_progress": 0, "done": 0}, "overdue": 0, "due_today": 0}
    assert (await ada.get(SUMMARY)).json() == empty
    late = (datetime.now(UTC) - timedelta(days=3)).isoformat()
    for status in "todo", "todo", "in_progress", "done":
        await ada.task(status=status, due_at=late)
    trashed = await ada.task(due_at=late)
    await ada.delete(f"{TASKS}/{trashed['id']}")
    counts = {"by_status": {"todo": 2, "in_progress": 1, "done": 1}, "overdue": 3, "due_today": 0}
    assert (await ada.get(SUMMARY)).json() == counts
    assert (await api.person().get(SUMMARY)).json() == empty


@pytest.mark.parametrize(
    ("zone", "first", "last"),
    [
        (None, "2026-03-29T00:00:00Z", "2026-03-29T23:59:59.999999Z"),
        # A day of 23 hours, one far ahead of UTC, and one behind it.
        ("Europe/Berlin", "2026-03-28T23:00:00Z", "2026-03-29T21:59:59.999999Z"),
        ("Pacific/Kiritimati", "2026-03-29T10:00:00Z", "2026-03-30T09:59:59.999999Z"),
        ("America/Los_Angeles", "2026-03-29T07:00:00Z", "2026-03-30T06:59:59.999999Z"),
    ],
)
async def test_today_is_a_day_in_the_users_time_zone(
    api: Api, monkeypatch: pytest.MonkeyPatch, zone: str | None, first: str, last: str
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]  # called with UTC only
            assert tz is UTC
            return datetime(2026, 3, 29, 12, tzinfo=UTC)

    ada = api.person()
    if zone:
        assert (await ada.patch("/api/v1/users/me", {"time_zone": zone})).status_code == 200
    begin, end = datetime.fromisoformat(first), datetime.fromisoformat(last)
    for moment in begin, end, begin - timedelta(microseconds=1), end + timedelta(microseconds=1):
        await ada.task(due_at=moment.isoformat())
    await ada.task(due_at=first, status="done")
    monkeypatch.setattr(service, "datetime", Clock)
    assert (await ada.get(SUMMARY)).json()["due_today"] == 2
