"""`/readyz` asks the database once for all who come, and says nothing that it has not heard."""

import asyncio
from typing import cast

import pytest

from backend.database import Probe, Row
from backend.operations import health
from backend.operations.health import SchemaCheck


class Scripted:
    """A probe that answers when it is told to, with a revision or an error."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer: str | Exception = "0001"
        self.may_answer = asyncio.Event()

    async def rows(self, _: str) -> list[Row]:
        self.asked += 1
        await self.may_answer.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return [{"version_num": self.answer}]


def check(probe: Scripted) -> SchemaCheck:
    return SchemaCheck(cast(Probe, probe), "0001")


async def test_whoever_asks_first_may_leave_without_troubling_the_others() -> None:
    probe = Scripted()
    schema = check(probe)
    first, second = (asyncio.create_task(schema.status()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    probe.may_answer.set()
    assert await second == "ok"
    assert first.cancelled()
    assert await schema.status() == "ok"
    assert probe.asked == 1


async def test_an_answer_that_is_no_more_fresh_is_not_given_for_one_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "MAX_AGE", 0.0)
    probe = Scripted()
    probe.may_answer.set()
    schema = check(probe)
    assert await schema.status() == "ok"
    probe.answer = RuntimeError("not foreseen")
    with pytest.raises(RuntimeError, match="not foreseen"):
        await schema.status()
    probe.answer = "0001"
    assert await schema.status() == "ok"
