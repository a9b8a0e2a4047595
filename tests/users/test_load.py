"""Many first requests at once: a morning after an announcement."""

import asyncio

from backend.database import SYSTEM, Database
from tests.conftest import Api, Person
from tests.test_database import raw

COUNT = raw("SELECT count(*) AS rows, count(DISTINCT subject) AS people FROM users WHERE name = :name")


async def arrive(people: list[Person], *, at_once: int) -> list[tuple[int, str]]:
    """The status of each request, and the id that it found."""
    waiting = iter(people)
    found: list[tuple[int, str]] = []

    async def client() -> None:
        for person in waiting:
            answer = await person.get("/api/v1/users/me")
            found.append((answer.status_code, answer.json().get("id")))

    async with asyncio.TaskGroup() as clients:
        for _ in range(at_once):
            clients.create_task(client())
    return found


async def test_two_thousand_people_come_at_once_and_each_gets_one_row(api: Api) -> None:
    """Every tenth of them with two devices."""
    name = "one of two thousand"
    people = [api.person(name=name) for _ in range(2000)]
    devices = [device for n, person in enumerate(people) for device in [person] * (1 + (n % 10 == 0))]
    found = await arrive(devices, at_once=200)
    assert {status for status, _ in found} == {200}
    assert len(found) == 2200
    assert len({id for _, id in found}) == 2000
    assert await Database(api.state["pool"], SYSTEM).row(COUNT, name=name) == {"rows": 2000, "people": 2000}
